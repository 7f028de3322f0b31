"""One measured run of this project's reference_logps and train_dpo in a process of its own.

The stages' own `main` runs, on a temporary root. What it calls is wrapped only to read the clock and the dtypes.
"""

import csv
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from bench.worker import PrecisionWatch, answer, now, peak_mb
from stages import reference_logps, train_dpo
from stages.lib.model.loading import pick_device
from stages.lib.run.artefacts import read_parquet, write_parquet
from stages.lib.run.params import Base

PARTS = ("prompt", "chosen", "rejected")


def write_token_tables(root: Path, train: list[dict[str, list[int]]], heldout: list[dict[str, list[int]]]) -> None:
    """What the two stages read beside models/base: rows of {prompt,chosen,rejected}_input_ids."""
    for split, rows in (("train", train), ("heldout", heldout), ("negatives", [])):
        columns: dict[str, Any] = {"row": list(range(1, len(rows) + 1)), "prompt_id": list(range(len(rows)))}
        for name in PARTS:
            columns[f"{name}_input_ids"] = pa.array(
                [row[f"{name}_input_ids"] for row in rows], pa.list_(pa.int32())
            )
        write_parquet(root / f"data/tokenized/pairs_{split}.parquet", columns)


def training_params(**changes: Any) -> train_dpo.Params:
    """DPOConfig's defaults but for the memory dial, with `changes`; neither looks nor corrupted copies."""
    defaults: dict[str, Any] = {
        "loss": "sigmoid", "beta": 0.1, "label_smoothing": 0.0, "sft_coef": 0.0, "learning_rate": 1e-6,
        "schedule": "linear", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": 1.0, "epochs": 1,
        "max_steps": None, "hard_negatives": 0.0, "eval_steps": 0, "look_steps": 0, "look_prompts": 1,
        "response_length": 1, "temperature": 1.0,
    }  # fmt: skip
    return train_dpo.Params(**defaults | changes)


def watch_precision(stage: Any) -> PrecisionWatch:
    """Watches the model that `stage` will load."""
    watch, load = PrecisionWatch(), stage.load_causal_lm
    stage.load_causal_lm = lambda *args: watch.on(load(*args))
    return watch


def measure_reference(spec: dict[str, Any], base: Base, root: Path, device: torch.device) -> dict[str, Any]:
    """Seconds of the reference pass over the training pairs, those of the first batch left out: they warm up."""
    compute, seconds = reference_logps.completion_logps, []
    _, first_batch = next(
        train_dpo.batches_of(spec["num_pairs"], train_dpo.Params(**spec["train_dpo"]), base.seed)
    )

    def timed(model: Any, prompts: list, completions: list, **how: Any) -> Tensor:
        """Two calls of the stage's function in place of one. Rows: all chosen completions, then all rejected."""
        count = len(prompts) // 2
        if count != spec["num_pairs"]:
            return compute(model, prompts, completions, **how)  # the held-out pair
        warm = [i for i in range(2 * count) if i % count in first_batch]
        counted = [i for i in range(2 * count) if i % count not in first_batch]
        logps = torch.empty(2 * count)
        for rows in (warm, counted):
            started = now(device)
            logps[rows] = compute(model, [prompts[i] for i in rows], [completions[i] for i in rows], **how)
            seconds.append(now(device) - started)
        return logps

    reference_logps.completion_logps = timed
    watch = watch_precision(reference_logps)
    reference_logps.main(
        base, reference_logps.Params(micro_batch_tokens=spec["reference_micro_batch_tokens"]), root
    )
    return {"reference_seconds": seconds[1], "precision": watch.seen(), "peak_memory_mb": peak_mb(device)}


def measure_training(spec: dict[str, Any], base: Base, root: Path, device: torch.device) -> dict[str, Any]:
    """Seconds from the start of the second optimizer step to the end of the last, their tokens, all losses."""
    run_batch, marks = train_dpo.run_batch, []

    def marked(*args: Any, **how: Any) -> dict[str, float]:
        marks.append((torch.is_grad_enabled(), now(device), peak_mb(device)))
        return run_batch(*args, **how)

    train_dpo.run_batch = marked
    watch = watch_precision(train_dpo)
    params = train_dpo.Params(**spec["train_dpo"])
    train_dpo.main(base, params, root)
    # an evaluation, the steps, an evaluation: peak memory is read where TRL's is, after the last step
    assert [train for train, *_ in marks] == [False] + [True] * (len(marks) - 2) + [False]
    _, started, _ = marks[2]
    _, ended, peak = marks[-1]
    columns = read_parquet(root / "data/tokenized/pairs_train.parquet")
    order = [i for _, index in train_dpo.batches_of(spec["num_pairs"], params, base.seed) for i in index]
    tokens = sum(
        len(columns[f"{part}_input_ids"][i]) for i in order[params.batch_size :] for part in ("prompt", *PARTS)
    )
    with open(root / "reports/train_dpo/history.csv") as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    return {
        "seconds": ended - started,
        "tokens": tokens,
        "losses": losses,
        "precision": watch.seen(),
        "peak_memory_mb": peak,
        "whole_peak_memory_mb": peak_mb(device),
    }


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs the stages in `spec["stages"]` one after another, as bench_dpo and dpo_growth ask for them."""
    os.environ |= {"DEVICE": spec["device"], "CHECKPOINT_MINUTES": "600"}
    base, root, device = Base(seed=spec["seed"], precision=spec["precision"]), Path(spec["root"]), pick_device()
    stages = {"reference_logps": measure_reference, "train_dpo": measure_training}
    result: dict[str, Any] = {}
    for stage in spec["stages"]:
        result |= stages[stage](spec, base, root, device)
    return result


if __name__ == "__main__":
    answer(measure)
