"""PPO: ours against TRL 1.12.0's PPOTrainer, same models, prompts and settings, alternating in fresh processes.

TRL has no PPO since; its last trainer runs in an environment of its own, which `make bench-ppo` makes.

Reads   models/base (or --base), data/pairs_embedded.jsonl for the prompts
Writes  bench/results/ppo_<device>.json, with --shapes defaults ppo_<device>_defaults.json

Run     make bench-ppo                          (python -m bench.bench_ppo --device cpu, then with --shapes defaults)

The reward model is the base with a random head: the cost is the same, and nothing has to be trained first. Each
run warms up with one update; medians over rounds are compared.

--shapes stock      episodes, lengths and passes near TRL's own; both sides train a value model. `speedup` is ours in
                    the precision we would choose against TRL as it comes; `speedup_fp32` is fp32 against fp32;
                    `speedup_frozen_critic` is ours with a frozen critic in the value model's place.
--shapes defaults   those of params.yaml's train_ppo. `speedup` is ours with all of its settings, which may need no
                    value model, against TRL's algorithm at equal episodes, lengths and passes.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from bench.measure import REPO, circumstances, in_fresh_process, tokens_or_auto
from stages.lib.model.loading import load_tokenizer, pick_precision, save_model, set_seed
from stages.lib.model.reward import new_reward_model
from stages.lib.run.artefacts import round_floats, write_json, write_parquet
from stages.lib.run.params import read_params

SHAPES = ("batch_size", "response_length", "num_ppo_epochs", "num_mini_batches")
SETTINGS = (*SHAPES, "updates", "micro_batch_tokens", "seed")
STOCK = {"batch_size": 8, "response_length": 53, "num_ppo_epochs": 2, "num_mini_batches": 2}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--base", type=Path, default=REPO / "models/base", help="a model folder as fetch_base leaves it"
    )
    parser.add_argument(
        "--stock-python",
        type=Path,
        default=REPO / ".venv-trl112/bin/python",
        help="the Python of the environment of bench/requirements-trl112.txt",
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, alternating")
    parser.add_argument(
        "--updates", type=int, default=3, help="measured updates of each run, after one to warm up"
    )
    parser.add_argument("--shapes", default="stock", choices=("stock", "defaults"), help="of which of the two")
    parser.add_argument("--batch-size", type=int, help="episodes per update")
    parser.add_argument("--response-length", type=int, help="tokens")
    parser.add_argument("--num-ppo-epochs", type=int)
    parser.add_argument("--num-mini-batches", type=int)
    parser.add_argument("--micro-batch-tokens", type=tokens_or_auto, default="auto", help="ours: memory dial")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--output", type=Path, help="default: bench/results/ppo_<device>[_defaults].json")
    options = parser.parse_args(arguments)
    shapes = STOCK if options.shapes == "stock" else read_params(REPO)["train_ppo"]
    for name in SHAPES:
        if getattr(options, name) is None:
            setattr(options, name, shapes[name])
    if not options.stock_python.exists():
        parser.error(f"{options.stock_python} is not there: make bench-ppo makes TRL 1.12.0's environment")
    return options


def sides_of(device: torch.device, shapes: str) -> dict[str, dict[str, Any]]:
    """The runs to compare. On CPUs TRL computes in fp32 whatever `bf16` says, so one run is both."""
    bf16 = pick_precision("auto", device) == "bf16"
    if shapes == "defaults":
        return {
            "trl": {"side": "trl", "bf16": True},
            "ours": {"side": "ours", "bf16": bf16, "train_ppo": read_params(REPO)["train_ppo"]},
        }
    sides = {
        "trl": {"side": "trl", "bf16": True},  # PPOConfig's default
        "ours_fp32": {"side": "ours", "bf16": False, "critic": "separate"},
        "ours": {"side": "ours", "bf16": bf16, "critic": "separate"},
        "ours_frozen_critic": {"side": "ours", "bf16": bf16, "critic": "frozen"},
    }
    return sides if device.type == "cpu" else {"trl_fp32": {"side": "trl", "bf16": False}} | sides


def prepare(base: Path, root: Path, seed: int, count: int) -> None:
    """Base, reward model and `count` tokenized prompts under `root`: each side answers every one of them once."""
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
        for line in (lines[i * len(lines) // count] for i in range(count))
    ]
    write_json(root / "prompts.json", {"input_ids": prompts})
    columns = {"prompt_id": list(range(count)), "input_ids": pa.array(prompts, pa.list_(pa.int32()))}
    for split in ("train", "judge"):
        write_parquet(root / f"data/tokenized/prompts_{split}.parquet", columns)


def run_side(spec: dict[str, Any], stock_python: Path) -> dict[str, Any]:
    """One run of one side, each by the Python of its own environment."""
    if spec["side"] == "trl":
        return in_fresh_process("bench.ppo_stock", spec, python=stock_python)
    return in_fresh_process("bench.ppo_ours", spec)


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
        **({"versions": runs[0]["versions"]} if "versions" in runs[0] else {}),  # of an environment of its own
    }


def compare(sides: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ratios of the medians: above 1 is faster, memory below 1 is leaner; `speedup_low` and `speedup_high` are those
    of ours at its slowest and fastest round against TRL at its fastest and slowest."""
    ours, trl = sides["ours"], sides["trl"]
    rates, theirs = (side["episodes_per_second_of_rounds"] for side in (ours, trl))
    ratios = {
        "speedup": ours["episodes_per_second"] / trl["episodes_per_second"],
        "speedup_low": min(rates) / max(theirs),
        "speedup_high": max(rates) / min(theirs),
        "memory_ratio": ours["peak_memory_mb"] / trl["peak_memory_mb"],
    }
    if "ours_fp32" not in sides:
        return ratios
    trl_fp32 = sides.get("trl_fp32", sides["trl"])
    return ratios | {
        "speedup_frozen_critic": sides["ours_frozen_critic"]["episodes_per_second"]
        / sides["trl"]["episodes_per_second"],
        "speedup_fp32": sides["ours_fp32"]["episodes_per_second"] / trl_fp32["episodes_per_second"],
        "memory_ratio_frozen_critic": sides["ours_frozen_critic"]["peak_memory_mb"]
        / sides["trl"]["peak_memory_mb"],
        "memory_ratio_fp32": sides["ours_fp32"]["peak_memory_mb"] / trl_fp32["peak_memory_mb"],
    }


def main(arguments: list[str]) -> dict[str, Any]:
    options = parse(arguments)
    device = torch.device(options.device)
    settings = {name: getattr(options, name) for name in SETTINGS}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides_of(device, options.shapes)}
    with tempfile.TemporaryDirectory() as folder:
        prepare(options.base, Path(folder), options.seed, options.batch_size * (options.updates + 1))
        for number in range(options.rounds):
            for name, side in sides_of(device, options.shapes).items():
                run = run_side(
                    {"root": folder, "device": options.device, **settings, **side}, options.stock_python
                )
                runs[name].append(run)
                print(
                    f"round {number + 1} {name}: {run['episodes'] / run['seconds']:.3f} episodes/s, "
                    f"{run['peak_memory_mb']:,.0f} MB, busy elsewhere {run['busy_elsewhere']:.0%}",
                    flush=True,
                )
    sides = {name: summary_of(of_side) for name, of_side in runs.items()}
    result = compare(sides) | {"settings": settings, "sides": sides} | circumstances(device)
    path = (
        options.output
        or REPO / f"bench/results/ppo_{device.type}{'_defaults' if options.shapes == 'defaults' else ''}.json"
    )
    write_json(path, round_floats(result, 4))
    print(json.dumps(round_floats(compare(sides), 3)))
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
