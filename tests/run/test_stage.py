"""What surrounds a stage: announcement, run.json, errors."""

import errno
import fcntl
import json
import os
import subprocess
import sys

import pytest
import torch  # noqa: F401 (evaluated below)

from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, Section
from stages.lib.run.stage import run_record, shortage, stage_lock
from tests.conftest import REPO

SCRIPT = '''"""Add two numbers."""
from stages.lib.run.errors import UserError
from stages.lib.run.params import Section
from stages.lib.run.stage import run_stage

class Params(Section):
    number: int

def main(base, params):
    if params.number < 0:
        raise UserError("data.jsonl:3: a negative number; mend the row")
    if params.number == 0:
        raise ZeroDivisionError("a fault of ours")
    return {"tokens": params.number, "device": "cpu"}

run_stage("add", main, Params)
'''


def run(tmp_path, number, **environment):
    (tmp_path / "params.yaml").write_text(f"base: {{seed: 1, precision: auto}}\nadd: {{number: {number}}}\n")
    return run_script(tmp_path, SCRIPT, **environment)


def run_script(tmp_path, script, **environment):
    return subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin", **environment},
    )


def test_a_run_says_what_it_does_and_leaves_a_record(tmp_path):
    result = run(tmp_path, 5)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("add: Add two numbers.\n")
    assert "add: done in" in result.stdout
    record = json.loads((tmp_path / "reports/add/run.json").read_text())
    assert record["tokens"] == 5 and record["seconds"] > 0 and record["tokens_per_second"] > 0
    assert 10 < record["peak_memory_mb"] < 10_000
    assert record["seed"] == 1 and "data_sha256" not in record
    assert record["git_revision"] == "unknown"  # tmp_path is no repository
    assert {"python", "torch", "transformers", "trl", "datasets", "dvc"} == set(record["versions"])
    assert str(tmp_path) not in json.dumps(record)


def test_the_record_carries_the_hash_of_the_pairs(tmp_path):
    (tmp_path / "reports/fetch_pairs").mkdir(parents=True)
    (tmp_path / "reports/fetch_pairs/metrics.json").write_text('{"sha256": "ba7816bf"}')
    assert run(tmp_path, 5).returncode == 0
    assert json.loads((tmp_path / "reports/add/run.json").read_text())["data_sha256"] == "ba7816bf"


def test_a_users_error_is_one_line_and_exit_status_1(tmp_path):
    result = run(tmp_path, -1)
    assert result.returncode == 1
    assert result.stderr == "add: error: data.jsonl:3: a negative number; mend the row\n"
    assert not (tmp_path / "reports").exists()


def test_our_own_fault_keeps_its_traceback(tmp_path):
    result = run(tmp_path, 0)
    assert result.returncode == 1
    assert "Traceback" in result.stderr and "a fault of ours" in result.stderr


def test_only_the_main_process_leaves_a_record(tmp_path):
    assert run(tmp_path, 5, RANK="1").returncode == 0
    assert not (tmp_path / "reports").exists()


def test_peak_memory_is_the_process_own_and_not_that_of_its_parent(tmp_path):
    # getrusage's ru_maxrss would give the child at least the parent's 600 MB: so Linux hands it on
    report = "from stages.lib.run.stage import peak_memory_mb; print(peak_memory_mb())"
    parent = (
        f"import subprocess, sys; block = b'x' * 600_000_000; subprocess.run([sys.executable, '-c', {report!r}])"
    )
    result = run_script(tmp_path, parent)
    assert 10 < float(result.stdout) < 500
    result = run_script(tmp_path, f"block = b'x' * 600_000_000; del block; {report}")
    assert float(result.stdout) > 600


def test_throughput_is_tokens_over_seconds():
    assert run_record(4.0, {"tokens": 100})["tokens_per_second"] == pytest.approx(25)
    assert "tokens_per_second" not in run_record(4.0, {})


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        ("OSError(28, 'No space left on device', 'data/x.parquet')", "data/x.parquet: no room left on the disk"),
        ("OSError(122, 'Disk quota exceeded')", "no room left on the disk"),
        ("MemoryError()", "out of memory: lower add.micro_batch_tokens in params.yaml (halve it"),
        ('RuntimeError("DefaultCPUAllocator: can\'t allocate memory: 9 bytes")', "lower add.micro_batch_tokens"),
        ("torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB.')", "lower add.micro_batch_tokens"),
    ],
)
def test_shortage_is_one_line_that_says_what_to_do(raised, expected):
    class Params(Section):
        micro_batch_tokens: int

    message = shortage(eval(raised), "add", Params)
    assert expected in message and "\n" not in message


def test_other_errors_are_no_shortage():
    assert shortage(RuntimeError("shapes differ"), "add", Base) is None
    assert shortage(FileNotFoundError(2, "No such file"), "add", Base) is None


def test_a_real_allocation_that_fails_names_the_dial(tmp_path):
    script = SCRIPT.replace("number: int", "number: int\n    micro_batch_tokens: int = 1")
    script = script.replace("def main(base, params):", "def main(base, params):\n    bytearray(2**62)")
    (tmp_path / "params.yaml").write_text(
        "base: {seed: 1, precision: auto}\nadd: {number: 1, micro_batch_tokens: 4096}\n"
    )
    result = run_script(tmp_path, script)
    assert result.returncode == 1
    assert result.stderr.startswith("add: error: out of memory: lower add.micro_batch_tokens")
    assert "Traceback" not in result.stderr


def test_a_second_process_of_a_stage_is_refused_and_told_of_the_first(tmp_path):
    with stage_lock("add", tmp_path):
        result = run(tmp_path, 5)
    assert result.returncode == 1
    assert (
        f"process {os.getpid()} still runs this stage here" in result.stderr and "Traceback" not in result.stderr
    )
    assert not (tmp_path / "reports").exists()
    assert run(tmp_path, 5).returncode == 0


def test_a_folder_that_takes_no_lock_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    result = run(tmp_path, 5)
    assert result.returncode == 1
    assert result.stderr.startswith("add: error: checkpoints") and "cannot be locked" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_disk_without_locks_is_refused_and_gets_no_marker_that_outlives_a_kill(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="cannot be locked"), stage_lock("add", tmp_path):
        pass
    assert not (tmp_path / "checkpoints/add.pid").exists()


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from stages.lib.run.stage import stage_lock
with stage_lock("add", Path({str(tmp_path)!r})):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run_script(tmp_path, script).returncode == -9
    assert run(tmp_path, 5).returncode == 0
