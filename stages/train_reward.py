"""Train the reward model: a linear head on the frozen base, with TRL's RewardTrainer (Bradley-Terry loss).

Reads   models/base, data/tokenized/reward_{train,heldout}.parquet
Writes  models/reward                             AutoModelForSequenceClassification and tokenizer
        reports/train_reward/history.csv          training and held-out figures, one row per logged step
        reports/train_reward/heldout_scores.csv   both scores of every held-out pair
        reports/train_reward/metrics.json         held-out accuracy and score gap
        reports/train_reward/run.json             seconds, tokens/s, memory, versions

Run     dvc repro train_reward                    (untracked: python -m stages.train_reward)

The backbone never changes, so what the head reads is computed once per text and not once per epoch: the
trainer sees those features, and fits the very head that an ordinary run over tokens would (a test compares).
"""

import math
import tempfile
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer

from stages.lib.model.loading import freeze, load_tokenizer, pick_device, pick_precision, save_model, set_seed
from stages.lib.model.memory import memory_dial
from stages.lib.model.reward import new_reward_model, pooled_features
from stages.lib.run.artefacts import read_parquet, round_floats, write_history, write_json
from stages.lib.run.checkpoints import Checkpoints
from stages.lib.run.params import Base, MicroBatchTokens, Section
from stages.lib.run.stage import run_stage

SIDES = ("chosen", "rejected")
PAIR_REPEATS = 2  # of every pair among its hard negatives, of which each kind stands once
CHUNK = 256  # texts between two chances to save their features
HISTORY = ["loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"]  # TRL 1.16's own names


CORRUPTED = "corrupted "  # before a split's name: the corrupted copies of its chosen answers


class Params(Section):
    learning_rate: float = Field(gt=0)  # of the linear head, decaying linearly to 0
    epochs: int = Field(gt=0)
    batch_size: int = Field(gt=0)  # pairs per optimizer step
    logging_steps: int = Field(gt=0)  # optimizer steps between rows of the history
    hard_negatives: bool  # corrupted copies of chosen answers as further rejected ones
    micro_batch_tokens: MicroBatchTokens  # memory dial: tokens per forward pass of the backbone


class OneDevice(RewardConfig):
    """RewardConfig for one device, however many are visible.

    Without a launcher HF's Trainer wraps the model in DataParallel when it sees several GPUs, which multiplies
    the batch; RewardTrainer refuses to start then (TRL 1.16). Both ask `n_gpu`.
    """

    @property
    def n_gpu(self) -> int:
        return 1


class HeadOnFeatures(PreTrainedModel):
    """A reward model's head, given what its frozen backbone made of each sequence."""

    config_class = PreTrainedConfig

    def __init__(self, score: nn.Linear, tokenizer: PreTrainedTokenizerBase):
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        super().__init__(PreTrainedConfig(num_labels=1, **ids))
        self.score = score

    def forward(self, features: Tensor, **_) -> SequenceClassifierOutput:
        """(B, H) features to (B, 1) scores."""
        return SequenceClassifierOutput(logits=self.score(features))


def collate_features(rows: list[dict]) -> dict[str, Tensor]:
    """Chosen first, then rejected, as RewardTrainer splits them."""
    features = [row["chosen_features"] for row in rows] + [row["rejected_features"] for row in rows]
    tokens = [len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    # RewardTrainer sums the attention mask to count tokens
    return {"features": torch.stack(features), "attention_mask": torch.tensor(tokens)}


def features_of(
    model: PreTrainedModel,
    columns: dict[str, dict[str, list]],
    params: Params,
    precision: str,
    checkpoints: Checkpoints,
) -> dict[str, Dataset]:
    """The pairs of each table with chosen_features and rejected_features (H,) beside their ids.

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
    return datasets


def train_head(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Dataset,
    heldout: Dataset,
    params: Params,
    seed: int,
) -> tuple[list[dict[str, float]], int]:
    """Fits `model.score` in place on the features.

    Returns:
        The history: step, epoch, figures on the training batches since the last row, on held-out pairs (eval_);
        and the number of optimizer steps that the trainer made.

    Raises:
        AssertionError: it made another number of steps than `epochs` over the pairs in `batch_size` take.
    """
    num_steps = params.epochs * math.ceil(len(train) / params.batch_size)
    logging_steps = min(params.logging_steps, num_steps)  # a short run has one row, not none
    with tempfile.TemporaryDirectory() as scratch:  # the trainer saves nothing; we do, without its pickle
        trainer = RewardTrainer(
            model=HeadOnFeatures(model.score, tokenizer),
            args=OneDevice(
                output_dir=scratch,
                learning_rate=params.learning_rate,
                num_train_epochs=params.epochs,
                per_device_train_batch_size=params.batch_size,
                per_device_eval_batch_size=len(heldout),  # one batch, so that its mean is over pairs
                logging_steps=logging_steps,
                eval_strategy="steps",
                eval_steps=logging_steps,
                seed=seed,
                max_length=None,  # tokenize_pairs cuts; RewardTrainer would drop long pairs without a word
                disable_dropout=True,
                bf16=False,  # the head is one small product: fp32. The backbone ran in base.precision
                activation_checkpointing=False,
                disable_tqdm=True,  # seconds of work
                remove_unused_columns=False,
                save_strategy="no",
                report_to="none",
                use_cpu=model.device.type == "cpu",
            ),
            data_collator=collate_features,
            train_dataset=train,
            eval_dataset=heldout,
            processing_class=tokenizer,
        )
        assert len(trainer.train_dataset) == len(train) and len(trainer.eval_dataset) == len(heldout)
        trainer.remove_callback(PrinterCallback)  # history.csv has it
        trainer.train()
    assert trainer.state.global_step == num_steps, f"{trainer.state.global_step} steps instead of {num_steps}"
    return history_of(trainer.state.log_history), trainer.state.global_step


def history_of(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """One row per logged step out of the trainer's separate training and evaluation entries."""
    heldout = {entry["step"]: entry for entry in log if "eval_loss" in entry}
    history = []
    for entry in log:
        if "loss" in entry:
            row = {name: entry[name] for name in ("step", "epoch", *HISTORY, "grad_norm", "learning_rate")}
            row |= {f"eval_{name}": heldout[entry["step"]][f"eval_{name}"] for name in HISTORY}
            history.append(row)
    return history


@torch.no_grad()
def heldout_figures(chosen_scores: Tensor, rejected_scores: Tensor) -> dict[str, float]:
    """Means over held-out pairs; a tie counts as wrong."""
    margins = chosen_scores - rejected_scores
    return {
        "accuracy": (margins > 0).float().mean().item(),
        "margin": margins.mean().item(),
        "chosen_score": chosen_scores.mean().item(),
        "rejected_score": rejected_scores.mean().item(),
        "loss": -nn.functional.logsigmoid(margins).mean().item(),
    }


def main(base: Base, params: Params, root: Path = Path(".")) -> dict:
    device = pick_device()
    precision = pick_precision(base.precision, device)
    columns = {
        split: read_parquet(root / f"data/tokenized/reward_{split}.parquet") for split in ("train", "heldout")
    }
    for split in ("train", "heldout") if params.hard_negatives else ("heldout",):
        columns[CORRUPTED + split] = read_parquet(root / f"data/tokenized/reward_negatives_{split}.parquet")
    tokenizer = load_tokenizer(root / "models/base")

    # 1. The base with a fresh head; all but the head frozen
    set_seed(base.seed)
    model = freeze(new_reward_model(root / "models/base", tokenizer.pad_token_id)).to(device)
    model.score.requires_grad_(True)

    with Checkpoints("train_reward", root, base, params) as checkpoints:
        # 2. What the head will read, once
        datasets = features_of(model, columns, params, precision, checkpoints)
        train, heldout = datasets["train"], datasets["heldout"]

        # 3. The head, on the pairs, or on them and every corrupted copy of their chosen answers
        fitted = train
        if params.hard_negatives:
            columns_of_both = ["chosen_ids", "rejected_ids", "chosen_features", "rejected_features"]
            parts = [train] * PAIR_REPEATS + [datasets[CORRUPTED + "train"]]
            fitted = concatenate_datasets([part.select_columns(columns_of_both) for part in parts])
        history, steps = train_head(model, tokenizer, fitted, heldout, params, base.seed)

        # 4. Held-out scores and reports
        weight = model.score.weight.detach().cpu().squeeze(0)
        chosen_scores = heldout["chosen_features"][:] @ weight
        rejected_scores = heldout["rejected_features"][:] @ weight
        corrupted = datasets[CORRUPTED + "heldout"]
        resisted = corrupted["chosen_features"][:] @ weight > corrupted["rejected_features"][:] @ weight
        kinds = columns[CORRUPTED + "heldout"]["kind"]
        metrics = {
            "train_pairs": len(train),
            "hard_negatives": len(datasets[CORRUPTED + "train"]) if params.hard_negatives else 0,
            "heldout_pairs": len(heldout),
            "steps": steps,
            "by_kind": {
                kind: resisted[[each == kind for each in kinds]].float().mean().item()
                for kind in dict.fromkeys(kinds)
            },
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
        save_model(model, tokenizer, root / "models/reward")
        write_history(reports / "history.csv", round_floats(history, 8))
        write_history(
            reports / "heldout_scores.csv", round_floats([dict(zip(names, row, strict=True)) for row in scores], 8)
        )
        write_json(reports / "metrics.json", round_floats(metrics))
        print(
            f"wrote models/reward and {reports}: held-out accuracy {metrics['heldout']['accuracy']:.3f}, "
            f"score gap {metrics['heldout']['margin']:.2f} over {len(heldout)} pairs"
        )
        for kind, accuracy in metrics["by_kind"].items():
            if accuracy < 0.5:
                print(
                    f"warning: the reward model prefers the worse side of the held-out pairs made by '{kind}' in "
                    f"{1 - accuracy:.0%} of cases, and PPO will be paid for it"
                )
    tokens = sum(
        len(ids) for split in columns.values() for side in ("chosen_ids", "rejected_ids") for ids in split[side]
    )
    return {"tokens": tokens, "device": device.type, "precision": precision}


if __name__ == "__main__":
    run_stage("train_reward", main, Params)
