"""Seeds, dropout, device, precision, and what the loaders refuse."""

import os
import random
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors import safe_open

from stages.lib.model.loading import (
    autocast,
    disable_dropout_in_model,
    freeze,
    load_causal_lm,
    load_tokenizer,
    make_accelerator,
    pick_device,
    pick_precision,
    save_model,
    set_seed,
)
from stages.lib.run.errors import UserError
from tests.conftest import REPO

CPU = torch.device("cpu")


def draw():
    return random.random(), np.random.rand(), torch.rand(1).item()


def test_set_seed_covers_python_numpy_and_torch():
    set_seed(7)
    first = draw()
    set_seed(7)
    assert draw() == first
    set_seed(8)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_the_default_seed_is_the_notebooks():
    set_seed()
    first = draw()
    set_seed(42)
    assert draw() == first


def test_disable_dropout_reaches_every_layer():
    model = torch.nn.Sequential(
        torch.nn.Dropout(0.5), torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1))
    )
    disable_dropout_in_model(model)
    x = torch.randn(64, 4)
    assert torch.equal(model.train()(x), model.eval()(x))


def test_device_is_the_environments(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    assert pick_device() == CPU


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_an_unusable_device_is_named(monkeypatch, name):
    monkeypatch.setenv("DEVICE", name)
    with pytest.raises(UserError, match=f"DEVICE={name}"):
        pick_device()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx2": True}, "fp32"), ({}, "fp32")],
)
def test_auto_precision_on_a_cpu_follows_its_instructions(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert pick_precision("auto", CPU) == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")])
def test_auto_precision_on_cuda_follows_the_generation(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    assert pick_precision("auto", torch.device("cuda")) == expected


def test_a_precision_set_by_hand_stays():
    assert [pick_precision(name, CPU) for name in ("bf16", "fp16", "fp32")] == ["bf16", "fp16", "fp32"]


def test_autocast_really_multiplies_in_the_precision_asked_for():
    layer = torch.nn.Linear(4, 4)
    with autocast(CPU, "bf16"):
        assert layer(torch.ones(1, 4)).dtype == torch.bfloat16
    with autocast(CPU, "fp32"):
        assert layer(torch.ones(1, 4)).dtype == torch.float32


def test_a_saved_model_is_one_safetensors_file_without_pickle(tiny_model, tokenizer, tmp_path):
    save_model(tiny_model, tokenizer, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".index.json"))]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert len(file.metadata()) == 1  # several keys are written in a random order
    again = load_causal_lm(tmp_path)
    for name, tensor in tiny_model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)


def test_freeze_leaves_nothing_to_train(tiny_model):
    assert not any(p.requires_grad for p in freeze(tiny_model.train()).parameters())
    assert not tiny_model.training


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chat_template": None}, "no chat template"),
        ({"eos_token": None}, "no EOS token"),
        ({"pad_token": "<|im_end|>"}, "pad token must exist and differ"),
        ({"pad_token": None}, "pad token must exist and differ"),
    ],
)
def test_tokenizers_that_would_train_wrongly_are_refused(tokenizer, tmp_path, change, message):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    for name, value in change.items():
        setattr(loaded, name, value)
    if "chat_template" in change:
        (tmp_path / "chat_template.jinja").unlink()
    loaded.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_tokenizer(tmp_path)


def test_a_card_that_this_torch_has_no_kernels_for_is_named(monkeypatch):
    monkeypatch.delenv("DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    empty, ones = torch.empty, torch.ones

    def no_kernel(*sizes, device=None, **how):
        if device is not None and device.type == "cuda":
            raise RuntimeError("CUDA error: no kernel image is available for execution on the device")
        return ones(*sizes, device=device, **how)

    # memory can be had on such a card, and nothing computed there
    monkeypatch.setattr(torch, "empty", lambda *sizes, device=None, **how: empty(*sizes, **how))
    monkeypatch.setattr(torch, "ones", no_kernel)
    with pytest.raises(UserError, match="cuda: not usable here .*no kernel image.*; set DEVICE=cpu"):
        pick_device()


def test_a_driver_too_old_for_cuda_is_said(monkeypatch, capsys):
    def too_old():
        warnings.warn(
            "CUDA initialization: The NVIDIA driver on your system is too old (found version 9)", stacklevel=1
        )
        return False

    monkeypatch.delenv("DEVICE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", too_old)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    assert pick_device() == CPU
    assert "runs on the CPU, since CUDA does not work here: CUDA initialization" in capsys.readouterr().err


def test_the_stage_says_what_it_runs_on(monkeypatch, capsys):
    pick_precision("fp32", CPU)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    pick_precision("auto", torch.device("cuda", 0))
    assert capsys.readouterr().out == "on cpu in fp32\non cuda:0 (Tesla T4) in fp16\n"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_until_it_is_returned():
    script = """
import torch
from stages.lib.model.loading import pick_device, return_freed_memory
device = pick_device()
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
before = resident()
buffers = [torch.ones(25_000_000) for _ in range(4)]
del buffers
kept = resident() - before
return_freed_memory(device)
print(kept, resident() - before)
"""
    environment = os.environ | {"DEVICE": "cpu"}
    ran = subprocess.run([sys.executable, "-c", script], cwd=REPO, env=environment, capture_output=True, text=True)
    kept, left = map(float, ran.stdout.split())
    assert kept > 390 and left < 10  # MB, of 400


def test_fp16_on_a_cpu_is_refused_where_accelerate_would_compute_in_fp32():
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.raises(UserError, match="accelerate has no autocast to fp16 on cpu; name another base.precision"):
        make_accelerator(CPU, "fp16")
