"""Train the policy with DPO (arXiv:2305.18290) against the frozen base.

Reads   models/base, data/tokenized/pairs_{train,heldout,negatives}.parquet, data/reference_logps
        data/tokenized/prompts_judge.parquet    looked at during training, and never trained on
Writes  models/dpo                          policy weights and tokenizer; with lora.rank also adapter/, merged into them
        data/courses/dpo.parquet            the answers to the judge's prompts at every look
        data/dpo_pairs.parquet              rows of the training pairs that it was trained on, corrupted copies apart
        reports/train_dpo/history.csv       one row per optimizer step
        reports/train_dpo/heldout.csv       one row per evaluation on held-out pairs
        reports/train_dpo/metrics.json      held-out numbers after the last step, and how many pairs were met
        reports/train_dpo/run.json          seconds, tokens/s, memory, versions

Run     dvc repro train_dpo                 (untracked: python -m stages.train_dpo)
        LAUNCH="torchrun --nproc_per_node 4" dvc repro train_dpo    the same result but for rounding
"""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Self, cast

import torch
from accelerate import DistributedType
from pydantic import Field, model_validator
from torch import Tensor
from tqdm import tqdm

from stages.lib.data.reference import other_precision, read_reference_logps
from stages.lib.model.adapters import (
    FULL,
    Lora,
    adapters_learn,
    adapters_off,
    add_adapters,
    save_adapted,
)
from stages.lib.model.attention import use_packed_attention
from stages.lib.model.loading import (
    load_causal_lm,
    load_tokenizer,
    make_accelerator,
    pick_device,
    pick_precision,
    save_model,
    set_seed,
)
from stages.lib.model.logps import CompletionLogps, TokenLogps
from stages.lib.model.memory import memory_dial, reading_dial
from stages.lib.model.packing import shares_prefixes
from stages.lib.model.ranked_right import ranked_right
from stages.lib.rl.dpo import dpo_losses, implicit_rewards, ipo_losses, sft_losses
from stages.lib.rl.learner import Learner, NotFinite
from stages.lib.rl.looks import Course, babbles, habits
from stages.lib.rl.rollout import Actor
from stages.lib.run.artefacts import read_parquet, round_floats, write_history, write_json, write_parquet
from stages.lib.run.checkpoints import Checkpoints
from stages.lib.run.draws import draw, seed_of
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, MicroBatchTokens, Section
from stages.lib.run.stage import run_stage
from stages.lib.run.tracking import tracked


class Params(Section):
    loss: Literal["sigmoid", "ipo"]  # DPO, or IPO
    beta: float = Field(gt=0)  # implicit-reward temperature
    label_smoothing: float = Field(ge=0, lt=0.5)  # cDPO: assumed share of flipped preferences
    sft_coef: float = Field(ge=0)  # weight of the SFT term on chosen completions
    learning_rate: float = Field(gt=0)  # peak, after warm-up
    schedule: Literal["constant", "linear", "cosine"]  # after warm-up
    warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)  # decoupled
    max_grad_norm: float | None = Field(gt=0)  # clipping, or none
    epochs: int = Field(gt=0)
    max_steps: int | None = Field(gt=0)  # optimizer steps at most; the schedule ends there
    hard_negatives: float = Field(ge=0, le=1)  # share of training pairs with a corrupted copy as a further pair
    batch_size: int = Field(gt=0)  # pairs per optimizer step, over all processes
    eval_steps: int = Field(ge=0)  # held-out evaluation every so many steps; 0: only after the last
    look_steps: int = Field(ge=0)  # steps between looks at sampled answers; 0: none
    look_prompts: int = Field(gt=0)  # judge prompts answered at every look
    response_length: int = Field(gt=0)  # tokens of these answers, at most
    temperature: float = Field(gt=0)  # of sampling them
    micro_batch_tokens: MicroBatchTokens  # memory dial: tokens per forward and backward pass
    lora: Lora = FULL  # adapters in place of full fine-tuning

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("label_smoothing belongs to the sigmoid loss")
        return self


class Pairs:
    """Tokenized pairs with their reference log-probs, row i of one being row i of the other."""

    def __init__(self, root: Path, split: str, shared_prompts: bool):
        columns = read_parquet(root / f"data/tokenized/pairs_{split}.parquet")
        reference = read_reference_logps(root, split)
        if reference["row"] != columns["row"]:
            raise UserError(f"data/reference_logps: other rows than data/tokenized/pairs_{split}.parquet")
        self.rows: list[int] = columns["row"]
        self.prompts: list[list[int]] = columns["prompt_input_ids"]
        self.chosen: list[list[int]] = columns["chosen_input_ids"]
        self.rejected: list[list[int]] = columns["rejected_input_ids"]
        self.ref_chosen_logps = torch.tensor(reference["chosen_logps"])
        self.ref_rejected_logps = torch.tensor(reference["rejected_logps"])
        self.chosen_lengths = torch.tensor([len(ids) for ids in self.chosen])
        self.rejected_lengths = torch.tensor([len(ids) for ids in self.rejected])
        #: tokens that each pair puts through the model: its prompt once or twice, and both completions
        prompts = 1 if shared_prompts else 2
        self.lengths = [
            prompts * len(p) + len(c) + len(r)
            for p, c, r in zip(self.prompts, self.chosen, self.rejected, strict=True)
        ]

    def extend(self, other: "Pairs", index: list[int]) -> None:
        """Appends the pairs of `other` at `index`."""
        for name in ("rows", "prompts", "chosen", "rejected", "lengths"):
            getattr(self, name).extend(getattr(other, name)[i] for i in index)
        for name in ("ref_chosen_logps", "ref_rejected_logps", "chosen_lengths", "rejected_lengths"):
            setattr(self, name, torch.cat([getattr(self, name), getattr(other, name)[index]]))

    def __len__(self) -> int:
        return len(self.rows)


def batches_of(num_pairs: int, params: Params, seed: int) -> Iterator[tuple[float, list[int]]]:
    """(epoch after the batch, pair indices) per optimizer step: each epoch a fresh random order from the seed, which
    is itself that of the first.

    The last batch of an epoch may be smaller; no pair is left out, unless `max_steps` ends the epoch early.
    """

    def whole_epochs() -> Iterator[tuple[float, list[int]]]:
        for epoch in range(params.epochs):
            generator = torch.Generator().manual_seed(
                seed_of(seed, f"dpo_pairs of epoch {epoch}") if epoch else seed
            )
            order = torch.randperm(num_pairs, generator=generator).tolist()
            for start in range(0, num_pairs, params.batch_size):
                end = min(start + params.batch_size, num_pairs)
                yield epoch + end / num_pairs, order[start:end]

    return islice(whole_epochs(), params.max_steps)


def losses_and_metrics(
    params: Params, pairs: Pairs, index: list[int], chosen_logps: Tensor, rejected_logps: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """(B,) losses with gradient, and (B,) of each metric without, for the pairs at `index`."""
    device = chosen_logps.device
    ref_chosen_logps = pairs.ref_chosen_logps[index].to(device)
    ref_rejected_logps = pairs.ref_rejected_logps[index].to(device)
    chosen_lengths = pairs.chosen_lengths[index].to(device)
    rejected_lengths = pairs.rejected_lengths[index].to(device)

    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    if params.loss == "sigmoid":
        losses = dpo_losses(*logps, params.beta, params.label_smoothing)
    else:
        lengths = (chosen_lengths, rejected_lengths) * 2
        losses = ipo_losses(*(x / n for x, n in zip(logps, lengths, strict=True)), beta=params.beta)
    if params.sft_coef:
        losses = losses + params.sft_coef * sft_losses(chosen_logps, chosen_lengths)

    chosen_rewards, rejected_rewards = implicit_rewards(*(x.detach() for x in logps), beta=params.beta)
    metrics = {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/accuracies": ranked_right(chosen_rewards, rejected_rewards),
        "logps/chosen": chosen_logps.detach(),
        "logps/rejected": rejected_logps.detach(),
    }
    return losses, metrics


def run_batch(
    learner: Learner, params: Params, pairs: Pairs, index: list[int], micro_batch_tokens: int
) -> dict[str, float]:
    """Log-probs, losses and, where gradients are on, those of the mean loss over the pairs at `index`.

    Returns:
        Means over `index` of every metric, the same on all processes.
    """
    prompts, chosen, rejected = ([of[i] for i in index] for of in (pairs.prompts, pairs.chosen, pairs.rejected))
    lengths = [pairs.lengths[i] for i in index]

    def losses_of(part: list[int], logps: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return losses_and_metrics(params, pairs, [index[i] for i in part], *logps.chunk(2))

    texts = [prompts, prompts], [chosen, rejected]
    return learner.mean_gradient(*texts, lengths, losses_of, len(index), micro_batch_tokens)


def main(base: Base, params: Params, root: Path = Path(".")) -> dict:
    device = pick_device()
    precision = pick_precision(base.precision, device)
    accelerator = make_accelerator(device, precision)
    if params.lora.rank and accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            "adapters are trained beside a whole base in every process: LAUNCH it with torchrun, not FSDP"
        )
    set_seed(base.seed)
    if (warning := other_precision(root, precision)) and accelerator.is_main_process:
        print(f"train_dpo: warning: {warning}")

    tokenizer = load_tokenizer(root / "models/base")
    train, heldout = (Pairs(root, split, shares_prefixes(accelerator.device)) for split in ("train", "heldout"))
    train_pairs = len(train)
    if params.hard_negatives:
        negatives = Pairs(root, "negatives", shares_prefixes(accelerator.device))
        count = round(params.hard_negatives * len(negatives))
        train.extend(negatives, draw(len(negatives), count, base.seed, "hard_negatives"))
    model = load_causal_lm(root / "models/base", accelerator.device)
    policy, answering = CompletionLogps(model), TokenLogps(model, params.temperature)
    adapted = add_adapters(model, params.lora, precision) if params.lora.rank else None
    sharded = accelerator.distributed_type == DistributedType.FSDP
    parts = accelerator.num_processes if sharded else 1
    on_cpu = 1024 if adapted else 1536  # beside frozen weights, what a pass keeps is most of the memory
    dial = memory_dial(params.micro_batch_tokens, on_cpu, model, "train_dpo", training=True, parts=parts)
    reading = memory_dial(reading_dial(params.micro_batch_tokens), 4096, model, "train_dpo")
    batches = list(batches_of(len(train), params, base.seed))
    num_steps = len(batches)
    trained_on = {i for _, index in batches for i in index}
    met = sorted(train.rows[i] for i in trained_on if i < train_pairs)
    counts = {"train_pairs": train_pairs, "pairs_met": len(met), "hard_negatives": len(train) - train_pairs}
    counts |= {"hard_negatives_met": len(trained_on) - len(met), "heldout_pairs": len(heldout)}
    schedule = params.schedule, params.warmup_steps, num_steps
    how = params.learning_rate, schedule, params.max_grad_norm, params.weight_decay
    learner = Learner(policy, accelerator, dial, *how)

    actor = None  # sharded, each process holds a part of the model, which cannot sample
    look_prompts: dict[int, list[int]] = {}
    if params.look_steps and not sharded:
        judged = read_parquet(root / "data/tokenized/prompts_judge.parquet")
        drawn = draw(len(judged["prompt_id"]), params.look_prompts, base.seed, "look_prompts")
        look_prompts = {judged["prompt_id"][i]: judged["input_ids"][i] for i in drawn}
        length = params.response_length
        actor = Actor(answering, tokenizer, accelerator, precision, length, reading, return_freed=True)
    with Checkpoints("train_dpo", root, base, params, sharded) as checkpoints:
        saved = checkpoints.load(learner=learner, scaler=accelerator.scaler)
        history: list[dict[str, Any]] = saved.get("history", [])
        course = Course(list(look_prompts), saved.get("course", {}))
        looks: list[dict[str, float]] = saved.get("looks", [])
        evaluations: list[dict[str, float]] = saved.get("evaluations", [])
        done = len(history)

        def batch(pairs: Pairs, index: list[int], train: bool) -> dict[str, float]:
            with adapters_learn(model) if train else torch.no_grad(), use_packed_attention(model):
                undo = learner.optimizer.zero_grad
                return dial.run(run_batch, learner, params, pairs, index, undo=undo)

        def evaluate(step: int) -> None:
            metrics = batch(heldout, list(range(len(heldout))), train=False)
            evaluations.append({"step": step, **metrics})

        def look(step: int, actor: Actor) -> None:
            """What the policy now answers to a few of the judge's prompts."""
            answered = actor.roll_out(list(look_prompts.values()), seed_of(base.seed, "looks"))
            rollout = answered.gathered(accelerator)
            course.add(step, sum(len(index) for _, index in batches[:step]), rollout)
            looks.append(habits(rollout.responses, tokenizer))
            if (warning := babbles(looks[-1], looks[0])) and accelerator.is_main_process:
                tqdm.write(f"train_dpo: warning: step {step}: the policy {warning}")

        with tracked("train_dpo", params) as log:
            if not evaluations:
                evaluate(0)
                if actor:
                    look(0, actor)
            hidden = not accelerator.is_main_process
            bar = tqdm(batches[done:], "train_dpo", num_steps, initial=done, unit="step", disable=hidden)
            for step, (epoch, index) in enumerate(bar, start=done + 1):
                rows, skipped = [train.rows[i] for i in index], 0
                while True:
                    # 1. Log-probs of both completions, loss and gradients, summed over micro-batches
                    metrics = batch(train, index, train=True)
                    if not math.isfinite(metrics["loss"]):
                        raise non_finite(root, step, rows, "loss", metrics)
                    # 2. One optimizer step on the mean gradient of the batch
                    try:
                        grad_norm, overflowed = learner.step()
                    except NotFinite as error:
                        found = metrics | {"gradient's norm": error.norm}
                        raise non_finite(root, step, rows, "gradient's norm", found) from error
                    if not overflowed:
                        break
                    skipped += 1  # by fp16, whose scale is halved now: the batch again
                learning_rate = learner.next_learning_rate()
                # 3. What happened
                history.append(
                    {
                        "step": step,
                        "epoch": epoch,
                        **metrics,
                        "grad_norm": grad_norm,
                        "learning_rate": learning_rate,
                        "skipped": skipped,
                    }
                )
                seen = {}
                if actor:
                    if step == num_steps or step % params.look_steps == 0:
                        look(step, actor)
                    history[-1] |= looks[-1]  # of the last look, which is not of every step
                    seen = {name: f"{looks[-1][name]:.2f}" for name in ("rep_4", "ended")}
                log(history[-1])
                seen |= {"loss": f"{metrics['loss']:.3f}", "margin": f"{metrics['rewards/margins']:.2f}"}
                bar.set_postfix(seen)
                if step == num_steps or (params.eval_steps and step % params.eval_steps == 0):
                    evaluate(step)
                checkpoints.save_if_due(
                    history=history, evaluations=evaluations, course=course.columns, looks=looks
                )

        # FSDP: of all processes' parts
        joined = cast(dict[str, Tensor], accelerator.get_state_dict(learner.module))
        if accelerator.is_main_process:
            weights = {name.removeprefix("model."): weight for name, weight in joined.items()}
            if adapted:
                save_adapted(adapted, weights, root / "models/base", tokenizer, root / "models/dpo")
            else:
                save_model(model, tokenizer, root / "models/dpo", weights)
            if actor:
                if not adapted:  # saved as it is, the model may be the base again
                    model.load_state_dict(load_causal_lm(root / "models/base").state_dict())
                with adapters_off(model):
                    course.compare_with(answering, list(look_prompts.values()), precision, reading)
            course.write(root / "data/courses/dpo.parquet")
            write_parquet(root / "data/dpo_pairs.parquet", {"row": met})
            write_reports(root, history, evaluations, counts)

    trained = sum(train.lengths[i] for _, index in batches for i in index)
    tokens = trained + len(evaluations) * sum(heldout.lengths)
    return {
        "tokens": tokens,
        "device": device.type,
        "processes": accelerator.num_processes,
        "precision": precision,
    }


def write_reports(root: Path, history: list[dict], evaluations: list[dict], counts: dict[str, int]) -> None:
    reports = root / "reports/train_dpo"
    write_history(reports / "history.csv", round_floats(history, 8))
    write_history(reports / "heldout.csv", round_floats(evaluations, 8))
    metrics = {
        **counts,
        "steps": len(history),
        "skipped": sum(row["skipped"] for row in history),
        "heldout": {name: value for name, value in evaluations[-1].items() if name != "step"},
        "step_0_loss": history[0]["loss"],
    }
    write_json(reports / "metrics.json", round_floats(metrics))
    print(f"wrote models/dpo and {reports}: held-out accuracy {metrics['heldout']['rewards/accuracies']:.3f}")


def non_finite(root: Path, step: int, rows: list[int], what: str, metrics: dict[str, float]) -> UserError:
    """The error that ends the run; what is needed to look at it is in checkpoints/train_dpo/non_finite.json."""
    path = root / "checkpoints/train_dpo/non_finite.json"
    write_json(path, {"step": step, "rows": rows, "metrics": {k: repr(v) for k, v in metrics.items()}})
    return UserError(
        f"step {step}: the {what} is {metrics[what]}; pairs of rows {rows}; see {path}. "
        "Lower train_dpo.learning_rate or set train_dpo.max_grad_norm, or try base.precision=fp32"
    )


if __name__ == "__main__":
    run_stage("train_dpo", main, Params)
