"""Checkpoints of a training stage: killed at any moment, it goes on from the last one, bit for bit on a CPU.

They lie in checkpoints/<stage>/<key>/, which neither Git nor DVC looks at: DVC empties outs before it runs a
stage. The key is a hash of what the stage depends on, so that no run ever continues another one's checkpoint.
"""

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from ruamel.yaml import YAML

from stages.lib.run.artefacts import NoRoomError, atomic_path, require_room, sha256_of_file
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, Section

PROJECT = Path(__file__).resolve().parents[3]


class Stopped(UserError):
    """SIGTERM or SIGINT arrived; a checkpoint was written."""


class Stateful(Protocol):
    """A model, an optimizer, a scheduler, ..."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Checkpoints:
    """A context around a stage's work, its outputs included.

        with Checkpoints("train_dpo", root, base, params) as checkpoints:
            saved = checkpoints.load(model=model, optimizer=optimizer)   # {} on a fresh start
            history = saved.get("history", [])
            for step ...:
                ...
                checkpoints.save_if_due(history=history)                 # at the end of every step
            ...                                                          # write the outputs

    Saves every $CHECKPOINT_MINUTES (default 10; 0: at every step), and once more on SIGTERM or SIGINT, which end
    the process at the next step. The environment, not params.yaml: how often is saved changes no result and
    shall rerun nothing. The checkpoint is removed when the block ends without an exception.

    Of several processes all load and the main one saves; asked to end, all wait for that, since a launcher ends those
    that are left as soon as one is gone. A launcher also passes a signal on to processes that have it already, so a
    second one ends a process at once only where it is alone, and not while it saves. Where each holds only a part of
    the model (`sharded`, as under FSDP) nothing is saved or loaded, and a killed run starts afresh.
    """

    def __init__(self, stage: str, root: Path, base: Base, params: Section, sharded: bool = False):
        self.stage = stage
        self.minutes = _minutes()
        self.sharded = sharded
        self.path = root / "checkpoints" / stage / key_of(stage, root, base, params) / "checkpoint.pt"
        self.is_main = os.environ.get("RANK", "0") == "0"
        self._tracked: dict[str, Stateful] = {}
        self._stop: str | None = None  # the signal's name
        self._alone = os.environ.get("WORLD_SIZE", "1") == "1"
        self._handlers: dict[int, Any] = {}
        self._saved_at = time.monotonic()

    def __enter__(self) -> "Checkpoints":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._handlers[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, error_type, *_) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if error_type is None and self.is_main:
            shutil.rmtree(self.path.parent, ignore_errors=True)
            self._mention_the_others()

    def load(self, **tracked: Stateful | None) -> dict[str, Any]:
        """Puts the checkpoint's state into `tracked` and into every random number generator.

        Args:
            tracked: what every save shall contain besides its values; None is skipped.

        Returns:
            The values given to the last save; {} where there is no checkpoint.

        Raises:
            UserError: the checkpoint cannot be read.
        """
        self._tracked = {name: part for name, part in tracked.items() if part is not None}
        if self.sharded or not self.path.exists():
            return {}
        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:
            raise UserError(f"{self.path}: cannot be read ({error}); delete it to start afresh") from error
        for name, part in self._tracked.items():
            if state := saved["tracked"].get(name):
                part.load_state_dict(state)
            elif self.is_main:  # fp16 has a loss scale and other precisions none: `auto`, on another machine
                print(
                    f"{self.stage}: the checkpoint has no {name}, being of another precision: a fresh one is taken"
                )
        _set_random_state(saved["random"])
        if self.is_main:
            print(f"{self.stage}: goes on from {self.path}")
        return saved["values"]

    def save_if_due(self, **values: Any) -> None:
        """Call at the end of a step, in every process. Values: numbers, texts, tensors, lists and dicts of them.

        Raises:
            Stopped: a signal asked for the end; the checkpoint has been written.
        """
        stop = self._stop_of_any_process()
        due = not self.sharded and time.monotonic() - self._saved_at >= 60 * self.minutes
        if self.sharded and stop:
            raise UserError(f"stopped by {stop} without a checkpoint: each process holds only a part of the model")
        if stop:
            for number in self._handlers:
                signal.signal(number, signal.SIG_IGN)
        failure: NoRoomError | None = None
        if self.is_main and (stop or due):
            try:
                self._save(values)
            except NoRoomError as error:
                failure = error
                if not stop:
                    print(f"{self.stage}: warning: goes on without a new checkpoint: {error}", file=sys.stderr)
            self._saved_at = time.monotonic()
        if stop and _is_distributed():
            torch.distributed.barrier()
        if stop and failure:
            raise UserError(f"stopped by {stop} without a checkpoint: {failure}") from failure
        if stop:
            raise Stopped(f"stopped by {stop}; `dvc repro` goes on from {self.path}")

    def due(self) -> bool:
        """Whether it is time to save: for a library that writes its own checkpoint, beside `path`, and says `saved`."""
        return time.monotonic() - self._saved_at >= 60 * self.minutes

    def saved(self) -> None:
        self._saved_at = time.monotonic()

    @property
    def asked_to_end(self) -> bool:
        """Whether a signal arrived; whoever ends because of it calls `stop`."""
        return self._stop is not None

    def stop(self, saved: bool) -> None:
        """
        Args:
            saved: whether there is a checkpoint.

        Raises:
            Stopped: always.
        """
        then = f"goes on from {self.path.parent}" if saved else "begins anew"
        raise Stopped(f"stopped by {self._stop}; `dvc repro` {then}")

    def _save(self, values: dict[str, Any]) -> None:
        tracked = {name: part.state_dict() for name, part in self._tracked.items()}
        state = {"values": values, "tracked": tracked, "random": _random_state()}
        needed = _num_bytes(state)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for rest in self.path.parent.glob(".*.partial"):  # of a process killed while it saved
            rest.unlink()
        require_room(self.path, needed)
        with atomic_path(self.path, needed) as partial:
            torch.save(state, partial)

    def _on_signal(self, number: int, _frame) -> None:
        name = signal.Signals(number).name
        if self._alone:
            signal.signal(number, self._handlers[number])  # a second one ends the process at once
            os.write(2, f"\n{self.stage}: {name}: stops after this step; once more to stop at once\n".encode())
        elif self._stop is None and self.is_main:
            os.write(2, f"\n{self.stage}: {name}: all processes stop after this step\n".encode())
        self._stop = name

    def _stop_of_any_process(self) -> str | None:
        """A signal reaches processes at different steps; all must stop at one, or the rest would wait forever."""
        if not _is_distributed():
            return self._stop
        device = "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
        number = torch.tensor([signal.Signals[self._stop] if self._stop else 0], device=device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        return signal.Signals(int(number)).name if number else None

    def _mention_the_others(self) -> None:
        others = [path for path in self.path.parent.parent.glob("*") if path.is_dir()]
        if others:
            files = [path for other in others for path in other.rglob("*") if path.is_file()]
            size = sum(path.stat().st_size for path in files) / 1e6
            print(f"{self.stage}: {self.path.parent.parent} keeps {len(others)} unfinished run(s), {size:,.0f} MB")


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def key_of(stage: str, root: Path, base: Base, params: Section) -> str:
    """A hash of the parameters and of the contents of every dep that dvc.yaml lists for the stage."""
    values = {"base": base.model_dump(), stage: params.model_dump()}
    pipeline = YAML(typ="safe", pure=True).load((PROJECT / "dvc.yaml").read_text(encoding="utf-8"))
    contents = {}
    for dep in pipeline["stages"][stage]["deps"]:
        name = re.sub(r"\$\{(\w+)\.(\w+)\}", lambda match: str(values[match[1]][match[2]]), dep)
        # the code that runs is the project's, whatever root holds the data
        place = (PROJECT if name.startswith("stages/") else root) / name
        files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
        contents[name] = {file.relative_to(place).as_posix(): _sha256(file) for file in files}
    text = json.dumps([values, contents], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _sha256(file: Path) -> str | None:
    return sha256_of_file(file) if file.exists() else None


def _minutes() -> float:
    text = os.environ.get("CHECKPOINT_MINUTES", "10")
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not minutes >= 0:
        raise UserError(f"CHECKPOINT_MINUTES={text}: must be a number of minutes, 0 for every step")
    return minutes


def _random_state() -> dict[str, Any]:
    """Of Python, NumPy and torch on every device, as types that torch.load(weights_only=True) reads."""
    kind, keys, *rest = np.random.get_state()
    state = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _num_bytes(values: Any) -> int:
    """Of all tensors inside nested dicts, lists and tuples, shared ones once."""
    storages: dict[int, int] = {}
    waiting = [values]
    while waiting:
        value = waiting.pop()
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return sum(storages.values())
