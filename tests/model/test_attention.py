"""Packed attention against a block mask, on all of its CPU paths; lean layers against transformers' own."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import stages.lib.model.attention as attention
from stages.lib.model.attention import hidden_states, lean_embedding, use_packed_attention
from stages.lib.model.logps import CompletionLogps
from stages.lib.model.packing import pack
from stages.lib.run.errors import UserError


def random_qkv(lengths, heads=6, kv_heads=2, width=8):
    generator = torch.Generator().manual_seed(0)
    total = sum(lengths)
    shapes = [(1, heads, total, width), (1, kv_heads, total, width), (1, kv_heads, total, width)]
    return [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]


def block_causal(lengths):
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return (owner[:, None] == owner[None]) & torch.ones(len(owner), len(owner), dtype=torch.bool).tril()


@pytest.mark.parametrize("short", [0, 512])  # flash kernel; written out
@pytest.mark.parametrize("lengths", [[1], [5, 1, 9], [16, 16]])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_equals_attention_under_a_block_mask_with_gradients(monkeypatch, short, lengths, kv_heads):
    monkeypatch.setattr(attention, "SHORT", short)
    qkv = random_qkv(lengths, kv_heads=kv_heads)
    expected = scaled_dot_product_attention(*qkv, attn_mask=block_causal(lengths), enable_gqa=True).transpose(1, 2)
    actual, weights = attention.packed_attention(None, *qkv, None, sequence_lengths=lengths)
    assert weights is None
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for grad, other in zip(
        torch.autograd.grad(actual, qkv, upstream), torch.autograd.grad(expected, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("short", [0, 512])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_a_sequence_sees_what_it_continues_and_no_other(monkeypatch, short, kv_heads):
    monkeypatch.setattr(attention, "SHORT", short)
    lengths, contexts = [4, 7, 1, 3, 5, 2], [None, 0, 0, None, 3, 1]  # the last: a chain of three
    qkv = random_qkv(lengths, kv_heads=kv_heads)
    owner = torch.repeat_interleave(torch.arange(6), torch.tensor(lengths))
    ancestors = torch.zeros(6, 6, dtype=torch.bool)
    for number, of_number in enumerate([[], [0], [0], [], [3], [0, 1]]):
        ancestors[number, of_number] = True
    seen = block_causal(lengths) | ancestors[owner][:, owner]
    expected = scaled_dot_product_attention(*qkv, attn_mask=seen, enable_gqa=True).transpose(1, 2)
    actual, _ = attention.packed_attention(None, *qkv, None, sequence_lengths=lengths, contexts=contexts)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for grad, other in zip(
        torch.autograd.grad(actual, qkv, upstream), torch.autograd.grad(expected, qkv, upstream), strict=True
    ):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def states_and_bytes_kept(model, autocast: bool):
    """Last hidden states of a fixed packed row, and the bytes of activations that backward will need."""
    ids = torch.randint(3, 512, (1, 60), generator=torch.Generator().manual_seed(0))
    positions = torch.cat([torch.arange(40), torch.arange(20)])[None]
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and 60 in tensor.shape:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            decoder = model.get_decoder()
            hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False, sequence_lengths=[40, 20])
    return hidden.last_hidden_state, sum(kept.values())


@pytest.mark.parametrize(("autocast", "share"), [(False, 0.8), (True, 0.65)])
def test_lean_layers_give_the_numbers_of_transformers_own_and_keep_less(tiny_model, monkeypatch, autocast, share):
    results = []
    for lean_forwards in (attention.lean_forwards, lambda model: {}):
        monkeypatch.setattr(attention, "lean_forwards", lean_forwards)
        with attention.use_packed_attention(tiny_model):
            hidden, kept = states_and_bytes_kept(tiny_model, autocast)
            results.append((hidden, kept, torch.autograd.grad(hidden.sin().sum(), list(tiny_model.parameters()))))
        assert not any("forward" in vars(module) for module in tiny_model.modules())  # given back as it was
    (actual, kept, grads), (expected, kept_by_transformers, expected_grads) = results
    assert torch.equal(actual, expected)
    for grad, other in zip(grads, expected_grads, strict=True):
        tolerance = 2e-2 * other.abs().max().item() if autocast else 1e-5
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=tolerance)
    assert kept < share * kept_by_transformers


@pytest.mark.parametrize(
    "extra", [{"dropout": 0.1}, {"softcap": 30.0}, {"sliding_window": 4}, {"s_aux": torch.zeros(6)}]
)
def test_what_it_does_not_compute_is_refused(extra):
    with pytest.raises(UserError, match="not supported"):
        attention.packed_attention(torch.nn.Identity(), *random_qkv([5]), None, sequence_lengths=[5], **extra)


def test_a_lean_embedding_gives_the_same_gradient_without_a_second_dense_one(tiny_model):
    ids = torch.tensor([[5, 6, 5, 7]])

    def gradient(lean: bool) -> torch.Tensor:
        tiny_model.zero_grad()
        for _ in range(2):  # the second is added to the first
            with lean_embedding(tiny_model) if lean else nullcontext():
                hidden = tiny_model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
            (hidden @ tiny_model.get_output_embeddings().weight.T).square().sum().backward()
        return tiny_model.get_input_embeddings().weight.grad

    expected = gradient(lean=False).clone()
    found = gradient(lean=True)
    assert found.layout == torch.strided  # AdamW takes no other
    torch.testing.assert_close(found, expected)
    assert not tiny_model.get_input_embeddings().sparse


def test_an_embedding_that_is_not_tied_stays_dense(tiny_model):
    tiny_model.get_output_embeddings().weight = torch.nn.Parameter(tiny_model.lm_head.weight.detach().clone())
    with lean_embedding(tiny_model):
        assert not tiny_model.get_input_embeddings().sparse


TEXTS = [([5, 6, 7], [8, 2]), ([5, 6, 9, 10], [11, 12, 2]), ([5, 6, 7], [13, 2])]


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_hidden_states_of_a_packed_batch_are_those_of_each_text_alone(tiny_model, share_prefixes):
    decoder = tiny_model.get_decoder()
    batch = pack(*zip(*TEXTS, strict=True), share_prefixes)
    with torch.no_grad():
        alone = [decoder(torch.tensor([prompt + answer])).last_hidden_state[0] for prompt, answer in TEXTS]
        with use_packed_attention(tiny_model):
            packed = hidden_states(decoder, batch)
    expected = torch.cat([x[len(prompt) - 1 : -1] for x, (prompt, _) in zip(alone, TEXTS, strict=True)])
    torch.testing.assert_close(packed[batch.completion_index], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[batch.last_index], torch.stack([x[-1] for x in alone]), rtol=1e-5, atol=1e-5)


def test_a_packed_batch_under_any_other_attention_is_refused(tiny_model):
    batch = pack(*zip(*TEXTS, strict=True))
    with pytest.raises(RuntimeError, match="use_packed_attention"):
        hidden_states(tiny_model.get_decoder(), batch)
    with use_packed_attention(tiny_model):
        hidden_states(tiny_model.get_decoder(), batch)
    with pytest.raises(RuntimeError, match="use_packed_attention"):  # it ended with the block
        CompletionLogps(tiny_model)(batch)
