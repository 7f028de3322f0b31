"""What every benchmark here does alike: fresh processes, the machine and its matmul limit."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from bench.worker import now
from stages.lib.run.stage import run_record

REPO = Path(__file__).resolve().parent.parent


class WorkerError(RuntimeError):
    """A measured process failed; the message ends with the last lines it printed."""


def in_fresh_process(
    module: str, spec: dict[str, Any], timeout: float = 3600, python: str | Path = sys.executable
) -> dict[str, Any]:
    """Runs `python -m module` in a process of its own, so that no side inherits the other's memory or caches.

    The module calls `answer(function)`: the function gets `spec` and returns what is measured. `python` may be
    another environment's.

    Returns:
        The worker's result and `busy_elsewhere`, the share of the machine that other processes used meanwhile:
        above a few per cent, timings are not worth much.
    """
    with tempfile.TemporaryDirectory() as folder:
        result, log = Path(folder) / "result.json", Path(folder) / "log"
        command = [str(python), "-m", module, json.dumps(spec), str(result)]
        before, started = psutil.cpu_times(), time.monotonic()
        own_before = sum(os.times()[:4])
        with open(log, "w") as output:
            process = subprocess.run(command, cwd=REPO, stdout=output, stderr=subprocess.STDOUT, timeout=timeout)
        cpu_seconds = (time.monotonic() - started) * os.cpu_count()
        if process.returncode:
            tail = "\n".join(log.read_text().splitlines()[-20:])
            raise WorkerError(f"{module} {spec}: exit status {process.returncode}\n{tail}")
        after = psutil.cpu_times()
        idle = (after.idle - before.idle) + (getattr(after, "iowait", 0) - getattr(before, "iowait", 0))
        elsewhere = cpu_seconds - idle - (sum(os.times()[:4]) - own_before)  # os.times covers ended children
        return json.loads(result.read_text()) | {"busy_elsewhere": max(0.0, elsewhere / cpu_seconds)}


def tokens_or_auto(text: str) -> int | str:
    """A number, or `auto`."""
    return text if text == "auto" else int(text)


def linear_shapes(model: nn.Module) -> Counter[tuple[int, int]]:
    """How many linear layers there are of each (inputs, outputs)."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear))
    return Counter((layer.in_features, layer.out_features) for layer in layers)


@torch.no_grad()
def matmul_limit(
    shapes: Counter[tuple[int, int]], rows: int, dtype: torch.dtype, device: torch.device, repeats: int = 5
) -> float:
    """FLOP/s of plain matrix products at a model's own shapes, in the mix that the model has of them.

    Each shape counts with its fastest of `repeats` timings: the limit is what the machine can do.

    Args:
        shapes: number of layers of each (inputs, outputs).
        rows: tokens per product.
    """
    flops = seconds = 0.0
    for (inputs, outputs), count in shapes.items():
        x = torch.randn(rows, inputs, device=device).to(dtype)
        weight = torch.randn(outputs, inputs, device=device).to(dtype)
        flops_once = 2.0 * rows * inputs * outputs
        inner = max(1, int(4e10 // flops_once)) if device.type == "cpu" else 50
        x @ weight.T
        best = float("inf")
        for _ in range(repeats):
            started = now(device)
            for _ in range(inner):
                x @ weight.T
            best = min(best, (now(device) - started) / inner)
        flops, seconds = flops + count * flops_once, seconds + count * best
    return flops / seconds


def _without_folder(argument: str) -> str:
    """An absolute path's last part: the folders of a machine are no part of a result."""
    return Path(argument).name if argument.startswith("/") else argument


def circumstances(device: torch.device) -> dict[str, Any]:
    """Machine, versions, revision, date and command of this run, for the result file."""
    record = run_record(1.0, {})
    machine = f"{record['machine']}, {psutil.virtual_memory().total / 1e9:.0f} GB"
    if device.type == "cuda":
        machine = f"{torch.cuda.get_device_name(device)}; {machine}"
    return {
        "machine": machine,
        "threads": torch.get_num_threads(),
        "git_revision": record["git_revision"],
        "versions": record["versions"],
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python -m", f"bench.{Path(sys.argv[0]).stem}", *map(_without_folder, sys.argv[1:])]),
    }
