"""What a measured process needs: spec in and result out, clock, peak memory, and the precision really computed in.

Nothing of this project is imported here, for bench/ppo_stock.py runs in an environment without its packages.
"""

import json
import re
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn


def answer(function) -> None:
    """The main block of a worker module: `spec` in from the command line, the result out to a file."""
    spec, result = json.loads(sys.argv[1]), Path(sys.argv[2])
    result.write_text(json.dumps(function(spec), allow_nan=False))


class PrecisionWatch:
    """Sees in which dtypes a model's linear layers really compute, whatever the configuration promises.

    Dtypes in which less than one per cent of the rows went through are left out: probes at start-up.
    """

    def __init__(self):
        self._rows: Counter[tuple[torch.dtype, torch.dtype]] = Counter()  # of weights, of products

    def on(self, model: nn.Module) -> nn.Module:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._record)
        return model

    def _record(self, module: nn.Module, _inputs: Any, output: torch.Tensor) -> None:
        self._rows[module.weight.dtype, output.dtype] += output.numel() // output.shape[-1]

    def seen(self) -> str:
        """Such as 'float32 weights, bfloat16 products'; several, joined by ' and ', if they differed."""
        floor = self._rows.total() / 100
        seen = [
            f"{weights} weights, {products} products"
            for (weights, products), rows in self._rows.items()
            if rows > floor
        ]
        return " and ".join(sorted(seen)).replace("torch.", "")


def now(device: torch.device) -> float:
    """Seconds, once everything queued on `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_mb(device: torch.device) -> float:
    """Peak memory in MB (10^6 bytes) so far: allocated on a GPU, resident of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    if sys.platform == "linux":  # getrusage's figure begins with the peak of the process that started this one
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes, on macOS
