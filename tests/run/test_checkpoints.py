"""Killed with kill -9 at any moment and run again, a training stage ends in the same bytes as one left alone.

Each life of a stage is a forked process, so that a life costs no imports and dies as a killed process does.
"""

import contextlib
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch

from stages import reference_logps, train_dpo, train_ppo, train_reward
from stages.lib.data.chat import apply_chat_template, to_implicit_prompt_preferences, tokenize_row
from stages.lib.model.loading import save_model, set_seed
from stages.lib.model.reward import new_reward_model
from stages.lib.run import artefacts, checkpoints
from stages.lib.run.artefacts import write_parquet
from stages.lib.run.checkpoints import Checkpoints, Stopped, key_of
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base
from tests.conftest import REPO
from tests.support.corrupted_tables import write_negatives, write_reward_negatives

BASE = Base(seed=42, precision="fp32")
DPO = train_dpo.Params(
    loss="sigmoid",
    beta=0.1,
    label_smoothing=0.0,
    sft_coef=0.0,
    learning_rate=1.0e-3,
    schedule="linear",
    warmup_steps=2,
    weight_decay=0.01,
    max_grad_norm=1.0,
    epochs=2,
    max_steps=None,
    batch_size=4,
    hard_negatives=0.5,
    eval_steps=2,
    look_steps=2,
    look_prompts=2,
    response_length=4,
    temperature=0.7,
    micro_batch_tokens=500,
)
REWARD = train_reward.Params(
    backbone="frozen",
    backbone_learning_rate=1e-4,
    center_rewards_coefficient=None,
    learning_rate=1e-2,
    epochs=2,
    batch_size=4,
    logging_steps=2,
    hard_negatives=True,
    micro_batch_tokens=512,
)
PPO = train_ppo.Params(
    policy="base",
    episodes=20,
    batch_size=4,
    num_mini_batches=2,
    answers_per_prompt=1,
    num_ppo_epochs=2,
    learning_rate=1e-3,
    schedule="linear",
    warmup_updates=1,
    adam_beta1=0.5,
    value_learning_rate=1e-3,
    response_length=8,
    temperature=0.7,
    kl_coef=0.05,
    kl_target=1.0,
    kl_estimator="k1",
    target_kl=None,
    missing_eos_penalty=1.0,
    score_norm_episodes=4,
    advantages="gae",
    critic="separate",
    value_warmup_updates=1,
    whiten_advantages=True,
    gamma=1.0,
    lam=0.95,
    cliprange=0.2,
    cliprange_value=0.2,
    vf_coef=0.1,
    max_grad_norm=1.0,
    max_kl=50.0,
    min_entropy=0.0,
    look_prompts=3,
    look_every=2,
    micro_batch_tokens=512,
)
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    monkeypatch.setenv("CHECKPOINT_MINUTES", "0")
    monkeypatch.setattr(train_reward, "CHUNK", 3)
    warnings.filterwarnings("ignore", message=".*use of fork", category=DeprecationWarning)


@pytest.fixture
def project(tiny_base, tokenizer, embedded_pairs) -> Path:
    """A root with a tiny base, 12 training and 4 held-out pairs in both shapes, and reference log-probs."""
    for split, rows in (("train", embedded_pairs[:12]), ("heldout", embedded_pairs[12:16])):
        ids = [
            tokenize_row(apply_chat_template(to_implicit_prompt_preferences(row), tokenizer), tokenizer)
            for row in rows
        ]
        shared = {"row": list(range(1, len(rows) + 1)), "prompt_id": list(range(len(rows)))}
        pairs = {name: pa.array([row[name] for row in ids], pa.list_(pa.int32())) for name in ids[0]}
        write_parquet(tiny_base / f"data/tokenized/pairs_{split}.parquet", shared | pairs)
        whole = {
            f"{side}_ids": [row["prompt_input_ids"] + row[f"{side}_input_ids"] for row in ids]
            for side in ("chosen", "rejected")
        }
        write_parquet(tiny_base / f"data/tokenized/reward_{split}.parquet", shared | whole)
        prompts = {"prompt": [row["prompt"] for row in rows], "input_ids": pairs["prompt_input_ids"]}
        prompts = {"prompt_id": shared["prompt_id"]} | prompts
        name = "judge" if split == "heldout" else split
        write_parquet(tiny_base / f"data/tokenized/prompts_{name}.parquet", prompts)
    write_negatives(tiny_base)
    write_reward_negatives(tiny_base)
    reference_logps.main(BASE, reference_logps.Params(micro_batch_tokens=2000), tiny_base)
    set_seed(1)
    reward_model = new_reward_model(tiny_base / "models/base", tokenizer.pad_token_id)
    save_model(reward_model, tokenizer, tiny_base / "models/reward")
    return tiny_base


STAGES = {
    "train_dpo": (train_dpo.main, DPO, "models/dpo"),
    "train_reward": (train_reward.main, REWARD, "models/reward"),
    "train_ppo": (train_ppo.main, PPO, "models/ppo"),  # 5 updates over 12 prompts: three passes over them
}


def life(stage: str, root: Path, sabotage=None) -> fork.Process:
    """The stage in a process of its own, begun; `sabotage()` runs in it first."""

    def live():
        if sabotage:
            sabotage()
        main, params, _ = STAGES[stage]
        main(BASE, params, root)
        os._exit(0)

    process = fork.Process(target=live, daemon=True)
    process.start()
    return process


def outputs(stage: str, root: Path) -> dict[str, str]:
    """SHA-256 of every file the stage writes."""
    folders = [root / STAGES[stage][2], root / "reports" / stage]
    files = [file for folder in folders for file in sorted(folder.rglob("*")) if file.is_file()]
    assert any(file.suffix == ".safetensors" for file in files) and any(
        file.name == "history.csv" for file in files
    )
    return {file.relative_to(root).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def run_to_the_end(stage: str, root: Path) -> dict[str, str]:
    process = life(stage, root)
    process.join()
    assert process.exitcode == 0
    assert not list((root / "checkpoints").rglob("*.pt")), "a finished run cleans up"
    return outputs(stage, root)


def forget_outputs(stage: str, root: Path) -> None:
    """What DVC does before it runs a stage."""
    shutil.rmtree(root / STAGES[stage][2], ignore_errors=True)
    shutil.rmtree(root / "reports" / stage, ignore_errors=True)


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def dying(module, name: str, when, before: bool = True):
    """Makes `module.name` take the process down just before (or after) the call for which `when(number, args)`."""

    def sabotage():
        function, calls = getattr(module, name), 0

        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            fatal = when(calls, args)
            if fatal and before:
                die()
            result = function(*args, **kwargs)
            if fatal:
                die()
            return result

        setattr(module, name, wrapped)

    return sabotage


def dying_in_mid_save():
    save = torch.save

    def half(state, path):
        save(state, path)
        os.truncate(path, path.stat().st_size // 2)
        die()

    torch.save = half


def goes_to(folder: str):
    return lambda _, args: Path(args[1]).parent.parent.name == folder


MOMENTS = {
    "before the first save": dying(torch, "save", lambda call, _: call == 1),
    "in the middle of a save": dying_in_mid_save,
    "a save complete, not yet renamed": dying(os, "replace", lambda call, _: call == 3),
    "a save just renamed": dying(os, "replace", lambda call, _: call == 4, before=False),
    "a model half moved in": dying(os, "replace", goes_to("models"), before=False),
    "outputs written, checkpoint not yet removed": dying(
        shutil, "rmtree", lambda _, args: "checkpoints" in Path(args[0]).parts
    ),
}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_every_delicate_moment_it_ends_in_the_same_bytes(project, stage):
    expected = run_to_the_end(stage, project)
    forget_outputs(stage, project)
    for (
        moment,
        sabotage,
    ) in MOMENTS.items():  # one after the other: each life goes on from the last one's checkpoint
        process = life(stage, project, sabotage)
        process.join()
        assert process.exitcode == -signal.SIGKILL, moment
        forget_outputs(stage, project)
    assert run_to_the_end(stage, project) == expected


def kill_at_random(stage: str, project: Path, kills: int, seed: int) -> int:
    """Kills lives of the stage at random times and compares those that end; how many began from a checkpoint."""
    began = time.monotonic()
    expected = run_to_the_end(stage, project)
    span = time.monotonic() - began
    forget_outputs(stage, project)
    moments, killed, resumed = random.Random(seed), 0, 0
    while killed < kills:
        found = bool(list(project.glob("checkpoints/*/*/checkpoint.pt")))
        process = life(stage, project)
        process.join(moments.uniform(0, 0.9 * span))
        process.kill()
        process.join()
        if process.exitcode == 0:
            assert outputs(stage, project) == expected
        else:
            killed += 1
        resumed += found
        forget_outputs(stage, project)
    assert run_to_the_end(stage, project) == expected
    return resumed


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_many_random_moments_it_ends_in_the_same_bytes(project, stage):
    assert kill_at_random(stage, project, kills=50, seed=2) > 10


def test_sigterm_saves_and_ends_and_the_next_run_goes_on(project, monkeypatch, capsys):
    expected = run_to_the_end("train_dpo", project)
    forget_outputs("train_dpo", project)
    monkeypatch.setenv("CHECKPOINT_MINUTES", "60")
    step = checkpoints.Checkpoints.save_if_due

    def third_step(self, **values):
        if len(values["history"]) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        step(self, **values)

    monkeypatch.setattr(Checkpoints, "save_if_due", third_step)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM; `dvc repro` goes on from .*checkpoint.pt"):
        train_dpo.main(BASE, DPO, project)
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (project / "models/dpo").exists()
    monkeypatch.setattr(Checkpoints, "save_if_due", step)
    train_dpo.main(BASE, DPO, project)
    assert "train_dpo: goes on from" in capsys.readouterr().out
    assert outputs("train_dpo", project) == expected


class Box:
    """The smallest thing with a state."""

    def __init__(self, value: int = 0):
        self.value = value

    def state_dict(self):
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]


def saved_once(root: Path, base=BASE, params=DPO) -> Path:
    """A checkpoint of an interrupted run."""
    with pytest.raises(KeyboardInterrupt), Checkpoints("train_dpo", root, base, params) as stage:
        stage.load(box=Box())
        stage.save_if_due(step=1)
        raise KeyboardInterrupt
    assert stage.path.exists()
    return stage.path


def test_a_checkpoint_of_other_params_is_never_picked_up(project):
    path = saved_once(project)
    for base, params in ((BASE.replace(seed=1), DPO), (BASE, DPO.replace(beta=0.2))):
        with Checkpoints("train_dpo", project, base, params) as stage:
            assert stage.load(box=Box()) == {}
    assert path.exists(), "another run's checkpoint is left alone"
    with Checkpoints("train_dpo", project, BASE, DPO) as stage:
        assert stage.load(box=Box()) == {"step": 1}
    assert not path.exists()


@pytest.mark.parametrize(
    "dep",
    ["data/tokenized/pairs_train.parquet", "data/reference_logps/fingerprint.json", "models/base/config.json"],
)
def test_a_checkpoint_of_other_deps_is_never_picked_up(project, dep):
    before = key_of("train_dpo", project, BASE, DPO)
    with open(project / dep, "ab") as file:
        file.write(b" ")
    assert key_of("train_dpo", project, BASE, DPO) != before


def test_a_checkpoint_of_other_code_is_never_picked_up(project, tmp_path_factory, monkeypatch):
    before = key_of("train_dpo", project, BASE, DPO)
    copy = tmp_path_factory.mktemp("project")
    shutil.copy(checkpoints.PROJECT / "dvc.yaml", copy)
    shutil.copytree(checkpoints.PROJECT / "stages", copy / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(checkpoints, "PROJECT", copy)
    assert key_of("train_dpo", project, BASE, DPO) == before
    with open(copy / "stages/lib/rl/dpo.py", "a") as file:
        file.write("# another loss\n")
    assert key_of("train_dpo", project, BASE, DPO) != before


def test_every_random_generator_goes_on_where_it_was(project):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    with pytest.raises(KeyboardInterrupt), Checkpoints("train_dpo", project, BASE, DPO) as stage:
        stage.load()
        draw()
        stage.save_if_due()
        expected = draw()
        raise KeyboardInterrupt
    draw()
    with Checkpoints("train_dpo", project, BASE, DPO) as stage:
        stage.load()
        assert draw() == expected


def test_saves_come_as_often_as_the_environment_says(project, monkeypatch):
    monkeypatch.setenv("CHECKPOINT_MINUTES", "10")
    now = 0.0
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: now)
    with Checkpoints("train_dpo", project, BASE, DPO) as stage:
        stage.load(box=Box(3))
        stage.save_if_due(step=1)
        assert not stage.path.exists()
        now = 600.0
        stage.save_if_due(step=2)
        saved_at = stage.path.stat().st_mtime_ns
        now = 1100.0
        stage.save_if_due(step=3)
        assert stage.path.stat().st_mtime_ns == saved_at
    monkeypatch.setenv("CHECKPOINT_MINUTES", "often")
    with pytest.raises(UserError, match="CHECKPOINT_MINUTES=often: must be a number of minutes"):
        Checkpoints("train_dpo", project, BASE, DPO)


def test_a_damaged_checkpoint_is_named(project):
    path = saved_once(project)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="checkpoint.pt: cannot be read .* delete it to start afresh"):
        Checkpoints("train_dpo", project, BASE, DPO).load(box=Box())


def test_a_checkpoint_that_carries_code_is_refused(project):
    path = saved_once(project)
    torch.save({"values": Box()}, path)  # a pickled object of a class of ours: could be anyone's code
    with pytest.raises(UserError, match="cannot be read"):
        Checkpoints("train_dpo", project, BASE, DPO).load(box=Box())


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(project, monkeypatch, capsys):
    path = saved_once(project)
    before = path.read_bytes()
    monkeypatch.setattr(artefacts.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(KeyboardInterrupt), Checkpoints("train_dpo", project, BASE, DPO) as stage:
        stage.load(box=Box())
        stage.save_if_due(step=2, weights=torch.zeros(500_000))
        raise KeyboardInterrupt
    message = capsys.readouterr().err
    assert (
        "goes on without a new checkpoint" in message
        and "checkpoint.pt: no room to write it: it needs 2.0 MB" in message
    )
    assert path.read_bytes() == before


def test_only_the_main_process_saves_and_all_load(project, monkeypatch):
    saved_once(project)
    monkeypatch.setenv("RANK", "1")
    with Checkpoints("train_dpo", project, BASE, DPO) as stage:
        assert stage.load(box=Box()) == {"step": 1}
        saved_at = stage.path.stat().st_mtime_ns
        stage.save_if_due(step=2)
    assert stage.path.stat().st_mtime_ns == saved_at, "neither written nor removed"


def test_a_sharded_run_neither_saves_nor_loads(project):
    # the main process holds only its part of the weights: its checkpoint would be a part, too
    path = saved_once(project)
    written = path.stat().st_mtime_ns
    stage = Checkpoints("train_dpo", project, BASE, DPO, sharded=True)
    assert stage.load(box=Box()) == {}
    stage.save_if_due(step=2)
    assert path.stat().st_mtime_ns == written
    with stage, pytest.raises(UserError, match="stopped by SIGTERM without a checkpoint"):
        os.kill(os.getpid(), signal.SIGTERM)
        stage.save_if_due(step=3)


def test_signals_are_left_alone_outside_the_main_thread(project):
    failures = []

    def work():
        try:
            with Checkpoints("train_dpo", project, BASE, DPO):
                pass
        except ValueError as error:  # signal only works in main thread
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures


def test_a_checkpoint_of_a_precision_without_a_loss_scale_is_taken_up_with_a_fresh_one(project, capsys):
    saved_once(project)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pytest.raises(KeyboardInterrupt), Checkpoints("train_dpo", project, BASE, DPO) as stage:
        assert stage.load(box=Box(), scaler=scaler) == {"step": 1}
        assert "train_dpo: the checkpoint has no scaler, being of another precision" in capsys.readouterr().out
        assert scaler.get_scale() == 8.0
        stage.save_if_due(step=2)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), Checkpoints("train_dpo", project, BASE, DPO) as stage:
        assert stage.load(box=Box(), scaler=None) == {"step": 2}  # and back again
        stage.save_if_due(step=3)
        raise KeyboardInterrupt
    disabled = torch.amp.GradScaler("cpu", enabled=False)  # its state is empty, and it refuses any
    with pytest.raises(KeyboardInterrupt), Checkpoints("train_dpo", project, BASE, DPO) as stage:
        stage.load(box=Box(), scaler=disabled)
        stage.save_if_due(step=4)
        raise KeyboardInterrupt
    with Checkpoints("train_dpo", project, BASE, DPO) as stage:
        assert stage.load(box=Box(), scaler=torch.amp.GradScaler("cpu")) == {"step": 4}


def process_of_two(rank: int, port: int, root: Path, ready) -> fork.Process:
    """One of two processes of train_dpo. The main one takes its time over a save, and says when it begins its third
    step."""

    def live():
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true", "CHECKPOINT_MINUTES": "60"}
        torch.set_num_threads(1)
        save, run_batch, steps = torch.save, train_dpo.run_batch, 0

        def slow_save(state, target, **how):
            save(state, target, **how)
            if isinstance(target, Path):
                os.truncate(target, 100)
                time.sleep(0.5)
                save(state, target, **how)

        def noted(*args, **how):
            nonlocal steps
            steps += torch.is_grad_enabled()
            if steps == 3 and rank == 0:
                ready.set()
            return run_batch(*args, **how)

        torch.save, train_dpo.run_batch = slow_save, noted
        try:
            train_dpo.main(BASE, DPO, root)
        except Stopped:
            os._exit(1)  # as run_stage does
        os._exit(0)

    process = fork.Process(target=live, daemon=True)
    process.start()
    return process


def launch(root: Path, signals) -> list[int]:
    """Both processes under a launcher: it ends those that are left once one has failed. Their exit codes.

    Args:
        signals: called with both process ids when the third step begins.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ready = fork.Event()
    processes = [process_of_two(rank, port, root, ready) for rank in range(2)]
    if signals and ready.wait(60):
        signals(*(process.pid for process in processes))
    multiprocessing.connection.wait([process.sentinel for process in processes])
    for process in processes:
        if any(other.exitcode for other in processes):  # torchrun: SIGTERM, and after 30 seconds SIGKILL
            process.terminate()
    for process in processes:
        process.join(30)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def to_main(main: int, _: int) -> None:
    os.kill(main, signal.SIGTERM)


def to_both(main: int, other: int) -> None:
    for process in (main, other):
        os.kill(process, signal.SIGTERM)


def to_all_and_passed_on(main: int, other: int) -> None:
    """As Ctrl-C in a terminal: the processes have the signal already when their launcher passes it on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        for process in (main, other):
            os.kill(process, number)
        time.sleep(0.05)


@pytest.mark.parametrize("signals", [to_main, to_both, to_all_and_passed_on])
def test_two_processes_asked_to_end_have_saved_and_go_on_to_the_same_bytes(project, signals):
    assert launch(project, None) == [0, 0]
    expected = outputs("train_dpo", project)
    forget_outputs("train_dpo", project)
    assert launch(project, signals) == [
        1,
        1,
    ]  # by themselves: a process that the launcher had to kill would say so
    (saved,) = project.glob("checkpoints/train_dpo/*/checkpoint.pt")
    assert len(torch.load(saved, weights_only=True)["values"]["history"]) == 3
    assert launch(project, None) == [0, 0]
    assert outputs("train_dpo", project) == expected


TORCHRUN = """
import sys
from pathlib import Path
import torch
from stages import train_dpo
from stages.lib.run import checkpoints
from stages.lib.run.errors import UserError
from tests.run.test_checkpoints import BASE, DPO
torch.set_num_threads(1)
root = Path(sys.argv[1])
run_batch = train_dpo.run_batch
def noted(*args, **how):
    if torch.is_grad_enabled():
        (root / "begun").touch()
    return run_batch(*args, **how)
train_dpo.run_batch = noted
try:
    train_dpo.main(BASE, DPO, root)
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["main process", "all at once", "launcher"])
def test_under_torchrun_a_sigterm_of_any_kind_leads_to_the_same_bytes(project, way):
    script = project / "script.py"
    script.write_text(TORCHRUN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "CHECKPOINT_MINUTES": "60"}

    def run(delay: float | None) -> int:
        (project / "begun").unlink(missing_ok=True)
        launcher = subprocess.Popen(
            [*command, str(project)], cwd=REPO, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
        )
        if delay is not None:
            while not (project / "begun").exists() and launcher.poll() is None:
                time.sleep(0.02)
            time.sleep(delay)
            with contextlib.suppress(psutil.Error, ProcessLookupError):  # it may have ended by itself
                if way == "main process":
                    for child in psutil.Process(launcher.pid).children(recursive=True):
                        if child.environ().get("RANK") == "0":
                            child.terminate()
                elif way == "launcher":
                    launcher.terminate()
                else:
                    os.killpg(launcher.pid, signal.SIGTERM)
        return launcher.wait(120)

    assert run(None) == 0
    expected = outputs("train_dpo", project)
    moments, killed = random.Random(3), 0
    while killed < 20:
        forget_outputs("train_dpo", project)
        if run(moments.uniform(0, 0.4)) == 0:
            assert outputs("train_dpo", project) == expected
        else:
            killed += 1
            if not list(project.glob("checkpoints/train_dpo/*/checkpoint.pt")):
                # it came when training was over and its checkpoint gone: all has been written then
                assert outputs("train_dpo", project) == expected, "the last save is whole"
    forget_outputs("train_dpo", project)
    assert run(None) == 0 and outputs("train_dpo", project) == expected
