"""The lean decoding step against the model's own forward."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config
from transformers.cache_utils import Cache

from stages.lib.model import llama_step
from stages.lib.model.adapters import FULL, adapters_off, add_adapters
from stages.lib.model.generate import RoomyLayer, generate, in_precision
from stages.lib.model.llama_step import LlamaStep, is_plain_llama
from stages.lib.model.loading import DTYPES

SIZES = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def random_model(config):
    """Weights large enough for choices that are not near ties, and biases and norms that are not 0 and 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.requires_grad_(False)


PLAIN = {
    "grouped keys": LlamaConfig(**SIZES),
    "tied weights": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "one key head": LlamaConfig(**SIZES | {"num_key_value_heads": 1}),
    "a key head each": LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "heads wider than hidden": LlamaConfig(**SIZES, head_dim=24),
}
OTHERS = {
    "Qwen2, with biases": Qwen2Config(**SIZES),
    "GPT-2": GPT2Config(
        vocab_size=512, n_embd=32, n_layer=2, n_head=4, pad_token_id=0, bos_token_id=1, eos_token_id=2
    ),
    "attention biases": LlamaConfig(**SIZES, attention_bias=True),
    "MLP biases": LlamaConfig(**SIZES, mlp_bias=True),
    "gelu": LlamaConfig(**SIZES, hidden_act="gelu"),
    "scaled positions": LlamaConfig(
        **SIZES, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}
    ),
}


@pytest.mark.parametrize("pads", [[0, 0, 0], [0, 2, 5]])
@pytest.mark.parametrize("config", PLAIN.values(), ids=PLAIN)
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 0.15)])
def test_logits_are_those_of_the_model(config, pads, precision, tolerance):
    """Ten steps over prompts of 8 tokens, through a growth of the room and a row that leaves."""
    plain = random_model(config)
    model = in_precision(plain, precision)
    mask = torch.tensor([[0] * pad + [1] * (8 - pad) for pad in pads])
    ids = torch.randint(3, 512, (3, 18), generator=torch.Generator().manual_seed(1))
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    model(input_ids=ids[:, :8], attention_mask=mask, position_ids=positions, cache=cache, use_cache=True)
    step = LlamaStep(model, cache, mask, block=4)
    positions = positions[:, -1:]
    for length in range(9, 19):
        positions = positions + 1
        logits = step(ids[:, length - 1], positions)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        whole = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = plain(input_ids=ids[:, :length], attention_mask=mask, position_ids=whole).logits[:, -1]
        scale = expected.abs().max() if precision == "bf16" else 1.0
        torch.testing.assert_close(logits.float() / scale, expected / scale, atol=tolerance, rtol=0)
        if length == 13:
            kept = torch.tensor([0, 2])
            step.keep(kept)
            ids, mask, positions = ids[kept], mask[kept], positions[kept]


@pytest.mark.parametrize("config", (PLAIN | OTHERS).values(), ids=PLAIN | OTHERS)
def test_greedy_answers_are_those_of_transformers_generate(config, tokenizer):
    model = random_model(config)
    assert is_plain_llama(model) == (config in PLAIN.values())
    prompts = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63, 64, 65, 66]]
    expected = []
    for prompt in prompts:
        options = {"max_new_tokens": 70, "do_sample": False, "suppress_tokens": [tokenizer.pad_token_id]}
        output = model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
        expected.append(output[0, len(prompt) :].tolist())
    assert generate(model, tokenizer, prompts, 70, torch.device("cpu"), "fp32") == expected


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "down_proj"]])
def test_adapters_are_part_of_the_step(tokenizer, targets):
    """Answers of the adapted model are those that transformers gives of the weights with the adapters merged in."""
    model = random_model(PLAIN["grouped keys"])
    whole = copy.deepcopy(model)
    adapted = add_adapters(model, FULL.replace(rank=4, alpha=8.0, targets=targets), "fp32")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    assert is_plain_llama(model)
    prompts, cpu = [[1, 40, 41, 42], [1, 50], [1, 60, 61, 62, 63]], torch.device("cpu")
    answers = generate(model, tokenizer, prompts, 40, cpu, "fp32")
    with adapters_off(model):
        assert generate(model, tokenizer, prompts, 40, cpu, "fp32") == generate(
            whole, tokenizer, prompts, 40, cpu, "fp32"
        )
    merged = adapted.merge_and_unload()
    for prompt, answer in zip(prompts, answers, strict=True):
        options = {"max_new_tokens": 40, "do_sample": False, "suppress_tokens": [tokenizer.pad_token_id]}
        output = merged.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), **options)
        assert output[0, len(prompt) :].tolist() == answer


def test_an_unknown_layer_in_the_model_is_not_passed_by():
    model = random_model(PLAIN["grouped keys"])

    class Adapted(torch.nn.Linear):
        pass

    model.model.layers[0].mlp.up_proj = Adapted(32, 64, bias=False)
    assert not is_plain_llama(model)


def test_what_a_hook_does_to_a_layer_is_not_passed_by():
    model = random_model(PLAIN["grouped keys"])
    model.lm_head.register_forward_hook(lambda module, args, logits: logits + 1)
    assert not is_plain_llama(model)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_packed_weights_give_a_rows_product_whatever_its_batch(precision):
    """Bit for bit where they are packed: an answer does not depend on which others have ended."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(192, 64, generator=generator).to(DTYPES[precision])
    x = torch.randn(37, 64, generator=generator).to(DTYPES[precision])
    product = llama_step._packed(weight)
    expected = (x.double() @ weight.double().T).float()
    torch.testing.assert_close(product(x).float(), expected, rtol=1e-2 if precision == "bf16" else 1e-5, atol=1e-4)
    for rows in (1, 7, 8, 36) if llama_step._packs(DTYPES[precision]) else ():
        assert torch.equal(product(x[:rows]), product(x)[:rows])


@pytest.mark.parametrize("lacking", ["oneDNN", "bf16"])
def test_where_weights_cannot_be_packed_the_step_takes_them_as_they_are(monkeypatch, lacking):
    """fp16 nowhere; nothing in a torch without oneDNN, whose operators are not there then."""
    assert not llama_step._packs(torch.float16)
    if lacking == "oneDNN":
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        monkeypatch.setattr(torch.ops, "mkldnn", None)
    else:
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    weight, x = torch.ones(8, 4, dtype=torch.bfloat16), torch.ones(2, 4, dtype=torch.bfloat16)
    assert torch.equal(llama_step._packed(weight)(x), torch.full((2, 8), 4.0, dtype=torch.bfloat16))
