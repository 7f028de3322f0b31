"""Compare adapters with all weights trained, on the same work, alternating in fresh processes: speed and peak memory.

DPO is bench_dpo's: batches of 8 pairs, the reference log-probs cached on both sides, the first step not counted.
PPO is that of params.yaml (frozen side, sampler and all), two updates after one to warm up.

speed           pairs or episodes per second, medians over rounds
peak_memory_mb  of the process from beginning to end (on a GPU: allocated there), merging and saving included

Run     python -m bench.bench_lora               about 25 minutes on 2 cores
Writes  bench/results/lora_<device>.json
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench import bench_dpo, bench_ppo
from bench.dpo_ours import training_params
from bench.measure import REPO, circumstances, in_fresh_process
from stages.lib.model.loading import pick_precision
from stages.lib.run.artefacts import round_floats, write_json
from stages.lib.run.params import read_params

SEED = 42


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--base", type=Path, default=REPO / "models/base", help="a model folder as fetch_base leaves it"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=24, help="pairs that count, after one batch to warm up")
    parser.add_argument("--batch-size", type=int, default=8, help="of DPO: pairs per optimizer step")
    parser.add_argument("--updates", type=int, default=2, help="of PPO, after one to warm up")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side of DPO, alternating")
    parser.add_argument("--ppo-rounds", type=int, default=3, help="the same of PPO")
    parser.add_argument("--output", type=Path, help="default: bench/results/lora_<device>.json")
    return parser.parse_args(arguments)


def measure_dpo(options: argparse.Namespace, sides: dict[str, dict], rounds: int) -> dict[str, list[dict]]:
    """Runs of train_dpo by side."""
    rows = bench_dpo.read_pairs(REPO / "data/pairs_embedded.jsonl", options.pairs + options.batch_size)
    params = training_params(batch_size=options.batch_size, micro_batch_tokens="auto")
    spec = {
        "device": options.device,
        "precision": pick_precision("auto", torch.device(options.device)),
        "seed": SEED,
        "num_pairs": len(rows),
        "reference_micro_batch_tokens": "auto",
    }
    with tempfile.TemporaryDirectory() as folder:
        bench_dpo.prepare(Path(folder), options.base, rows, params)
        spec |= {"root": folder, "train_dpo": params.model_dump(), "stages": ["reference_logps"]}
        in_fresh_process("bench.dpo_ours", spec)
        spec |= {"stages": ["train_dpo"]}
        specs = {side: spec | {"train_dpo": params.model_dump() | {"lora": lora}} for side, lora in sides.items()}
        return alternate("DPO", "bench.dpo_ours", specs, rounds, options.pairs)


def measure_ppo(options: argparse.Namespace, sides: dict[str, dict], rounds: int) -> dict[str, list[dict]]:
    """Runs of train_ppo by side."""
    settings = read_params(REPO)["train_ppo"]
    shapes = {name: settings[name] for name in bench_ppo.SHAPES}
    bf16 = pick_precision("auto", torch.device(options.device)) == "bf16"
    spec = {"device": options.device, "seed": SEED, "updates": options.updates, "bf16": bf16, **shapes}
    spec |= {"micro_batch_tokens": "auto"}
    with tempfile.TemporaryDirectory() as folder:
        bench_ppo.prepare(options.base, Path(folder), SEED, shapes["batch_size"] * (options.updates + 1))
        spec |= {"root": folder}
        specs = {side: spec | {"train_ppo": settings | {"lora": lora}} for side, lora in sides.items()}
        return alternate("PPO", "bench.ppo_ours", specs, rounds, shapes["batch_size"] * options.updates)


def alternate(what: str, module: str, specs: dict[str, dict], rounds: int, count: int) -> dict[str, list[dict]]:
    """Runs of every side in turn, each with its `speed`: `count` pairs or episodes over its seconds."""
    runs: dict[str, list[dict]] = {side: [] for side in specs}
    for _ in range(rounds):
        for side, spec in specs.items():
            run = in_fresh_process(module, spec)
            run["speed"] = count / run["seconds"]
            runs[side].append(run)
            print(
                f"{what} {side}: {run['speed']:.3f} a second, {run['whole_peak_memory_mb']:,.0f} MB, "
                f"busy elsewhere {run['busy_elsewhere']:.0%}",
                flush=True,
            )
    return runs


def summary_of(runs: dict[str, list[dict]]) -> dict[str, Any]:
    """Medians over rounds by side, and what adapters are to all weights."""
    sides = {
        side: {
            "speed": statistics.median(run["speed"] for run in of_side),
            "speed_of_rounds": [run["speed"] for run in of_side],
            "peak_memory_mb": max(run["whole_peak_memory_mb"] for run in of_side),
            "busy_elsewhere": max(run["busy_elsewhere"] for run in of_side),
        }
        for side, of_side in runs.items()
    }
    full, lora = sides["full"], sides["lora"]
    return {
        "speedup": lora["speed"] / full["speed"],
        "speedup_low": min(lora["speed_of_rounds"]) / max(full["speed_of_rounds"]),
        "speedup_high": max(lora["speed_of_rounds"]) / min(full["speed_of_rounds"]),
        "memory_ratio": lora["peak_memory_mb"] / full["peak_memory_mb"],
        "sides": sides,
    }


def main(arguments: list[str]) -> dict[str, Any]:
    options = parse(arguments)
    lora = read_params(REPO)["lora"]
    sides = {"full": lora | {"rank": None}, "lora": lora | {"rank": options.rank}}
    found = {
        "dpo": summary_of(measure_dpo(options, sides, options.rounds)),
        "ppo": summary_of(measure_ppo(options, sides, options.ppo_rounds)),
    }
    settings = {
        name: getattr(options, name) for name in ("rank", "pairs", "batch_size", "updates", "rounds", "ppo_rounds")
    }
    result = found | {"settings": settings} | circumstances(torch.device(options.device))
    path = options.output or REPO / f"bench/results/lora_{options.device}.json"
    write_json(path, round_floats(result, 4))
    headline = {what: {name: value for name, value in of.items() if name != "sides"} for what, of in found.items()}
    print(json.dumps(round_floats(headline, 3)))
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
