"""One decoding step of a plain Llama on a CPU, without transformers' overhead per layer.

A step multiplies one row per answer by all weights. Three things make it fast, with the same weights: they lie packed
as the CPU's kernels read them, and those that multiply the same input are one matrix; the query heads that share a key
head are rows of one product, so keys and values are not copied per query head; and keys lie as (width, positions), the
right factor of that product.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.cache_utils import Cache
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)

from stages.lib.model.adapters import has_adapter

PLAIN = {LlamaAttention, LlamaDecoderLayer, LlamaMLP, LlamaModel, LlamaRMSNorm, LlamaRotaryEmbedding}
PLAIN |= {LlamaForCausalLM, SiLUActivation, nn.Embedding, nn.Linear, nn.ModuleList}
OF_ADAPTERS = {nn.ModuleDict, nn.ParameterDict, nn.Identity, nn.Dropout}

Product = Callable[[Tensor], Tensor]  # (B, inputs) to (B, outputs)


def is_plain_llama(model: PreTrainedModel) -> bool:
    """Whether `LlamaStep` computes what the model does: a Llama, with or without adapters, without biases and forward
    hooks, with the usual activation."""
    if type(model) is not LlamaForCausalLM or model.device.type != "cpu":
        return False
    config = model.config
    return (
        not (config.attention_bias or config.mlp_bias)
        and config.rope_parameters["rope_type"] == "default"
        and all(type(module) in PLAIN | OF_ADAPTERS or has_adapter(module) for module in model.modules())
        and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    )


class LlamaStep:
    """Decodes one token per row and call, from the keys and values that the model left in a cache."""

    def __init__(self, model: LlamaForCausalLM, cache: Cache, mask: Tensor, block: int):
        """
        Args:
            cache: of the prompts; emptied layer by layer while its content is laid out anew.
            mask: (B, S) 1 on the tokens in the cache, 0 on pads.
            block: positions by which keys and values grow.
        """
        self.model, self.block, self.length = model, block, mask.shape[1]
        dtype = model.lm_head.weight.dtype
        self.keys: list[Tensor] = []  # per layer (B, H_kv, D, room)
        self.values: list[Tensor] = []  # per layer (B, H_kv, room, D)
        for layer in cache.layers:
            self.keys.append(functional.pad(layer.keys.transpose(2, 3), (0, block)))
            self.values.append(functional.pad(layer.values, (0, 0, 0, block)))
            layer.keys = layer.values = layer.rooms = None
        hidden = torch.zeros(mask.shape, dtype=dtype).masked_fill(mask == 0, -torch.inf)
        self.hidden = None if bool(mask.all()) else hidden[:, None, None]  # (B, 1, 1, S), to be added to scores
        self.layers = [_Layer(layer) for layer in model.model.layers]
        self.logits = _product(model.lm_head)

    def keep(self, rows: Tensor) -> None:
        """Only these rows go on."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.hidden = None if self.hidden is None else self.hidden[rows]

    def __call__(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """(B, V) logits after one more token of each row; tokens (B,), positions (B, 1)."""
        if self.length == self.keys[0].shape[3]:
            self.keys = [functional.pad(keys, (0, self.block)) for keys in self.keys]
            self.values = [functional.pad(values, (0, 0, 0, self.block)) for values in self.values]
        self.length += 1
        if self.hidden is not None:
            self.hidden = functional.pad(self.hidden, (0, 1))
        decoder = self.model.model
        x = decoder.embed_tokens(tokens)  # (B, features)
        cos, sin = decoder.rotary_emb(x, positions)  # (B, 1, D)
        first, second = sin.chunk(2, dim=-1)
        sin = torch.cat((-first, second), dim=-1)
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            x = x + layer.attention(
                x, cos, sin, keys[..., : self.length], values[:, :, : self.length], self.hidden
            )
            x = x + layer.mlp(x)
        return self.logits(_norm(decoder.norm, x))


class _Layer:
    """A decoder layer's products over packed weights."""

    def __init__(self, layer: LlamaDecoderLayer):
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = layer.input_layernorm, layer.post_attention_layernorm
        self.width, self.scaling = attention.head_dim, attention.scaling
        self.of_keys = attention.k_proj.weight.shape[0] // self.width  # heads
        self.query_key_value = _product(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = _product(attention.o_proj)
        self.gate_up = _product(mlp.gate_proj, mlp.up_proj)
        self.down = _product(mlp.down_proj)

    def attention(
        self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None
    ) -> Tensor:
        """(B, features) what the rows attend to; their own goes into the last place of keys (B, H_kv, D, S) and values
        (B, H_kv, S, D)."""
        heads = self.query_key_value(_norm(self.norms[0], x)).view(len(x), -1, self.width)
        turned = _rotate(heads[:, : -self.of_keys], cos, sin)
        keys[..., -1], values[:, :, -1] = turned[:, -self.of_keys :], heads[:, -self.of_keys :]
        query = (turned[:, : -self.of_keys] * self.scaling).view(len(x), self.of_keys, -1, self.width)
        scores = query @ keys  # (B, H_kv, H / H_kv, S)
        if hidden is not None:
            scores += hidden
        attended = torch.softmax(scores, -1) @ values  # the softmax sums in float32 inside
        return self.out(attended.view(len(x), -1))

    def mlp(self, x: Tensor) -> Tensor:
        """(B, features)"""
        gate, up = self.gate_up(_norm(self.norms[1], x)).chunk(2, dim=-1)
        return self.down(functional.silu(gate).mul_(up))


def _product(*layers: nn.Module) -> Product:
    """The products of one input with all the layers' weights, side by side; with their adapters, where on."""
    weight = torch.cat([layer.weight for layer in layers]) if len(layers) > 1 else layers[0].weight
    product = _packed(weight)
    low_rank: list[tuple[slice, Tensor, Tensor, float]] = []
    begin = 0
    for layer in layers:
        own = slice(begin, begin := begin + layer.weight.shape[0])
        if has_adapter(layer) and not layer.disable_adapters:
            for name in layer.lora_A.keys() & set(layer.active_adapters):
                low_rank.append((own, layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]))
    if not low_rank:
        return product

    def with_adapters(x: Tensor) -> Tensor:
        whole = product(x)
        for own, down, up, scaling in low_rank:
            whole[:, own] += functional.linear(functional.linear(x, down), up) * scaling
        return whole

    return with_adapters


def _packed(weight: Tensor) -> Product:
    """x @ weight.T; of weights packed once as oneDNN's kernels read them, where it can."""
    if not _packs(weight.dtype):
        return lambda x: functional.linear(x, weight)
    packed, multiply = torch.ops.mkldnn._reorder_linear_weight(weight), torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, None, "none", [], "")


def _packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN, where this torch has it, multiplies by packed weights of this kind on this CPU."""
    if not torch.backends.mkldnn.is_available() or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _norm(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    """`norm` of (B, features)."""
    return functional.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (B, H, D) turned by angles (B, 1, D) (arXiv:2104.09864), the sine's first half negative: halves are paired
    as in transformers."""
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((second, first), dim=-1), sin)
