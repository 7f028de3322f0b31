"""Whole stages, and the whole pipeline, on machines that are not here: a T4, and a device without float64."""

import pytest
import torch
from accelerate.state import AcceleratorState

from stages import reference_logps, train_dpo
from stages.lib.model.attention import use_packed_attention
from stages.lib.model.logps import CompletionLogps, TokenLogps
from stages.lib.model.packing import pack
from tests import test_train_ppo
from tests.conftest import copy_of_project, dvc
from tests.support.fake_gpu import OnGpu, install
from tests.test_train_dpo import BASE, PARAMS, history_of, project  # noqa: F401

MACHINES = {"a T4": ((7, 5), False), "no float64": ((0, 0), True)}
TEXTS = [([5, 6, 7], [8, 2]), ([5, 6, 9, 10], [11, 12, 2]), ([5, 6, 7], [13, 2])]


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    OnGpu.waits.clear()


@pytest.mark.parametrize("module", [CompletionLogps, lambda model: TokenLogps(model, 0.7)])
def test_a_micro_batch_makes_the_host_wait_for_nothing(tiny_model, monkeypatch, module):
    install(monkeypatch.setattr, (7, 5), True)
    monkeypatch.setattr("stages.lib.model.logps.GPU_SLICE_ELEMENTS", 700)  # several slices of the vocabulary
    policy = module(tiny_model)
    batch = pack(*zip(*TEXTS, strict=True)).to(torch.device("cpu"))
    with use_packed_attention(tiny_model):
        output = policy(batch)
    logps = output if isinstance(output, torch.Tensor) else output[0]
    assert isinstance(logps, OnGpu)
    logps.sum().backward()
    assert not OnGpu.waits and tiny_model.lm_head.weight.grad is not None


@pytest.mark.parametrize("machine", MACHINES)
def test_dpo_trains_as_on_a_cpu(project, monkeypatch, machine):  # noqa: F811
    params = PARAMS.replace(learning_rate=5e-5, max_steps=5, eval_steps=0)
    train_dpo.main(BASE, params, project)
    expected = history_of(project)
    AcceleratorState._reset_state(reset_partial_state=True)
    install(monkeypatch.setattr, *MACHINES[machine])
    reference_logps.main(BASE, reference_logps.Params(micro_batch_tokens=2000), project)
    OnGpu.waits.clear()
    train_dpo.main(BASE, params, project)
    for one, other in zip(expected, history_of(project), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    assert set(OnGpu.waits) <= {"cpu"}  # of metrics, once a batch, and of what looks read


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("kind", ["frozen", "separate"])
def test_ppo_trains_as_on_a_cpu(tmp_path, tokenizer, monkeypatch, machine, kind):
    root = test_train_ppo.write_project(tmp_path, tokenizer)
    params = test_train_ppo.KINDS[kind].replace(episodes=16)
    expected = test_train_ppo.run(root, params)
    install(monkeypatch.setattr, *MACHINES[machine])
    for one, other in zip(expected, test_train_ppo.run(root, params), strict=True):
        assert one == pytest.approx(other, abs=5e-4)
    assert set(OnGpu.waits) <= {"cpu", "tolist"}


SITE = """
    sys.path.insert(0, {repo!r})
    import importlib
    for name in ("train_dpo", "train_ppo", "score_responses", "analyze_logps", "train_judge", "train_reward"):
        importlib.import_module(f"stages.{{name}}")
    from tests.support.fake_gpu import install
    install(setattr, {capability!r}, {refuses_float64!r})
"""


@pytest.mark.slow
@pytest.mark.parametrize("machine", MACHINES)
def test_the_whole_smoke_pipeline_runs(tmp_path, monkeypatch, machine):
    capability, refuses_float64 = MACHINES[machine]
    root = copy_of_project(tmp_path / "project")
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text(
        SITE.format(repo=str(root), capability=capability, refuses_float64=refuses_float64)
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    dvc(root, "exp", "run", *(root / "recipes/smoke.txt").read_text().split())
    assert (root / "reports/index.html").exists()
