"""How sequences that lie in one row run through a decoder: none sees another, and little is kept for backward.

Packed rows need no padding at all: the linear layers see real tokens only, and a sequence's result does not
depend on its batch mates but for rounding. Attention within each sequence is registered with transformers under
the name "packed". Llama's normalisation, rotary positions and gated MLP give the same numbers as transformers' own and
keep two thirds as much for the backward pass: their inputs, from which the cheap steps between matrix products are
recomputed.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention, silu
from transformers import AttentionInterface, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from stages.lib.model.packing import PackedBatch
from stages.lib.run.errors import UserError

SHORT = 512  # tokens; up to here attention is written out on CPUs


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sequence_lengths: list[int] | None = None,
    contexts: list[int | None] | None = None,
    sequence_ends: Tensor | None = None,
    **_,
) -> tuple[Tensor, None]:
    """Causal attention within each of the sequences that lie one after another in a row.

    Args:
        query: (1, H, T, D), T being the sum of `sequence_lengths`.
        key, value: (1, H_kv, T, D), H a multiple of H_kv.
        sequence_lengths: tokens of each sequence, in order.
        contexts: for each sequence the number of an earlier one that it continues: it sees all that this one
            sees; None: it starts afresh. Left out: all start afresh.
        sequence_ends: (number of sequences + 1,) int32, 0 and the running sums of `sequence_lengths`, on the device;
            left out, they are copied there.

    Returns:
        (1, T, H, D), and None in place of attention weights.

    Raises:
        UserError: the model asks for dropout, a sliding window shorter than a sequence, soft-capping or sinks,
            which this function does not compute.
    """
    contexts = contexts or [None] * len(sequence_lengths)
    spans = []  # of each sequence with all it continues
    for context, length in zip(contexts, sequence_lengths, strict=True):
        spans.append(length if context is None else spans[context] + length)
    longest = max(spans)
    if dropout or softcap or s_aux is not None or (sliding_window and sliding_window < longest):
        raise UserError(
            f"{type(module).__name__}: dropout, soft-capped, sink or windowed attention over {longest} tokens "
            "is not supported; choose another base model or a smaller tokenize_pairs.max_length"
        )
    flash = {"scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embedding left them in float32
    if spans == sequence_lengths and runs_varlen(query):
        if sequence_ends is None:
            sequence_ends = torch.tensor([0, *sequence_lengths], device=query.device).cumsum(0, dtype=torch.int32)
        rows = (x.transpose(1, 2).squeeze(0) for x in (query, key, value))  # (T, H, D) each
        output = varlen_attn(*rows, sequence_ends, sequence_ends, longest, longest, window_size=(-1, 0), **flash)
        return output.unsqueeze(0), None
    width = query.shape[-1]
    if query.is_cuda:
        query, key, value = _for_memory_efficient_kernel(query, key, value)
        flash = {"scale": scaling or width**-0.5}
    # split, not slices: its backward is one concatenation instead of a full-size tensor per sequence
    queries, keys, values = (list(x.split(sequence_lengths, dim=2)) for x in (query, key, value))
    outputs = []
    for number, context in enumerate(contexts):
        if context is not None:
            for seen in (keys, values):
                seen[number] = torch.cat((seen[context], seen[number]), dim=2)
        q, k, v = queries[number], keys[number], values[number]
        if k.shape[2] <= SHORT and not q.is_cuda:
            outputs.append(_written_out(q, k, v, scaling))
        elif context is None:
            outputs.append(scaled_dot_product_attention(q, k, v, is_causal=True, **flash))
        else:
            outputs.append(scaled_dot_product_attention(q, k, v, _future(q, k), **flash))
    return torch.cat(outputs, dim=2)[..., :width].transpose(1, 2), None


def runs_varlen(query: Tensor) -> bool:
    """Whether `varlen_attn`, which is FlashAttention, computes these heads: (1, H, T, D).

    torch 2.13: half precision, CUDA cards of compute capability 8.0 and up (not T4, RTX 20xx, V100), head sizes that
    are multiples of 8 up to 256; it has no fallback of its own.
    """
    width = query.shape[-1]
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and width % 8 == 0
        and width <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def _for_memory_efficient_kernel(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same heads as that kernel of `scaled_dot_product_attention` takes them, from (1, H, T, D).

    It has no grouped heads, and sizes must be multiples of 8 (torch 2.13); what it refuses goes to a kernel that
    makes every sequence's whole matrix of weights. Zeros beyond a head's end change no score.
    """
    copies = query.shape[1] // key.shape[1]
    if copies > 1:
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    if missing := -query.shape[-1] % 8:
        query, key, value = (pad(x, (0, missing)) for x in (query, key, value))
    return query, key, value


def _written_out(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention written out: on CPUs 2 to 3 times as fast as the flash kernel for a few hundred tokens.

    The query heads that share a key head become rows of one product, so keys are not copied per query head.

    Args:
        query: (1, H, T, D), the last T of S positions; key, value: (1, H_kv, S, D).

    Returns:
        (1, H, T, D).
    """
    _, heads, length, width = query.shape
    kv_heads, total = key.shape[1:3]
    rows = (query * (scaling or width**-0.5)).reshape(kv_heads, -1, width)
    scores = torch.bmm(rows, key[0].transpose(1, 2)).view(heads, length, total)
    with torch.autocast(query.device.type, enabled=False):  # it would keep the weights in float32 as well
        weights = torch.softmax(scores + _future(query, key), -1)  # sums in float32 inside
    return torch.bmm(weights.view(kv_heads, -1, total), value[0]).view(1, heads, length, width)


def _future(query: Tensor, key: Tensor) -> Tensor:
    """(T, S), to be added to scores: -inf where a key comes after its query; queries are the last T positions."""
    length, total = query.shape[2], key.shape[2]
    future = torch.full((length, total), -torch.inf, dtype=query.dtype, device=query.device)
    return future.triu(1 + total - length)


AttentionInterface.register("packed", packed_attention)


class _RMSNorm(torch.autograd.Function):
    """weight * x / rms(x) (arXiv:1910.07467, Eq. 4) in float32, returned in `dtype`."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype) -> Tensor:
        inverse_rms = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x, weight, inverse_rms)
        return (x * inverse_rms).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, weight, inverse_rms = ctx.saved_tensors
        normalized = x * inverse_rms
        grad = grad.float()
        grad_weight = (grad * normalized).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        along_x = (grad * normalized).mean(-1, keepdim=True)  # what would only scale x changes nothing
        return (grad - normalized * along_x) * inverse_rms, grad_weight, None, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv:2002.05202, Eq. 6), not keeping silu(gate)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate) * up

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * silu(gate)


class _Rotary(torch.autograd.Function):
    """Heads turned by their positions' angles (arXiv:2104.09864), in float32, returned in their own dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., D) with its first half of D paired with its second, as in transformers."""
    exact = x.float()
    turned = exact * cos
    (first, second), (of_first, of_second) = exact.chunk(2, dim=-1), sin.chunk(2, dim=-1)
    ours, theirs = turned.chunk(2, dim=-1)
    ours.sub_(second * of_first)
    theirs.add_(first * of_second)
    return turned.to(x.dtype)


def lean_attention(
    attention: LlamaAttention, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], **how
) -> tuple[Tensor, None]:
    """`attention(hidden_states, ...)`, packed."""
    x, heads = hidden_states, (*hidden_states.shape[:-1], -1, attention.head_dim)
    cos, sin = (table.float().unsqueeze(-2) for table in position_embeddings)
    query, key = (_Rotary.apply(layer(x).view(heads), cos, sin) for layer in (attention.q_proj, attention.k_proj))
    value = attention.v_proj(x).view(heads)
    dropout = attention.attention_dropout if attention.training else 0.0
    rows = (states.transpose(1, 2) for states in (query, key, value))
    output, _ = packed_attention(attention, *rows, scaling=attention.scaling, dropout=dropout, **how)
    return attention.o_proj(output.flatten(2)), None


def lean_rms_norm(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    """`norm(x)`, rounded once to the dtype in which the matrix products that follow read it."""
    device_type = x.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else x.dtype
    return _RMSNorm.apply(x, norm.weight, norm.variance_epsilon, dtype)


def lean_mlp(mlp: LlamaMLP, x: Tensor) -> Tensor:
    """`mlp(x)`."""
    return mlp.down_proj(_SwiGLU.apply(mlp.gate_proj(x), mlp.up_proj(x)))


def lean_forwards(model: nn.Module) -> dict[nn.Module, Callable[..., Any]]:
    """What shall compute in place of which module: the layers of a float32 Llama, and nothing in other models."""
    forwards: dict[nn.Module, Callable[..., Any]] = {}
    for layer in model.modules():
        if isinstance(layer, LlamaDecoderLayer) and layer.input_layernorm.weight.dtype == torch.float32:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                forwards[norm] = partial(lean_rms_norm, norm)
            forwards[layer.self_attn] = partial(lean_attention, layer.self_attn)
            if layer.mlp.config.hidden_act == "silu":
                forwards[layer.mlp] = partial(lean_mlp, layer.mlp)
    return forwards


@contextmanager
def use_packed_attention(model: PreTrainedModel) -> Iterator[None]:
    """Packed attention and, in a float32 Llama, lean layers inside the block; the model's own outside it.

    Raises:
        UserError: the architecture does not let its attention be chosen.
    """
    before = model.config._attn_implementation
    if not model._supports_attention_backend:
        raise UserError(f"{type(model).__name__}: cannot run packed attention; choose another base model")
    model.set_attn_implementation("packed")
    lean = {module: forward for module, forward in lean_forwards(model).items() if "forward" not in vars(module)}
    for module, forward in lean.items():
        module.forward = forward  # shadows the class's
    try:
        yield
    finally:
        model.set_attn_implementation(before)
        for module in lean:
            del module.forward


def hidden_states(backbone: nn.Module, batch: PackedBatch) -> Tensor:
    """The last hidden state at each of a packed batch's T tokens, with gradient where that is on.

    Args:
        backbone: a decoder without its output layer, under `use_packed_attention`.

    Returns:
        (T, H).

    Raises:
        RuntimeError: packed attention is not switched on. Any other attention swallows `sequence_lengths` and
            `contexts` without a word, lets texts see each other and gives wrong numbers.
    """
    if backbone.config._attn_implementation != "packed":
        raise RuntimeError("hidden_states of a packed batch need use_packed_attention around the forward pass")
    return backbone(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        sequence_lengths=batch.sequence_lengths,
        contexts=batch.contexts,
        sequence_ends=batch.sequence_ends,
    ).last_hidden_state[0]


class TiedGradient:
    """Where the output layer's backward pass leaves its gradient, for the embedding that has the same weight."""

    def __init__(self) -> None:
        self.of_output: Tensor | None = None

    def take(self, weight: Tensor) -> Tensor:
        """What was left, or zeros."""
        left, self.of_output = self.of_output, None
        return torch.zeros_like(weight) if left is None else left


class _TiedEmbedding(torch.autograd.Function):
    """Rows of a weight, whose gradient is added to the output layer's, in place."""

    @staticmethod
    def forward(ctx, ids: Tensor, weight: Tensor, padding_idx: int | None, tied: TiedGradient) -> Tensor:
        ctx.save_for_backward(ids, weight)
        ctx.padding_idx, ctx.tied = padding_idx, tied
        return torch.embedding(weight, ids)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[None, Tensor, None, None]:
        ids, weight = ctx.saved_tensors
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((ids == ctx.padding_idx)[..., None], 0.0)
        whole = ctx.tied.take(weight)
        return None, whole.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(whole.dtype)), None, None


@contextmanager
def lean_embedding(model: PreTrainedModel) -> Iterator[TiedGradient | None]:
    """For a forward pass whose output layer is used too: a tied embedding makes no gradient of the weight's size.

    On CPUs only. The backward pass has the output layer's gradient by the time it comes to the embedding, which adds a
    thousand rows to it; else it would make a second one, all zeros but for these.

    Yields:
        What the output layer's function is to be given; None where nothing is tied.
    """
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    tied = type(embedding) is nn.Embedding and output is not None and embedding.weight is output.weight
    if not tied or embedding.weight.device.type != "cpu":
        yield None
        return
    gradient = TiedGradient()
    # shadows the class's
    embedding.forward = lambda ids: _TiedEmbedding.apply(ids, embedding.weight, embedding.padding_idx, gradient)
    try:
        yield gradient
    finally:
        del embedding.forward
