"""Train the reward model: a linear head on the base, with TRL's RewardTrainer (Bradley-Terry loss).

Reads   models/base, data/tokenized/reward_{train,heldout}.parquet and reward_negatives_{train,heldout}.parquet
Writes  models/reward                             AutoModelForSequenceClassification and tokenizer; with
                                                  `backbone: lora` also adapter/, merged into it
        reports/train_reward/history.csv          training and held-out figures, one row per logged step
        reports/train_reward/heldout_scores.csv   both scores of every held-out pair
        reports/train_reward/metrics.json         held-out accuracy and score gap
        reports/train_reward/run.json             seconds, tokens/s, memory, versions

Run     dvc repro train_reward                    (untracked: python -m stages.train_reward)

A frozen backbone never changes, so what the head reads is computed once per text and not once per epoch: the
trainer sees those features, and fits the very head that an ordinary run over tokens would (a test compares). A
backbone that is trained, whole or by adapters, has the ordinary run.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from datasets import Dataset, concatenate_datasets
from pydantic import Field, model_validator
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardTrainer

from stages.lib.model.adapters import FULL, Lora, add_adapters, save_adapted
from stages.lib.model.loading import (
    INITIAL_LOSS_SCALE,
    freeze,
    load_tokenizer,
    on_device,
    pick_device,
    pick_precision,
    require_autocast,
    save_model,
    set_seed,
)
from stages.lib.model.memory import memory_dial
from stages.lib.model.ranked_right import ranked_right, shares_by_kind, told_by_kind
from stages.lib.model.reward import (
    head_of,
    load_reward_model,
    new_reward_model,
    pooled_features,
    score_sequences,
    with_fp32_head,
)
from stages.lib.model.reward_trainer import (
    EndWhenAsked,
    HeadOnFeatures,
    KeepAtRows,
    OneDevice,
    collate_features,
    run_trainer,
)
from stages.lib.run.artefacts import read_parquet, round_floats, write_history, write_json
from stages.lib.run.checkpoints import Checkpoints
from stages.lib.run.params import Base, MicroBatchTokens, Section
from stages.lib.run.stage import run_stage

if TYPE_CHECKING:
    from peft import PeftModel

SIDES = ("chosen", "rejected")
PAIR_REPEATS = 2  # of every pair among its hard negatives, of which each kind stands once
CHUNK = 256  # texts between two chances to save their features
CORRUPTED = "corrupted "  # before a split's name: the corrupted copies of its chosen answers


class Params(Section):
    backbone: Literal["frozen", "lora", "full"]  # what is trained below the head: nothing, adapters, all
    learning_rate: float = Field(gt=0)  # of the linear head, decaying linearly to 0
    backbone_learning_rate: float = Field(gt=0)  # of what is trained below it, alike
    center_rewards_coefficient: float | None = Field(gt=0)  # weight of (chosen + rejected score)^2
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)  # pairs per optimizer step
    logging_steps: int = Field(gt=0)  # optimizer steps between rows of the history
    hard_negatives: bool  # corrupted copies of chosen answers as further rejected ones
    micro_batch_tokens: MicroBatchTokens  # memory dial: tokens per forward pass of the backbone
    lora: Lora = FULL  # the adapters of `backbone: lora`

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.backbone == "lora" and self.lora.rank is None:
            raise ValueError("backbone is lora, and lora.rank is null; set it, 8 to 64")
        return self


@dataclass(frozen=True)
class Fit:
    """What training gave."""

    history: list[dict[str, float]]
    steps: int  # of the optimizer
    scores_of: Callable[[str, str], Tensor]  # (N,) of a table's pairs, by table and side


def with_fresh_head(
    folder: Path, tokenizer: PreTrainedTokenizerBase, seed: int, device: torch.device
) -> PreTrainedModel:
    """`new_reward_model` of a seed, on the device."""
    set_seed(seed)
    return on_device(new_reward_model(folder, cast(int, tokenizer.pad_token_id)), device)


def features_of(
    model: PreTrainedModel,
    columns: dict[str, dict[str, list]],
    params: Params,
    precision: str,
    checkpoints: Checkpoints,
) -> tuple[dict[str, Dataset], Tensor]:
    """The pairs of each table with chosen_features and rejected_features (H,) beside their ids; and all features.

    Every different text is read once, a chosen answer being that of its pair and of all copies that lose to it; in
    sorted order, so that those that begin alike meet in a chunk.
    """
    sides = {(split, side): pairs[f"{side}_ids"] for split, pairs in columns.items() for side in SIDES}
    different = sorted({tuple(ids) for texts in sides.values() for ids in texts})
    place_of = {text: place for place, text in enumerate(different)}
    features = checkpoints.load().get("features", torch.empty(0, model.config.hidden_size))
    dial = memory_dial(params.micro_batch_tokens, 4096, model, "train_reward")
    starts = range(len(features), len(different), CHUNK)
    for start in tqdm(starts, "features", unit=f"{CHUNK} texts", disable=not starts):
        chunk = [list(ids) for ids in different[start : start + CHUNK]]
        read = dial.run(pooled_features, model, chunk, precision=precision)
        features = torch.cat([features, read])
        checkpoints.save_if_due(features=features)
    datasets = {}
    for split, pairs in columns.items():
        ids = {f"{side}_ids": pairs[f"{side}_ids"] for side in SIDES}
        places = {side: [place_of[tuple(ids)] for ids in sides[split, side]] for side in SIDES}
        read = {f"{side}_features": features[places[side]].numpy() for side in SIDES}
        datasets[split] = Dataset.from_dict(ids | read).with_format("torch")
    return datasets, features


def train_head(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    heldout: Dataset,
    params: Params,
    seed: int,
    checkpoints: Checkpoints,
    **kept: Tensor,
) -> tuple[list[dict[str, float]], int]:
    """Fits `model.score` in place on the features; stopped, it leaves a checkpoint of what is `kept`.

    Returns:
        The history: step, epoch, figures on the training batches since the last row, on held-out pairs (eval_);
        and the number of optimizer steps that the trainer made.

    Raises:
        AssertionError: it made another number of steps than `epochs` over the pairs in `batch_size` take.
        Stopped: a signal asked for the end.
    """
    with tempfile.TemporaryDirectory() as scratch:  # the trainer saves nothing; we do, without its pickle
        settings = trainer_settings(params, seed, len(train), model.device)
        settings |= dict(
            output_dir=scratch,
            per_device_train_batch_size=params.batch_size,
            per_device_eval_batch_size=len(heldout),  # one batch, so that its mean is over pairs
            bf16=False,  # the head is one small product: fp32. The backbone ran in base.precision
        )
        trainer = RewardTrainer(
            model=HeadOnFeatures(head_of(model), tokenizer),
            args=OneDevice(**settings),
            data_collator=collate_features,
            train_dataset=train,
            eval_dataset=heldout,
            processing_class=tokenizer,
            callbacks=[EndWhenAsked(checkpoints)],
        )
        require_all(trainer, train, heldout)
        return run_trainer(trainer, num_steps_of(params, len(train)), checkpoints, **kept)


def train_backbone(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    heldout: Dataset,
    params: Params,
    seed: int,
    precision: str,
    checkpoints: Checkpoints,
    micro_batch_tokens: int,
) -> tuple[list[dict[str, float]], int]:
    """Trains head and backbone in place, over tokens: all parameters that ask for a gradient.

    An optimizer step reads its pairs in equal parts of as many as fit; where an epoch's last step has fewer pairs than
    the others, those of its last part weigh more.

    Returns, raises:
        As `train_head`; Stopped where a signal asked for the end; UserError where accelerate lacks the precision.
    """
    device = next(model.parameters()).device
    longest = max(len(ids) for side in SIDES for ids in train[f"{side}_ids"])
    fitting = max(1, micro_batch_tokens // (2 * longest))
    part = max(
        size for size in range(1, params.batch_size + 1) if params.batch_size % size == 0 and size <= fitting
    )
    settings = trainer_settings(params, seed, len(train), device)
    settings |= dict(
        output_dir=str(checkpoints.path.parent / "trainer"),
        per_device_train_batch_size=part,
        gradient_accumulation_steps=params.batch_size // part,
        per_device_eval_batch_size=1,  # so that its mean is over pairs
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        disable_dropout=False,  # the model has none, but what adapters may have
        save_total_limit=1,
    )
    head = {name for name, weight in model.named_parameters() if weight.requires_grad and "score" in name}
    weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    groups = [
        {"params": [weights[name] for name in sorted(head)], "lr": params.learning_rate},
        {"params": [weights[name] for name in weights if name not in head], "lr": params.backbone_learning_rate},
    ]
    trainer = RewardTrainer(
        model=model,  # pyright: ignore[reportArgumentType]: PEFT's view of a model is one
        args=OneDevice(**settings),
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        callbacks=[KeepAtRows(checkpoints)],
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
    )
    require_autocast(trainer.accelerator, precision)
    if trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler = torch.amp.GradScaler(device.type, init_scale=INITIAL_LOSS_SCALE)
    trainer.create_model_card = lambda *args, **how: None  # TRL writes one into every checkpoint
    require_all(trainer, train, heldout)
    return run_trainer(trainer, num_steps_of(params, len(train)), checkpoints)


def require_all(trainer: RewardTrainer, train: Dataset, heldout: Dataset) -> None:
    """The trainer has dropped no pair."""
    held = cast(Dataset, trainer.train_dataset), cast(Dataset, trainer.eval_dataset)
    assert [len(pairs) for pairs in held] == [len(train), len(heldout)]


def num_steps_of(params: Params, num_pairs: int) -> int:
    """Optimizer steps of `epochs` over the pairs; an epoch's last batch may be smaller."""
    return params.epochs * math.ceil(num_pairs / params.batch_size)


def trainer_settings(params: Params, seed: int, num_pairs: int, device: torch.device) -> dict[str, Any]:
    """What both runs of TRL's trainer share."""
    logging_steps = min(params.logging_steps, num_steps_of(params, num_pairs))  # a short run has one row, not none
    return dict(
        learning_rate=params.learning_rate,
        center_rewards_coefficient=params.center_rewards_coefficient,
        num_train_epochs=params.epochs,
        logging_steps=logging_steps,
        eval_strategy="steps",
        eval_steps=logging_steps,
        seed=seed,
        max_length=None,  # tokenize_pairs cuts; RewardTrainer would drop long pairs without a word
        disable_dropout=True,
        activation_checkpointing=False,
        disable_tqdm=True,  # seconds of work
        remove_unused_columns=False,
        save_strategy="no",
        report_to="none",
        use_cpu=device.type == "cpu",
    )


@torch.no_grad()
def heldout_figures(chosen_scores: Tensor, rejected_scores: Tensor) -> dict[str, float]:
    """Means over held-out pairs; in the accuracy a tie counts half."""
    margins = chosen_scores - rejected_scores
    return {
        "accuracy": ranked_right(chosen_scores, rejected_scores).mean().item(),
        "margin": margins.mean().item(),
        "chosen_score": chosen_scores.mean().item(),
        "rejected_score": rejected_scores.mean().item(),
        "loss": -nn.functional.logsigmoid(margins).mean().item(),
    }


def fit_on_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    columns: dict[str, dict[str, list]],
    params: Params,
    seed: int,
    precision: str,
    checkpoints: Checkpoints,
    root: Path,
) -> Fit:
    """Fits the head of a frozen backbone and writes models/reward."""
    freeze(model)
    head_of(model).requires_grad_(True)
    datasets, features = features_of(model, columns, params, precision, checkpoints)
    names = ["chosen_ids", "rejected_ids", "chosen_features", "rejected_features"]
    fitted = concatenate_datasets([datasets[table].select_columns(names) for table in fitted_tables(params)])
    work = model, tokenizer, fitted, datasets["heldout"], params, seed, checkpoints
    history, steps = train_head(*work, features=features)
    save_model(model, tokenizer, root / "models/reward")
    weight = head_of(model).weight.detach().cpu().squeeze(0)

    def scores_of(table: str, side: str) -> Tensor:
        features = cast(Tensor, datasets[table][f"{side}_features"][:])
        return features.reshape(-1, len(weight)) @ weight  # of no pair, it is (0,)

    return Fit(history, steps, scores_of)


def fit_whole(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    columns: dict[str, dict[str, list]],
    params: Params,
    seed: int,
    precision: str,
    checkpoints: Checkpoints,
    root: Path,
) -> Fit:
    """Trains head and backbone and writes models/reward; what is written there gives the scores."""
    names = [f"{side}_ids" for side in SIDES]
    fitted, heldout = (
        Dataset.from_dict({name: [ids for table in tables for ids in columns[table][name]] for name in names})
        for tables in (fitted_tables(params), ["heldout"])
    )
    start, folder = root / "models/base", root / "models/reward"

    def prepared(model: PreTrainedModel) -> nn.Module:
        with_fp32_head(model)
        return add_adapters(model, params.lora, precision, task="SEQ_CLS") if params.backbone == "lora" else model

    def begin_again() -> None:
        again = with_fresh_head(start, tokenizer, seed, model.device)
        prepared(again)
        model.load_state_dict(again.state_dict())
        model.zero_grad()

    trained = prepared(model)
    dial = memory_dial(params.micro_batch_tokens, 4096, model, "train_reward", training=True)
    work = trained, tokenizer, fitted, heldout, params, seed, precision, checkpoints
    history, steps = dial.run(train_backbone, *work, undo=begin_again)
    if params.backbone == "lora":
        fresh = partial(new_reward_model, pad_token_id=cast(int, tokenizer.pad_token_id))
        save_adapted(cast("PeftModel", trained), model.state_dict(), start, tokenizer, folder, fresh)
    else:
        save_model(model, tokenizer, folder)
    written = load_reward_model(folder, model.device)
    dial = memory_dial(params.micro_batch_tokens, 4096, written, "train_reward")

    def scores_of(table: str, side: str) -> Tensor:
        return torch.tensor(dial.run(score_sequences, written, columns[table][f"{side}_ids"], precision=precision))

    return Fit(history, steps, scores_of)


def fitted_tables(params: Params) -> list[str]:
    """Which tables the reward model is trained on, a table as often as it counts."""
    return ["train"] * PAIR_REPEATS + [CORRUPTED + "train"] if params.hard_negatives else ["train"]


def main(base: Base, params: Params, root: Path = Path(".")) -> dict:
    device = pick_device()
    precision = pick_precision(base.precision, device)
    columns = {
        split: read_parquet(root / f"data/tokenized/reward_{split}.parquet") for split in ("train", "heldout")
    }
    for split in ("train", "heldout") if params.hard_negatives else ("heldout",):
        columns[CORRUPTED + split] = read_parquet(root / f"data/tokenized/reward_negatives_{split}.parquet")
    tokenizer = load_tokenizer(root / "models/base")

    # 1. The base with a fresh head
    model = with_fresh_head(root / "models/base", tokenizer, base.seed, device)

    with Checkpoints("train_reward", root, base, params) as checkpoints:
        # 2. The pairs, or they and every corrupted copy of their chosen answers, are learnt
        fit_model = fit_on_features if params.backbone == "frozen" else fit_whole
        fit = fit_model(model, tokenizer, columns, params, base.seed, precision, checkpoints, root)

        # 3. Held-out scores and reports
        chosen_scores, rejected_scores = (fit.scores_of("heldout", side) for side in SIDES)
        better, worse = (fit.scores_of(CORRUPTED + "heldout", side) for side in SIDES)
        metrics = {
            "train_pairs": len(columns["train"]["row"]),
            "hard_negatives": len(columns[CORRUPTED + "train"]["row"]) if params.hard_negatives else 0,
            "heldout_pairs": len(columns["heldout"]["row"]),
            "steps": fit.steps,
            "by_kind": shares_by_kind(better, worse, columns[CORRUPTED + "heldout"]["kind"]),
            "heldout": heldout_figures(chosen_scores, rejected_scores),
        }
        scores = zip(
            columns["heldout"]["row"],
            columns["heldout"]["prompt_id"],
            chosen_scores.tolist(),
            rejected_scores.tolist(),
            strict=True,
        )
        names = ("row", "prompt_id", "chosen_score", "rejected_score")
        reports = root / "reports/train_reward"
        write_history(reports / "history.csv", round_floats(fit.history, 8))
        write_history(
            reports / "heldout_scores.csv", round_floats([dict(zip(names, row, strict=True)) for row in scores], 8)
        )
        write_json(reports / "metrics.json", round_floats(metrics))
        print(
            f"wrote models/reward and {reports}: held-out accuracy {metrics['heldout']['accuracy']:.3f}, "
            f"score gap {metrics['heldout']['margin']:.2f} over {metrics['heldout_pairs']} pairs"
        )
        for line in told_by_kind("reward model", metrics["by_kind"]):
            print(line)
    tokens = sum(
        len(ids) for split in columns.values() for side in ("chosen_ids", "rejected_ids") for ids in split[side]
    )
    return {"tokens": tokens, "device": device.type, "precision": precision}


if __name__ == "__main__":
    run_stage("train_reward", main, Params)
