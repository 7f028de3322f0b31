"""What only a CUDA card can show: `make gpu-check`, or pytest -m gpu. The rest is proved on CPUs with faked devices."""

import csv
import warnings
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import LlamaConfig, LlamaForCausalLM

from stages import reference_logps, train_dpo, train_ppo
from stages.lib.model import attention, generate
from stages.lib.model.adapters import FULL
from stages.lib.model.attention import hidden_states, runs_varlen, use_packed_attention
from stages.lib.model.loading import autocast
from stages.lib.model.logps import CompletionLogps
from stages.lib.model.memory import tokens_that_fit
from stages.lib.model.packing import pack
from stages.lib.run.params import Base
from tests import test_train_dpo, test_train_ppo
from tests.conftest import copy_of_project, dvc
from tests.test_train_dpo import project  # noqa: F401

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)
BF16 = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)
PRECISIONS = ["fp16", pytest.param("bf16", marks=pytest.mark.skipif(not BF16, reason="a card without bf16"))]
ADAPTERS = FULL.replace(rank=4)
TEXTS = [([5, 6, 7] * 30, [8, 9] * 40), ([11], [12]), ([5, 6, 7] * 9, [13] * 17), ([3, 4], [10, 2] * 100)]


@pytest.fixture(autouse=True)
def _on_cuda(monkeypatch):
    monkeypatch.setenv("DEVICE", "cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def llama(layers: int = 2, hidden: int = 256, heads: int = 4, vocabulary: int = 512) -> LlamaForCausalLM:
    """A random Llama with heads of 64 on the card."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2 if heads % 2 == 0 else heads // 3,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(CUDA).eval()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kernel", ["varlen", "sdpa"])
def test_packed_attention_is_that_of_each_text_alone(monkeypatch, precision, kernel):
    model = llama()
    seen = []
    if kernel == "sdpa":
        monkeypatch.setattr(attention, "runs_varlen", lambda query: False)
    else:
        if torch.cuda.get_device_capability() < (8, 0):
            pytest.skip("FlashAttention needs compute capability 8.0")
        monkeypatch.setattr(attention, "runs_varlen", lambda query: seen.append(runs_varlen(query)) or seen[-1])
    batch = pack(*zip(*TEXTS, strict=True)).to(CUDA)
    decoder = model.get_decoder()
    with torch.no_grad():
        alone = [
            decoder(torch.tensor([prompt + answer], device=CUDA)).last_hidden_state[0] for prompt, answer in TEXTS
        ]
        with use_packed_attention(model), autocast(CUDA, precision):
            packed = hidden_states(decoder, batch).float()
    expected = torch.stack([x[-1] for x in alone])
    tolerance = 0.1 if precision == "bf16" else 0.02  # of values near 1
    torch.testing.assert_close(packed[batch.last_index], expected, rtol=tolerance, atol=tolerance)
    assert all(seen) and (kernel == "sdpa" or seen)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_log_probs_and_gradients_are_those_of_fp32(precision):
    model = llama()
    policy, batch = CompletionLogps(model), pack(*zip(*TEXTS, strict=True)).to(CUDA)
    found = {}
    for name in ("fp32", precision):
        model.zero_grad()
        with use_packed_attention(model), autocast(CUDA, name):
            logps = policy(batch)
        (logps.sum() / 100).backward()
        found[name] = logps.detach(), model.lm_head.weight.grad.clone()
    (expected, expected_grad), (logps, grad) = found.values()
    torch.testing.assert_close(logps, expected, rtol=2e-2, atol=0.4)
    assert torch.nn.functional.cosine_similarity(grad.flatten(), expected_grad.flatten(), dim=0) > 0.99


def test_a_micro_batch_never_waits_for_the_card():
    model = llama()
    policy, batch = CompletionLogps(model), pack(*zip(*TEXTS, strict=True)).to(CUDA)

    def step() -> None:
        with use_packed_attention(model), autocast(CUDA, "fp16"):
            (policy(batch).sum() / 100).backward()

    step()  # kernels are loaded, which waits
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_generation_waits_for_the_card_where_it_looks(tokenizer, monkeypatch):
    prompts, budgets = [[5, 6, 7], [8], [9, 10], [11] * 9], [24, 9, 3, 24]
    model, waits = llama(), {}

    def answers(*budgets: int) -> list[list[int]]:
        options = {"temperature": [None, 0.7, 1.0, 0.7], "top_p": 0.9}
        return generate.generate(model, tokenizer, prompts, budgets, CUDA, "fp32", **options)

    expected = answers(*budgets)
    for longest in (9, 24):
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                answers(*[longest] * 4)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        waits[longest] = sum("synchronizing" in str(each.message) for each in caught)
    assert waits[9] and waits[24] - waits[9] < 5, "one look more; a wait at every token were 15"
    monkeypatch.setattr(generate, "LOOK_EVERY", 1)
    assert answers(*budgets) == expected


@pytest.mark.parametrize("training", [True, False])
def test_auto_takes_no_more_memory_than_it_promises(training):
    model = llama(layers=30, hidden=576, heads=9, vocabulary=49_152)
    free = 8e9
    tokens = tokens_that_fit(free, model, training)
    length = 256
    texts = [[3] * 64 for _ in range(tokens // length)], [[4] * (length - 64) for _ in range(tokens // length)]
    different = [prompt + [i % 1000] for i, prompt in enumerate(texts[0])]  # equal texts are read once
    batch = pack(different, texts[1]).to(CUDA)
    policy, before = CompletionLogps(model), torch.cuda.memory_allocated()
    with torch.set_grad_enabled(training), use_packed_attention(model), autocast(CUDA, "fp16"):
        logps = policy(batch)
    if training:
        logps.sum().backward()
    moments = 8 * sum(p.numel() for p in model.parameters()) if training else 0
    peak = torch.cuda.max_memory_allocated() - before + moments
    assert 0.1 * free < peak < free, f"{tokens} tokens took {peak / 1e9:.1f} of {free / 1e9:.0f} GB"


def history_of(path: Path) -> list[dict[str, float]]:
    with open(path) as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


@pytest.mark.parametrize("precision", ["fp32", *PRECISIONS])
@pytest.mark.parametrize("lora", [FULL, ADAPTERS], ids=["full", "lora"])
def test_dpo_trains_as_on_a_cpu(project, monkeypatch, precision, lora):  # noqa: F811
    monkeypatch.setenv("DEVICE", "cpu")
    params = test_train_dpo.PARAMS.replace(learning_rate=5e-4 if lora.rank else 5e-5, lora=lora)
    train_dpo.main(test_train_dpo.BASE, params, project)
    expected = history_of(project / "reports/train_dpo/history.csv")
    monkeypatch.setenv("DEVICE", "cuda")
    base = Base(seed=42, precision=precision)
    AcceleratorState._reset_state(reset_partial_state=True)
    reference_logps.main(base, reference_logps.Params(micro_batch_tokens="auto"), project)
    train_dpo.main(base, params.replace(micro_batch_tokens="auto"), project)
    bound = 1e-4 if precision == "fp32" else 3e-2
    for one, other in zip(expected, history_of(project / "reports/train_dpo/history.csv"), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=bound) and other["skipped"] == 0
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.01 if precision == "fp32" else 0.2)


@pytest.mark.parametrize("precision", ["fp32", *PRECISIONS])
@pytest.mark.parametrize(
    ("kind", "lora"), [*((kind, FULL) for kind in test_train_ppo.KINDS), ("frozen", ADAPTERS), ("rloo", ADAPTERS)]
)
def test_ppo_takes_its_steps(tmp_path, tokenizer, precision, kind, lora):
    root = test_train_ppo.write_project(tmp_path, tokenizer)
    params = test_train_ppo.KINDS[kind].replace(micro_batch_tokens="auto", lora=lora)
    train_ppo.main(Base(seed=42, precision=precision), params, root)
    rows = history_of(root / "reports/train_ppo/history.csv")
    assert all(row["policy/steps"] == 4 and row["policy/grad_norm"] > 0 for row in rows)
    assert rows[0]["val/first_ratio_error"] < 0.05 and abs(rows[0]["objective/kl"]) < 0.5


def test_the_smoke_recipe_runs_on_the_card(tmp_path):
    root = copy_of_project(tmp_path)
    recipe = (root / "recipes/smoke.txt").read_text().replace("base.precision=fp32", "base.precision=auto").split()
    dvc(root, "exp", "run", *recipe)
    assert '"device": "cuda"' in (root / "reports/train_dpo/run.json").read_text()
