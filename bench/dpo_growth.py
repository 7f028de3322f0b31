"""How the cost of train_dpo grows: time with tokens, memory with batch size, length and vocabulary.

A model of SmolLM2's shape with few layers, random weights and random tokens; every point in a fresh process.
"""

import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from bench.dpo_ours import training_params, write_token_tables
from bench.measure import in_fresh_process
from bench.random_base import smollm2_135m, write_random_base

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WIDE = {"num_hidden_layers": 2, "vocab_size": 8192}  # the real width
MICRO_BATCH_TOKENS = 2048
PROMPT = 16  # tokens


def random_pairs(count: int, length: int, vocab_size: int) -> list[dict[str, list[int]]]:
    """Pairs of which each completion with its prompt has `length` tokens."""
    draw = np.random.default_rng(0)
    lengths = {"prompt": PROMPT, "chosen": length - PROMPT, "rejected": length - PROMPT}
    return [
        {f"{part}_input_ids": draw.integers(3, vocab_size, n).tolist() for part, n in lengths.items()}
        for _ in range(count)
    ]


def measure_point(
    device: str, sizes: dict[str, int], batch_size: int, length: int, steps: int, rank: int | None = None
) -> dict[str, Any]:
    """Seconds per step and peak memory of `steps` steps after one to warm up; of adapters, if they have a rank."""
    config = smollm2_135m(**sizes)
    params = training_params(
        schedule="constant",
        max_grad_norm=None,
        batch_size=batch_size,
        micro_batch_tokens=MICRO_BATCH_TOKENS,
        lora={"rank": rank, "alpha": 32.0, "dropout": 0.0, "targets": "all-linear"},
    )
    with tempfile.TemporaryDirectory() as folder:
        pairs = random_pairs((steps + 1) * batch_size, length, config.vocab_size)
        write_random_base(Path(folder) / "models/base", config, ["a b"])
        write_token_tables(Path(folder), pairs, pairs[:1])
        spec = {
            "root": folder,
            "device": device,
            "precision": "bf16" if device == "cuda" else "auto",
            "seed": 42,
            "num_pairs": len(pairs),
            "stages": ["reference_logps", "train_dpo"],
            "reference_micro_batch_tokens": MICRO_BATCH_TOKENS,
            "train_dpo": params.model_dump(),
        }
        run = in_fresh_process("bench.dpo_ours", spec)
        weights = sum(file.stat().st_size for file in Path(folder).glob("models/base/*.safetensors"))
    return {
        "batch_size": batch_size,
        "length": length,
        "vocabulary": config.vocab_size,
        "tokens_per_step": 2 * batch_size * length,
        "seconds_per_step": run["seconds"] / steps,
        "reference_seconds": run["reference_seconds"] / steps,
        "peak_memory_mb": run["peak_memory_mb"],
        "state_mb": 4 * weights / 1e6,  # weights, gradients and AdamW's two moments, fp32
        "full_logits_mb": 2 * batch_size * length * config.vocab_size * 4 / 1e6,  # what is never made
    }


def exponent(x: list[float], y: list[float]) -> float:
    """p of the power law y = c x^p through the points: 1 is linear."""
    return float(np.polyfit([math.log(v) for v in x], [math.log(v) for v in y], 1)[0])


def measure_growth(device: str, quick: bool = False) -> dict[str, Any]:
    """Every curve as a list of points, the exponent of time over tokens, and how much memory moves along each."""

    def curve(
        sizes: dict[str, int], name: str, values: list[int], steps: int, **fixed: int
    ) -> list[dict[str, Any]]:
        points = []
        for value in values[:2] if quick else values:
            at = {"batch_size": 8, "length": 128} | fixed | {name: value}
            widths = sizes | ({"vocab_size": at.pop("vocabulary")} if "vocabulary" in at else {})
            points.append(measure_point(device, widths, **at, steps=steps))
            print(
                f"{name} {value}: {points[-1]['seconds_per_step']:.3f} s a step, "
                f"{points[-1]['peak_memory_mb']:.0f} MB, of them {points[-1]['state_mb']:.0f} MB state",
                flush=True,
            )
        return points

    small = TINY | {"vocab_size": 8192}
    curves = {
        "time_over_tokens": curve(WIDE, "batch_size", [8, 16, 32, 64], steps=2),
        "memory_over_batch_size": curve(small, "batch_size", [16, 64, 256], steps=1),
        "memory_over_length": curve(small, "length", [128, 256, 512, 1024], steps=1),
        "memory_over_vocabulary": curve(TINY, "vocabulary", [8192, 49152, 262144], steps=1, batch_size=16),
    }
    time = curves["time_over_tokens"]
    result: dict[str, Any] = {
        "micro_batch_tokens": MICRO_BATCH_TOKENS,
        "time_exponent": exponent([p["tokens_per_step"] for p in time], [p["seconds_per_step"] for p in time]),
    }
    for name in ("memory_over_batch_size", "memory_over_length", "memory_over_vocabulary"):
        beyond_state = [p["peak_memory_mb"] - p["state_mb"] for p in curves[name]]
        result[f"{name}_spread_mb"] = max(beyond_state) - min(beyond_state)
    return result | curves


def draw_growth(growth: dict[str, Any], path: Path) -> None:
    """Four small charts: seconds a step over tokens, peak memory over batch size, length and vocabulary."""
    axes_of = {
        "time_over_tokens": ("tokens_per_step", "tokens per step"),
        "memory_over_batch_size": ("batch_size", "pairs per step"),
        "memory_over_length": ("length", "tokens per sequence"),
        "memory_over_vocabulary": ("vocabulary", "vocabulary"),
    }
    figure = Figure(figsize=(13, 3), layout="constrained")
    all_axes = figure.subplots(1, 4)
    for axes, (name, (key, label)) in zip(all_axes, axes_of.items(), strict=True):
        points = growth[name]
        x = [point[key] for point in points]
        if name == "time_over_tokens":
            axes.plot(x, [point["seconds_per_step"] for point in points], "o-", label="seconds per step")
        else:
            axes.plot(x, [point["peak_memory_mb"] / 1e3 for point in points], "o-", label="peak memory, GB")
            axes.plot(x, [point["full_logits_mb"] / 1e3 for point in points], "x:", label="full logits alone, GB")
            axes.set_xscale("log", base=2)
        axes.set(xlabel=label, ylim=(0, None))
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})
