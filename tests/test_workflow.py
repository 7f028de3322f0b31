"""What a user does with DVC around the pipeline: two clones and a remote, interrupted pushes and trainings."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.lib.run.artefacts import sha256_of_file
from tests.conftest import dvc

KEPT = ("dvc.lock", "params.yaml", "reports")


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True)


def set_beta(root: Path, beta: float) -> None:
    yaml = YAML()
    params = yaml.load((root / "params.yaml").read_text())
    assert params["train_dpo"]["beta"] != beta
    params["train_dpo"]["beta"] = beta
    with open(root / "params.yaml", "w") as file:
        yaml.dump(params, file)


def begin_dvc(root: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    """`dvc ARGUMENTS`, begun, in a session of its own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        env=os.environ | {"PATH": path} | environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def wait_for(condition, seconds: float = 120):
    """The first true value of `condition()`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.002)
    raise AssertionError("waited in vain")


def files_in(folder: Path) -> int:
    return sum(path.is_file() for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def laptop(smoke_project, tmp_path_factory) -> Path:
    """The smoke run as its user commits it, on the smoke project's cache, with a folder as DVC's remote."""
    root, remote = tmp_path_factory.mktemp("laptop"), tmp_path_factory.mktemp("remote")
    git(smoke_project, "clone", "-q", str(smoke_project), str(root))
    for name in KEPT:
        if (smoke_project / name).is_dir():
            shutil.copytree(smoke_project / name, root / name, dirs_exist_ok=True)
        else:
            shutil.copy(smoke_project / name, root / name)
    dvc(root, "cache", "dir", "--local", str(smoke_project / ".dvc/cache"))
    dvc(root, "remote", "add", "--default", "shared", str(remote))
    for name, value in (("user.name", "Test"), ("user.email", "test@example.org")):
        git(root, "config", name, value)
    git(root, "add", "-A")
    git(root, "commit", "-q", "-m", "The smoke run")
    dvc(root, "checkout")
    return root


@pytest.fixture(scope="module")
def machine(laptop, tmp_path_factory) -> Path:
    """A second clone with nothing but the commits and what `dvc pull` brings."""
    dvc(laptop, "push")
    root = tmp_path_factory.mktemp("machine")
    git(laptop, "clone", "-q", str(laptop), str(root))
    dvc(root, "pull")
    return root


def test_a_push_killed_midway_is_completed_by_the_next(laptop, tmp_path):
    remote = tmp_path / "remote"
    dvc(laptop, "remote", "add", "killed", str(remote))
    try:
        push = begin_dvc(laptop, "push", "--remote", "killed", "--jobs", "1")
        wait_for(lambda: files_in(remote) >= 2)
        os.killpg(push.pid, signal.SIGKILL)
        push.wait()
        dvc(laptop, "push", "--remote", "killed")
        in_sync = dvc(laptop, "status", "--cloud", "--remote", "killed").stdout
    finally:
        dvc(laptop, "remote", "remove", "killed")
    assert "in sync" in in_sync
    # each object is named after the MD5 of its content: a torn one would be found out here
    for path in (remote / "files/md5").rglob("*"):
        if path.is_file() and not path.name.endswith(".dir"):
            command = ["md5sum", str(path)]
            md5 = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
            assert path.name.endswith(".tmp") or md5 == path.parent.name + path.name


def test_after_a_pull_repro_runs_nothing(laptop, machine):
    assert sha256_of_file(machine / "models/ppo/model.safetensors") == sha256_of_file(
        laptop / "models/ppo/model.safetensors"
    )
    began = time.monotonic()
    output = dvc(machine, "repro").stdout
    assert "Running stage" not in output and "up to date" in output
    assert time.monotonic() - began < 15  # under 5 seconds on a machine that does nothing else
    command = ["git", "status", "--porcelain"]
    assert not subprocess.run(command, cwd=machine, capture_output=True, text=True, check=True).stdout


def test_after_a_changed_beta_only_what_depends_on_it_runs(machine):
    before = (machine / "params.yaml").read_text()
    try:
        set_beta(machine, 0.7)
        output = dvc(machine, "repro", "train_dpo").stdout
        assert re.findall(r"Running stage '(\w+)'", output) == ["train_dpo"]  # after four that did not
        changed = set(YAML(typ="safe").load(dvc(machine, "status", "--json").stdout))
    finally:
        (machine / "params.yaml").write_text(before)
    assert changed == {"sample_responses", "score_responses", "analyze_logps", "publish_hub", "build_report"}


def processes_of(root: Path, stage: str) -> list[int]:
    """Ids of the processes that run the stage in `root`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "cwd") == str(root) and f"stages.{stage}" in (folder / "cmdline").read_text():
                found.append(int(folder.name))
        except OSError:  # gone, or another user's
            continue
    return found


@pytest.mark.slow
def test_dvc_killed_then_its_orphan_killed_then_repro_goes_on_to_the_same_bytes(machine):
    names = ("models/dpo/model.safetensors", "reports/train_dpo/history.csv", "reports/train_dpo/heldout.csv")
    before = (machine / "params.yaml").read_text()
    try:
        set_beta(machine, 0.4)
        dvc(machine, "repro", "train_dpo")
        expected = [sha256_of_file(machine / name) for name in names]
        for epochs in (2, 1):  # a killed run of other parameters leaves a checkpoint; it must not be taken
            yaml = YAML()
            params = yaml.load((machine / "params.yaml").read_text())
            params["train_dpo"]["epochs"] = epochs
            with open(machine / "params.yaml", "w") as file:
                yaml.dump(params, file)
            known = set(machine.glob("checkpoints/train_dpo/*/checkpoint.pt"))
            running = begin_dvc(machine, "repro", "--force", "--single-item", "train_dpo", CHECKPOINT_MINUTES="0")
            wait_for(lambda known=known: set(machine.glob("checkpoints/train_dpo/*/checkpoint.pt")) - known)
            os.kill(running.pid, signal.SIGKILL)  # dvc alone: the stage lives on
            running.wait()
            orphans = processes_of(machine, "train_dpo")
            for pid in orphans:
                os.kill(pid, signal.SIGSTOP)  # hold it there: it would soon be done
            if epochs == 1:
                refused = dvc(machine, "repro", "--force", "--single-item", "train_dpo", check=False)
                assert refused.returncode != 0
                assert re.search(r"process \d+ still runs this stage here", refused.stdout + refused.stderr)
            for pid in orphans:
                os.kill(pid, signal.SIGKILL)
        output = dvc(machine, "repro", "--force", "--single-item", "train_dpo")
        assert "train_dpo: goes on from checkpoints/train_dpo/" in output.stdout + output.stderr
        assert [sha256_of_file(machine / name) for name in names] == expected
        assert len(list(machine.glob("checkpoints/train_dpo/*/checkpoint.pt"))) == 1  # the run of two epochs
    finally:
        (machine / "params.yaml").write_text(before)


@pytest.mark.slow
def test_two_fresh_clones_give_the_same_hashes_for_every_stage_but_the_report(smoke_project, tmp_path):
    clone = tmp_path / "clone"
    git(smoke_project, "clone", "-q", str(smoke_project), str(clone))
    dvc(clone, "exp", "run", *(clone / "recipes/smoke.txt").read_text().split())
    ours, theirs = (
        YAML(typ="safe").load((root / "dvc.lock").read_text())["stages"] for root in (smoke_project, clone)
    )
    assert len(ours) == 11 and ours.keys() == theirs.keys()
    for stage in ours:
        if stage != "build_report":  # shows seconds and memory
            assert ours[stage] == theirs[stage], stage
