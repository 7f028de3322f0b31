"""How the cost grows with the model and with the length of answers: reading, a DPO step, decoding, peak memory.

Models of SmolLM2's three sizes with random weights and random pairs; every point in a fresh process. A DPO step is
made with all weights and with adapters (rank 16); all weights are left out where state and gradients alone would take
most of the machine's memory. Decoding never ends early: 32 answers of the smallest model at every length, and of
the others at the first two.

Run     make bench-sizes                        (python -m bench.bench_sizes; about 15 minutes on 2 cores)
Writes  bench/results/sizes_<device>.json, bench/results/sizes_<device>.png
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator
from transformers import LlamaForCausalLM

from bench.bench_dpo import read_pairs
from bench.dpo_growth import measure_point
from bench.measure import REPO, circumstances, in_fresh_process
from bench.random_base import SMOLLM2_1_7B, SMOLLM2_360M, smollm2_135m, write_random_base
from stages.lib.model.loading import pick_precision
from stages.lib.run.artefacts import round_floats, write_json

SIZES: dict[str, dict[str, int]] = {"135M": {}, "360M": SMOLLM2_360M, "1.7B": SMOLLM2_1_7B}
RANK = 16
PAIRS = 8  # a step
STEPS = 3  # after one to warm up
LENGTH = 128  # tokens of each completion with its prompt
STATE = 16  # bytes a trained weight: itself, its gradient and two moments, fp32
ROWS = 32  # answers decoded together


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--sizes", type=json.loads, default=SIZES, help="name: what is other than in 135M, as JSON"
    )
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 64, 128, 256], help="of decoded answers")
    parser.add_argument("--output", type=Path, help="default: bench/results/sizes_<device>.json")
    return parser.parse_args(arguments)


def memory_of(device: torch.device) -> int:
    """Bytes of the machine, or of the GPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def parameters_of(sizes: dict[str, int]) -> int:
    """Of a model with tied embeddings and these sizes."""
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(smollm2_135m(**sizes)).parameters())


def decode(device: str, sizes: dict[str, int], lengths: list[int]) -> dict[str, Any]:
    """Seconds and peak memory of ROWS answers at each length."""
    texts = [row["prompt"] for row in read_pairs(REPO / "data/pairs_embedded.jsonl", ROWS)]
    with tempfile.TemporaryDirectory() as folder:
        write_random_base(Path(folder), smollm2_135m(**sizes), texts, dtype=torch.bfloat16)
        spec = {"device": device, "base": folder, "precision": pick_precision("auto", torch.device(device))}
        runs = {
            length: in_fresh_process(
                "bench.generate_side", spec | {"side": "ours", "rows": [ROWS], "tokens": length}
            )
            for length in lengths
        }
    return {
        "seconds": {length: run["seconds"][str(ROWS)] for length, run in runs.items()},
        "peak_memory_mb": {length: run["peak_memory_mb"] for length, run in runs.items()},
    }


def measure_size(device: torch.device, sizes: dict[str, int], lengths: list[int]) -> dict[str, Any]:
    """Everything about a model of one size."""
    parameters = parameters_of(sizes)
    found: dict[str, Any] = {"parameters": parameters, "decoding": decode(device.type, sizes, lengths)}
    for side, rank in (("all weights", None), ("adapters", RANK)):
        if rank or STATE * parameters < 0.8 * memory_of(device):
            found[side] = measure_point(device.type, sizes, PAIRS, LENGTH, STEPS, rank=rank)
    return found


def draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    """Seconds a step and peak memory over parameters, seconds over the length of answers."""
    figure = Figure(figsize=(13, 3.4), layout="constrained")
    time, memory, decoding = figure.subplots(1, 3)
    for side in ("all weights", "adapters"):
        points = [size for size in found.values() if side in size]
        x = [size["parameters"] / 1e6 for size in points]
        time.plot(x, [size[side]["seconds_per_step"] for size in points], "o-", label=f"DPO step, {side}")
        memory.plot(x, [size[side]["peak_memory_mb"] / 1e3 for size in points], "o-", label=f"DPO, {side}")
    x = [size["parameters"] / 1e6 for size in found.values()]
    time.plot(x, [size["adapters"]["reference_seconds"] for size in found.values()], "o:", label="reading alone")
    of_decoding = [max(size["decoding"]["peak_memory_mb"].values()) / 1e3 for size in found.values()]
    memory.plot(x, of_decoding, "o:", label=f"decoding {ROWS} answers")
    time.set(ylabel=f"seconds for {PAIRS} pairs of 2 x {LENGTH} tokens", yscale="log")
    memory.set(ylabel="peak memory, GB", ylim=(0, None))
    lengths: set[int] = set()
    for name, size in found.items():
        seconds = {int(length): value for length, value in size["decoding"]["seconds"].items()}
        decoding.plot(list(seconds), list(seconds.values()), "s-", label=name)
        lengths |= set(seconds)
    decoding.set(ylabel=f"seconds for {ROWS} answers", yscale="log")
    parameters = "million parameters"
    for axes, ticks, label in (
        (time, x, parameters),
        (memory, x, parameters),
        (decoding, lengths, "tokens an answer"),
    ):
        axes.set(xlabel=label, xscale="log")
        axes.set_xticks(sorted(ticks), [f"{tick:,.0f}" for tick in sorted(ticks)])
        axes.minorticks_off()
        axes.legend(loc="lower right")
    for axes in (time, decoding):
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None})


def main(arguments: list[str]) -> dict[str, Any]:
    options = parse(arguments)
    device = torch.device(options.device)
    found = {}
    for name, sizes in options.sizes.items():
        found[name] = measure_size(device, sizes, options.lengths if not sizes else options.lengths[:2])
        print(f"{name}: {json.dumps(round_floats(found[name], 3))}", flush=True)
    path = options.output or REPO / f"bench/results/sizes_{device.type}.json"
    draw(found, path.with_suffix(".png"))
    how = {"rank": RANK, "pairs": PAIRS, "steps": STEPS, "length": LENGTH, "rows": ROWS}
    write_json(path, round_floats({"sizes": found, "settings": how} | circumstances(device), 4))
    print(f"wrote {path}")
    return found


if __name__ == "__main__":
    main(sys.argv[1:])
