"""W&B only where the environment asks for it."""

import builtins
import sys
import types
from contextlib import contextmanager

import pytest

from stages.lib.run.errors import UserError
from stages.lib.run.params import Section
from stages.lib.run.tracking import tracked


class Params(Section):
    beta: float = 0.5


def test_off_by_default_without_importing_wandb(monkeypatch):
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    real_import = builtins.__import__

    def no_wandb(name, *args, **kwargs):
        assert name != "wandb"
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_wandb)
    with tracked("train_dpo", Params()) as log:
        log({"step": 1, "loss": 0.7})


def test_rows_reach_wandb_under_their_step(monkeypatch):
    calls = []

    class Run:
        def log(self, row, step):
            calls.append((row, step))

    @contextmanager
    def init(**kwargs):
        calls.append(kwargs)
        yield Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    monkeypatch.setenv("WANDB_PROJECT", "align")
    with tracked("train_dpo", Params()) as log:
        log({"step": 3, "loss": 0.7})
    assert calls == [{"project": "align", "name": "train_dpo", "config": {"beta": 0.5}}, ({"loss": 0.7}, 3)]


def test_a_missing_wandb_is_a_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setenv("WANDB_PROJECT", "align")
    with pytest.raises(UserError, match="pip install wandb"), tracked("train_dpo", Params()):
        pass
