"""Decoding: tokens a second of `generate` against transformers' own, and against what the machine allows.

Both sample at temperature 0.7 from bfloat16 weights (where the machine has it) and never end, so that both make the
same number of tokens. Ours looks up one uniform number a token, as in the stages; theirs calls torch.multinomial.

weights_limit   tokens/s if a step took as long as reading every weight once
products_limit  tokens/s if it took as long as its matrix products alone, at that number of rows

Reads   models/base (or --base), data/pairs_embedded.jsonl for the prompts
Writes  bench/results/generate_<device>.json

Run     make bench-generate                     (python -m bench.bench_generate --device cpu)
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.measure import REPO, circumstances, in_fresh_process, linear_shapes, matmul_limit
from bench.worker import now
from stages.lib.model.loading import DTYPES, pick_precision
from stages.lib.run.artefacts import round_floats, write_json

SIDES = ("ours", "transformers")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--base", type=Path, default=REPO / "models/base", help="a model folder as fetch_base leaves it"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64], help="answers in a batch")
    parser.add_argument("--tokens", type=int, default=96, help="of every answer")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, alternating")
    parser.add_argument("--output", type=Path, help="default: bench/results/generate_<device>.json")
    return parser.parse_args(arguments)


def reading_seconds(weights: int, device: torch.device, repeats: int = 5) -> float:
    """The least time in which `weights` bytes, more than any cache holds, were read once."""
    memory = torch.ones(weights // 8, dtype=torch.int64, device=device)
    best = float("inf")
    for _ in range(repeats):
        started = now(device)
        memory.sum().item()
        best = min(best, now(device) - started)
    return best


def limits_of(base: Path, rows: list[int], precision: str, device: torch.device) -> dict[str, Any]:
    """Tokens/s by weights and by products, for each number of rows."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    dtype, shapes = DTYPES[precision], linear_shapes(model)
    reading = reading_seconds(sum(p.numel() for p in model.parameters()) * dtype.itemsize, device)
    flops = 2.0 * sum(inputs * outputs * n for (inputs, outputs), n in shapes.items())
    products = {count: matmul_limit(shapes, count, dtype, device) / flops for count in rows}
    return {"weights_limit": {count: count / reading for count in rows}, "products_limit": products}


def summary_of(runs: dict[str, list[dict[str, Any]]], rows: list[int], tokens: int) -> dict[str, Any]:
    """Medians over rounds: tokens/s of both sides by rows, and their ratio with the ends of its rounds."""
    rates = {
        side: {count: [count * tokens / run["seconds"][str(count)] for run in of_side] for count in rows}
        for side, of_side in runs.items()
    }
    medians = {side: {n: statistics.median(rates[side][n]) for n in rows} for side in SIDES}
    ours, theirs = (rates[side] for side in SIDES)
    return {
        "tokens_per_second": medians,
        "speedup": {n: medians["ours"][n] / medians["transformers"][n] for n in rows},
        "speedup_low": {n: min(ours[n]) / max(theirs[n]) for n in rows},
        "speedup_high": {n: max(ours[n]) / min(theirs[n]) for n in rows},
        "peak_memory_mb": {side: max(run["peak_memory_mb"] for run in runs[side]) for side in SIDES},
        "busy_elsewhere": max(run["busy_elsewhere"] for of_side in runs.values() for run in of_side),
    }


def main(arguments: list[str]) -> dict[str, Any]:
    options = parse(arguments)
    device = torch.device(options.device)
    precision = pick_precision("auto", device)
    spec = {"device": options.device, "base": str(options.base), "precision": precision}
    spec |= {"rows": options.rows, "tokens": options.tokens}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side, of_side in runs.items():
            of_side.append(in_fresh_process("bench.generate_side", spec | {"side": side}))
            rates = {n: round(int(n) * options.tokens / s) for n, s in of_side[-1]["seconds"].items()}
            print(f"round {number + 1} {side:13}tokens/s by rows {rates}", flush=True)
    result = summary_of(runs, options.rows, options.tokens)
    result |= limits_of(options.base, options.rows, precision, device)
    print(json.dumps(round_floats(result, 3)))
    result |= {"precision": precision, "tokens": options.tokens, "rounds": options.rounds} | circumstances(device)
    path = options.output or REPO / f"bench/results/generate_{device.type}.json"
    write_json(path, round_floats(result, 4))
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
