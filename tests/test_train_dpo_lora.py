"""train_dpo with adapters: what TRL trains, from ln 2 on; the same once resumed, in fp16 and in two processes."""

import math
import os
import signal

import pytest
import torch
from accelerate.state import AcceleratorState
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from stages import reference_logps, train_dpo
from stages.lib.model.adapters import Lora
from stages.lib.model.memory import memory_dial
from stages.lib.run.artefacts import read_parquet
from stages.lib.run.checkpoints import Stopped
from stages.lib.run.params import Base
from tests.support import fp16_on_cpu
from tests.support.two_processes import run_in_two
from tests.test_train_dpo import BASE, PARAMS, history_of, write_project

LORA = PARAMS.replace(
    lora=Lora(rank=4, alpha=8.0, dropout=0.0, targets="all-linear"), learning_rate=1e-2, max_steps=3, batch_size=2
)


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")


@pytest.fixture
def project(tiny_base, tokenizer, embedded_pairs):
    """A root with a tiny base and the shortest pairs: 6 to train on, 2 held out."""
    rows = sorted(embedded_pairs, key=lambda row: len(row["chosen"] + row["rejected"]))[:8]
    return write_project(tiny_base, tokenizer, rows[:6], rows[6:])


def run(project, params=LORA, base=BASE) -> list[dict[str, float]]:
    AcceleratorState._reset_state(reset_partial_state=True)
    train_dpo.main(base, params, project)
    return history_of(project)


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_it_starts_at_ln_2_learns_and_leaves_base_plus_adapter_in_both_forms(project, monkeypatch):
    before = weights_of(project / "models/base")
    history = run(project)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert history[-1]["loss"] < 0.67
    full, base = weights_of(project / "models/dpo"), weights_of(project / "models/base")
    assert full.keys() == base.keys() and {weight.dtype for weight in full.values()} == {torch.float32}
    assert all(torch.equal(before[name], base[name]) for name in base)
    changed = {name for name in base if not torch.equal(full[name], base[name])}
    assert changed == {name for name in base if "_proj" in name}  # no norm, and not the tied embedding
    monkeypatch.chdir(project)  # the adapter names models/base
    by_peft = AutoPeftModelForCausalLM.from_pretrained(
        "models/dpo/adapter", dtype=torch.float32
    ).merge_and_unload()
    for name, weight in by_peft.state_dict().items():
        if name in full:
            assert torch.equal(weight, full[name]), name
    ids = torch.arange(20)[None]
    loaded = AutoModelForCausalLM.from_pretrained("models/dpo", dtype=torch.float32)  # as every later stage does
    assert torch.equal(loaded(ids).logits, by_peft(ids).logits)
    assert not (project / "models/dpo/adapter/README.md").exists()
    # what the looks' answers were under the base is that of the adapters switched off
    course = read_parquet(project / "data/courses/dpo.parquet")
    assert course["ref_logp"][:2] == pytest.approx(course["logp"][:2], abs=1e-4)
    assert course["ref_logp"][-2:] != pytest.approx(course["logp"][-2:], abs=1e-2)


def test_a_full_run_leaves_no_adapter_of_an_earlier_one(project):
    run(project)
    run(project, LORA.replace(lora=LORA.lora.replace(rank=None), max_steps=1))
    assert not (project / "models/dpo/adapter").exists()


def test_chosen_layers_alone_change(project):
    run(project, LORA.replace(lora=LORA.lora.replace(targets=["q_proj", "v_proj"])))
    full, base = weights_of(project / "models/dpo"), weights_of(project / "models/base")
    changed = {name for name in base if not torch.equal(full[name], base[name])}
    assert changed == {name for name in base if "q_proj" in name or "v_proj" in name}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_holds_the_base_and_the_adapters_learn(project, monkeypatch, precision):
    base, seen = Base(seed=42, precision=precision), {}
    if precision == "fp16":
        monkeypatch.setattr(train_dpo, "make_accelerator", fp16_on_cpu.make_accelerator)
    reference_logps.main(base, reference_logps.Params(micro_batch_tokens=2000), project)
    add_adapters = train_dpo.add_adapters

    def watched(model, *args):
        adapted = add_adapters(model, *args)
        seen.update({name: weight.dtype for name, weight in model.named_parameters()})
        return adapted

    monkeypatch.setattr(train_dpo, "add_adapters", watched)
    history = run(project, base=base)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=0.01)
    assert [row["skipped"] for row in history] == [0, 0, 0] and history[-1]["loss"] < 0.68
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    assert {dtype for name, dtype in seen.items() if "base_layer" in name} == {half}
    assert {dtype for name, dtype in seen.items() if "lora_" in name} == {torch.float32}
    full, start = weights_of(project / "models/dpo"), weights_of(project / "models/base")
    moved = full["model.layers.0.mlp.up_proj.weight"] - start["model.layers.0.mlp.up_proj.weight"]
    assert torch.linalg.matrix_rank(moved, atol=1e-6) <= 4  # the base itself was rounded nowhere


def test_a_stopped_run_goes_on_to_the_same_bytes(project, monkeypatch):
    """With dropout, whose random numbers a checkpoint keeps too."""
    params = LORA.replace(lora=LORA.lora.replace(dropout=0.2))
    run(project, params)
    expected = {file.name: file.read_bytes() for file in sorted(project.glob("models/dpo/**/*.safetensors"))}
    history = history_of(project)
    run_batch, calls = train_dpo.run_batch, []

    def stopping(*args, **how):
        calls.append(torch.is_grad_enabled())
        if calls == [False, True, True]:  # an evaluation, the first step, the second
            os.kill(os.getpid(), signal.SIGTERM)
        return run_batch(*args, **how)

    monkeypatch.setattr(train_dpo, "run_batch", stopping)
    with pytest.raises(Stopped):
        run(project, params)
    (checkpoint,) = project.glob("checkpoints/train_dpo/*/checkpoint.pt")
    kept = torch.load(checkpoint, weights_only=True)["tracked"]["learner"]["model"]
    assert kept and all("lora_" in name for name in kept)
    assert run(project, params) == history
    assert expected == {
        file.name: file.read_bytes() for file in sorted(project.glob("models/dpo/**/*.safetensors"))
    }


SCRIPT = """
import sys
from pathlib import Path
from stages import train_dpo
from tests.test_train_dpo_lora import BASE, LORA
train_dpo.main(BASE, LORA, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_two_processes_train_as_one(project):
    single, weights = run(project), weights_of(project / "models/dpo")
    run_in_two(SCRIPT, project)
    for one, two in zip(single, history_of(project), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    for name, weight in weights_of(project / "models/dpo").items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-4)


def test_what_fits_is_asked_of_the_model_as_it_is_trained(project, monkeypatch):
    """Frozen and in half precision it leaves a card much more room than the whole one in training would."""
    trained = []

    def seen(asked, on_cpu, model, stage, training=False, parts=1):
        if training:
            trained.append({name for name, weight in model.named_parameters() if weight.requires_grad})
        return memory_dial(asked, on_cpu, model, stage, training, parts)

    monkeypatch.setattr(train_dpo, "memory_dial", seen)
    run(project)
    assert len(trained) == 1 and all("lora_" in name for name in trained[0])
