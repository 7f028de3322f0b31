"""PPO: ours against TRL 1.12.0's PPOTrainer, same models, prompts and settings, alternating in fresh processes.

Reads   models/base (or --base), data/pairs_embedded.jsonl for the prompts
Writes  bench/results/ppo_<device>.json

Run     make bench-ppo                          (python -m bench.bench_ppo --device cpu)

The reward model is the base with a random head: the cost is the same, and nothing has to be trained first. Each
run warms up with one update; medians over rounds are compared. `speedup` is ours in the precision we would choose
against TRL as it comes; `speedup_fp32` is fp32 against fp32.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.measure import REPO, circumstances, in_fresh_process
from stages.lib.model.loading import load_tokenizer, pick_precision, save_model, set_seed
from stages.lib.model.reward import new_reward_model
from stages.lib.run.artefacts import round_floats, write_json

SETTINGS = ("batch_size", "response_length", "num_ppo_epochs", "updates", "micro_batch_tokens", "seed")


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--base", type=Path, default=REPO / "models/base", help="a model folder as fetch_base leaves it"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, alternating")
    parser.add_argument(
        "--updates", type=int, default=3, help="measured updates of each run, after one to warm up"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="episodes per update")
    parser.add_argument("--response-length", type=int, default=53, help="tokens")
    parser.add_argument("--num-ppo-epochs", type=int, default=2)
    parser.add_argument("--micro-batch-tokens", type=int, default=1024, help="ours: memory dial")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, help="default: bench/results/ppo_<device>.json")
    return parser.parse_args(arguments)


def sides_of(device: torch.device) -> dict[str, dict[str, Any]]:
    """The runs to compare. On CPUs TRL computes in fp32 whatever `bf16` says, so one run is both."""
    sides = {
        "trl": {"side": "trl", "bf16": True},  # PPOConfig's default
        "ours_fp32": {"side": "ours", "bf16": False},
        "ours": {"side": "ours", "bf16": pick_precision("auto", device) == "bf16"},
    }
    return sides if device.type == "cpu" else {"trl_fp32": {"side": "trl", "bf16": False}} | sides


def prepare(base: Path, root: Path, seed: int) -> None:
    """Base, reward model and tokenized prompts under `root`."""
    tokenizer = load_tokenizer(base)
    (root / "models").mkdir()
    (root / "models/base").symlink_to(base.resolve(), target_is_directory=True)
    set_seed(seed)
    save_model(new_reward_model(base, tokenizer.pad_token_id), tokenizer, root / "models/reward")
    lines = (REPO / "data/pairs_embedded.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": json.loads(line)["prompt"]}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for line in lines
    ]
    write_json(root / "prompts.json", {"prompts": prompts})


def summary_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over rounds of one side."""
    rates = [run["episodes"] / run["seconds"] for run in runs]
    median_run = sorted(runs, key=lambda run: run["seconds"])[(len(runs) - 1) // 2]
    updates = len(median_run["kl"]) - 1
    return {
        "episodes_per_second": statistics.median(rates),
        "episodes_per_second_of_rounds": rates,
        "peak_memory_mb": max(run["peak_memory_mb"] for run in runs),
        "precision": runs[0]["precision"],
        "phase_seconds_per_update": {name: value / updates for name, value in median_run["phase_seconds"].items()},
        "busy_elsewhere": max(run["busy_elsewhere"] for run in runs),
    }


def compare(sides: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios of the medians: above 1 is faster, memory below 1 is leaner."""
    trl_fp32 = sides.get("trl_fp32", sides["trl"])
    return {
        "speedup": sides["ours"]["episodes_per_second"] / sides["trl"]["episodes_per_second"],
        "speedup_fp32": sides["ours_fp32"]["episodes_per_second"] / trl_fp32["episodes_per_second"],
        "memory_ratio": sides["ours"]["peak_memory_mb"] / sides["trl"]["peak_memory_mb"],
        "memory_ratio_fp32": sides["ours_fp32"]["peak_memory_mb"] / trl_fp32["peak_memory_mb"],
    }


def main(arguments: list[str]) -> dict[str, Any]:
    options = parse(arguments)
    device = torch.device(options.device)
    settings = {name: getattr(options, name) for name in SETTINGS}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides_of(device)}
    with tempfile.TemporaryDirectory() as folder:
        prepare(options.base, Path(folder), options.seed)
        for number in range(options.rounds):
            for name, side in sides_of(device).items():
                spec = {"root": folder, "device": options.device, **settings, **side}
                run = in_fresh_process("bench.ppo_run", spec)
                runs[name].append(run)
                print(
                    f"round {number + 1} {name}: {run['episodes'] / run['seconds']:.3f} episodes/s, "
                    f"{run['peak_memory_mb']:,.0f} MB, busy elsewhere {run['busy_elsewhere']:.0%}",
                    flush=True,
                )
    sides = {name: summary_of(of_side) for name, of_side in runs.items()}
    result = compare(sides) | {"settings": settings, "sides": sides} | circumstances(device)
    path = options.output or REPO / f"bench/results/ppo_{device.type}.json"
    write_json(path, round_floats(result, 4))
    print(json.dumps(round_floats(compare(sides), 3)))
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
