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
from tests.support.fake_gpu import on_gpu


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


def kernel_calls(monkeypatch, capability):
    """What attention asks of the two kernels, on a card of this compute capability."""
    calls = {"varlen": [], "sdpa": []}

    def varlen_attn(query, key, value, ends, other_ends, longest, _, window_size, scale, enable_gqa):
        calls["varlen"].append(ends)
        assert ends is other_ends and window_size == (-1, 0)
        heads = (x.transpose(0, 1)[None] for x in (query, key, value))
        mask = block_causal(ends.diff().tolist())
        return scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)[
            0
        ].transpose(0, 1)

    def sdpa(query, key, value, *mask, **how):
        calls["sdpa"].append((query.shape, key.shape, how))
        return scaled_dot_product_attention(query, key, value, *mask, **how)

    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "scaled_dot_product_attention", sdpa)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    return calls


@pytest.mark.parametrize(
    ("capability", "dtype", "width", "kernel"),
    [
        ((7, 5), torch.float16, 64, "sdpa"),  # T4, RTX 20xx
        ((7, 0), torch.float16, 8, "sdpa"),  # V100
        ((8, 0), torch.float16, 64, "varlen"),
        ((9, 0), torch.bfloat16, 64, "varlen"),
        ((9, 0), torch.bfloat16, 12, "sdpa"),  # no multiple of 8
        ((9, 0), torch.bfloat16, 264, "sdpa"),  # above 256
        ((9, 0), torch.float32, 64, "sdpa"),
    ],
)
def test_each_card_gets_a_kernel_it_has(monkeypatch, capability, dtype, width, kernel):
    calls = kernel_calls(monkeypatch, capability)
    lengths = [5, 1, 9]
    qkv = random_qkv(lengths, width=width)
    expected = scaled_dot_product_attention(*qkv, attn_mask=block_causal(lengths), enable_gqa=True).transpose(1, 2)
    rounded = [on_gpu(x.detach().to(dtype)) for x in qkv]
    actual, _ = attention.packed_attention(None, *rounded, None, sequence_lengths=lengths)
    tolerance = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(actual.as_subclass(torch.Tensor).float(), expected, rtol=tolerance, atol=tolerance)
    assert [name for name, made in calls.items() if made] == [kernel]
    for (query, key, how), length in zip(calls["sdpa"], lengths, strict=kernel == "sdpa"):
        # what the memory-efficient kernel wants, a sequence at a time: anything else makes whole matrices
        assert query == key == (1, 6, length, -(-width // 8) * 8)
        assert how == {"is_causal": True, "scale": width**-0.5}


def test_gradients_of_the_kernel_for_older_cards_are_those_under_a_block_mask(monkeypatch):
    kernel_calls(monkeypatch, (7, 5))
    lengths = [5, 1, 9]
    qkv = random_qkv(lengths, width=12)
    expected = scaled_dot_product_attention(*qkv, attn_mask=block_causal(lengths), enable_gqa=True).transpose(1, 2)
    actual, _ = attention.packed_attention(None, *map(on_gpu, qkv), None, sequence_lengths=lengths)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    for grad, other in zip(
        torch.autograd.grad(actual.as_subclass(torch.Tensor), qkv, upstream),
        torch.autograd.grad(expected, qkv, upstream),
        strict=True,
    ):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-5)


def test_the_ends_of_sequences_are_copied_to_the_device_once_a_batch(monkeypatch, tiny_model):
    calls = kernel_calls(monkeypatch, (9, 0))
    monkeypatch.setattr(attention, "runs_varlen", lambda query: True)
    batch = pack([[5, 6, 7], [5, 6]], [[8, 2], [9]])
    assert batch.sequence_ends.dtype == torch.int32 and batch.sequence_ends.tolist() == [0, 5, 8]
    with torch.no_grad(), use_packed_attention(tiny_model):
        hidden_states(tiny_model.get_decoder(), batch)
    assert len(calls["varlen"]) == 2 and all(ends is batch.sequence_ends for ends in calls["varlen"])  # two layers


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
    assert "forward" not in vars(tiny_model.get_input_embeddings())


def test_an_embedding_that_is_not_tied_stays_as_it_is(tiny_model):
    tiny_model.get_output_embeddings().weight = torch.nn.Parameter(tiny_model.lm_head.weight.detach().clone())
    with lean_embedding(tiny_model) as tied:
        assert tied is None and "forward" not in vars(tiny_model.get_input_embeddings())


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
