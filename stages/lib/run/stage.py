"""What every stage does around its own work: parameters in, announcement, errors, run.json out."""

import importlib.metadata
import io
import os
import platform
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from stages.lib.run.artefacts import is_no_room, read_json, round_floats, write_json
from stages.lib.run.errors import UserError, is_out_of_memory
from stages.lib.run.params import Base, load_params

PACKAGES = ("torch", "transformers", "trl", "datasets", "dvc")


def run_stage(stage: str, main: Callable[..., dict[str, Any] | None], params_class: type) -> None:
    """Runs `main(base, params)` as the stage script, from the project's root.

    `main` may return facts for run.json, such as `{"tokens": 81_000, "device": "cpu"}`; with `tokens`, the
    tokens per second are added. run.json is a metric but no out of the stage: it differs from run to run.
    A UserError, a full disk and used-up memory end the process with exit status 1 and one line.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # DVC reads through a pipe
    started = time.monotonic()
    try:
        with stage_lock(stage, Path(".")):
            print(f"{stage}: {_first_line_of(main)}")
            base = load_params("base", Base)
            facts = main(base, load_params(stage, params_class)) or {}
            if os.environ.get("RANK", "0") != "0":
                return  # under torchrun only the main process writes
            seconds = time.monotonic() - started
            record = run_record(seconds, facts) | {"seed": base.seed} | data_hash(Path("."))
            write_json(Path("reports") / stage / "run.json", round_floats(record))
    except UserError as error:
        sys.exit(f"{stage}: error: {error}")
    except Exception as error:
        if message := shortage(error, stage, params_class):
            sys.exit(f"{stage}: error: {message}")
        raise
    print(f"{stage}: done in {seconds:.1f} s, peak memory {peak_memory_mb():,.0f} MB")


def data_hash(root: Path) -> dict[str, str]:
    """The SHA-256 of the pairs that fetch_pairs read; empty before it has run."""
    report = root / "reports/fetch_pairs/metrics.json"
    return {"data_sha256": read_json(report)["sha256"]} if report.exists() else {}


@contextmanager
def stage_lock(stage: str, root: Path) -> Iterator[None]:
    """Held in the block: a stage that outlived a killed dvc and its successor would share their files.

    The system lets go of it when the process ends, however that ends. Under torchrun the main process holds it.

    Raises:
        UserError: another process runs the stage here, or the folder cannot be written to or locked in.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    path = root / "checkpoints" / f"{stage}.lock"
    pid_path = path.with_suffix(".pid")
    # where a disk has no locks, filelock would leave a marker file that outlives a killed process
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        path.parent.mkdir(exist_ok=True)
        lock.acquire()
        pid_path.write_text(str(os.getpid()))
    except Timeout:
        pid = pid_path.read_text() if pid_path.exists() else "unknown"
        raise UserError(
            f"process {pid} still runs this stage here, left over from a killed dvc perhaps. Wait for it, or "
            f"end it (kill {pid}: a training stage saves a checkpoint first), then run dvc repro again"
        ) from None
    except (OSError, NotImplementedError) as error:
        raise UserError(
            f"{path}: cannot be locked ({error}); run the project in a folder you may write to, on a disk with "
            "file locks (some network disks have none)"
        ) from error
    try:
        yield
    finally:
        lock.release()


def shortage(error: Exception, stage: str, params_class: type) -> str | None:
    """What to do about a full disk or used-up memory, in one line; None for any other error."""
    if is_no_room(error):
        file = getattr(error, "filename", None)
        where = f"{file}: " if file else ""
        return f"{where}no room left on the disk ({error}). Make room, then run dvc repro again"
    if is_out_of_memory(error):
        dials = ("micro_batch_tokens", "batch_size", "max_new_tokens")
        dial = next((name for name in dials if name in params_class.model_fields), None)
        remedy = f"lower {stage}.{dial} in params.yaml" if dial else "close other programs"
        if dial == "micro_batch_tokens":
            remedy += " (halve it: it changes no result but rounding)"
        first_line = str(error).strip().partition("\n")[0]
        return f"out of memory: {remedy}, or choose a smaller model or a machine with more. {first_line}"
    return None


def run_record(seconds: float, facts: dict[str, Any]) -> dict[str, Any]:
    """Seconds, throughput, peak memory, machine, versions and Git revision of this process's run."""
    record: dict[str, Any] = {"seconds": seconds, "peak_memory_mb": peak_memory_mb()}
    if "tokens" in facts:
        record["tokens_per_second"] = facts["tokens"] / seconds
    record |= facts
    record["machine"] = f"{_cpu_name()}, {os.cpu_count()} cores"
    record["git_revision"] = _git_revision()
    record["versions"] = {"python": platform.python_version()}
    record["versions"] |= {name: importlib.metadata.version(name) for name in PACKAGES}
    return record


def peak_memory_mb() -> float:
    """Largest resident set of this process so far, in MB (10^6 bytes).

    Not getrusage's figure where Linux offers a better one: that one begins with the peak of the process that
    started this one, so a small stage would report DVC's memory.
    """
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(re.findall(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)[0]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # bytes, on macOS


def _first_line_of(main: Callable) -> str:
    return (sys.modules[main.__module__].__doc__ or "").strip().splitlines()[0]


def _cpu_name() -> str:
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _git_revision() -> str:
    """The checked-out commit, with '+' where tracked files differ from it; 'unknown' outside Git."""
    try:
        command = ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
