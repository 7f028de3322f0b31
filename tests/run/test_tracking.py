"""Accelerate's trackers, only where the environment asks for them."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from accelerate import tracking as accelerate_tracking

from stages.lib.run.errors import UserError
from stages.lib.run.params import Section
from stages.lib.run.tracking import tracked
from tests.conftest import REPO


class Params(Section):
    beta: float = 0.5
    max_grad_norm: float | None = None


@pytest.fixture
def recorder(monkeypatch):
    """Registers the tracker `recorder` with Accelerate; gives what reached it."""
    calls = []

    class Recorder(accelerate_tracking.GeneralTracker):
        name = "recorder"
        requires_logging_directory = False
        tracker = None

        def __init__(self, project):
            super().__init__()
            calls.append(("project", project))

        def store_init_configuration(self, values):
            calls.append(("configuration", values))

        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    monkeypatch.setitem(accelerate_tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    return calls


def test_off_by_default_without_importing_a_tracker():
    script = """
import sys
from stages.lib.run.params import Base
from stages.lib.run.tracking import tracked
with tracked("train_dpo", Base(seed=1, precision="fp32")) as log:
    log({"step": 1, "loss": 0.7})
assert not {"accelerate", "wandb", "tensorboard"} & set(sys.modules)
"""
    environment = {"PYTHONPATH": str(REPO), "PATH": "/usr/bin:/bin"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)


def test_rows_reach_the_tracker_under_their_step(monkeypatch, recorder):
    monkeypatch.setenv("TRACK", " recorder,recorder ")
    with tracked("train_dpo", Params()) as log:
        log({"step": 3, "loss": 0.7})
        log({"step": 4, "loss": 0.6})
    assert recorder == [
        ("project", "train_dpo"),
        ("configuration", {"beta": 0.5, "max_grad_norm": "None"}),
        (3, {"loss": 0.7}),
        (4, {"loss": 0.6}),
        "finished",
    ]


def test_a_failed_run_is_finished_too(monkeypatch, recorder):
    monkeypatch.setenv("TRACK", "recorder")
    with pytest.raises(ZeroDivisionError), tracked("train_dpo", Params()):
        raise ZeroDivisionError
    assert recorder[-1] == "finished"


def test_only_the_main_process_sends(monkeypatch, recorder):
    monkeypatch.setenv("TRACK", "recorder")
    monkeypatch.setenv("RANK", "1")
    with tracked("train_dpo", Params()) as log:
        log({"step": 3, "loss": 0.7})
    assert recorder == []


def test_an_unknown_and_a_missing_tracker_are_named(monkeypatch):
    monkeypatch.setenv("TRACK", "wandbb")
    with pytest.raises(UserError, match="TRACK=wandbb: unknown; Accelerate knows .*wandb.*trackio"):
        with tracked("train_dpo", Params()):
            pass
    monkeypatch.setattr(accelerate_tracking, "_available_trackers", [])
    monkeypatch.setenv("TRACK", "comet_ml")
    with pytest.raises(UserError, match="TRACK=comet_ml: not installed; pip install comet-ml"):
        with tracked("train_dpo", Params()):
            pass


@pytest.mark.skipif(find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_writes_what_its_own_reader_reads(monkeypatch, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRACK", "tensorboard")
    with tracked("train_dpo", Params()) as log:
        log({"step": 3, "rewards/margins": 0.75})
    events = EventAccumulator(str(Path("runs/train_dpo"))).Reload()
    (point,) = events.Scalars("rewards/margins")
    assert (point.step, point.value) == (3, 0.75)
