"""One decoding step of a plain Llama on a CPU, without transformers' overhead per layer.

A step multiplies a few columns (one per row of the batch) by all weights. Three things make it twice as fast as
the model's own forward, with the same weights: hidden states lie as (features, rows), so that the weights are the
left factor, which the CPU's kernels read as they lie instead of repacking them; the query heads that share a key
head are rows of one product, so keys and values are not copied per query head; and keys lie as (width, positions),
the right factor of that product.
"""

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


def is_plain_llama(model: PreTrainedModel) -> bool:
    """Whether `LlamaStep` computes what the model does: a Llama, with or without adapters, without biases and with the
    usual activation."""
    if type(model) is not LlamaForCausalLM or model.device.type != "cpu":
        return False
    config = model.config
    return (
        not (config.attention_bias or config.mlp_bias)
        and config.rope_parameters["rope_type"] == "default"
        and all(type(module) in PLAIN | OF_ADAPTERS or has_adapter(module) for module in model.modules())
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
        embedded = decoder.embed_tokens(tokens)
        cos, sin = (table[:, 0].t().contiguous() for table in decoder.rotary_emb(embedded, positions))  # (D, B)
        x = embedded.t().contiguous()  # (features, B), as all that follows
        for number, layer in enumerate(decoder.layers):
            attended = self._attention(number, layer.self_attn, _norm(layer.input_layernorm, x), cos, sin)
            x = x + attended
            normed = _norm(layer.post_attention_layernorm, x)
            gate, up = _linear(layer.mlp.gate_proj, normed), _linear(layer.mlp.up_proj, normed)
            x = x + _linear(layer.mlp.down_proj, functional.silu(gate, inplace=True).mul_(up))
        return self.model.lm_head(_norm(decoder.norm, x).t())

    def _attention(self, number: int, module: LlamaAttention, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(H * D, B) what the rows attend to, through the output weights."""
        width, rows, now = module.head_dim, x.shape[1], self.length - 1
        query = _rotate(_linear(module.q_proj, x).view(-1, width, rows), cos, sin) * module.scaling
        key = _rotate(_linear(module.k_proj, x).view(-1, width, rows), cos, sin)
        value = _linear(module.v_proj, x).view(-1, width, rows)
        keys, values = self.keys[number][..., : now + 1], self.values[number][:, :, : now + 1]
        keys[..., now], values[:, :, now] = key.permute(2, 0, 1), value.permute(2, 0, 1)
        query = query.view(len(key), -1, width, rows).permute(3, 0, 1, 2)  # (B, H_kv, H / H_kv, D)
        scores = query @ keys
        if self.hidden is not None:
            scores += self.hidden
        attended = torch.softmax(scores, -1) @ values  # the softmax sums in float32 inside
        return _linear(module.o_proj, attended.permute(1, 2, 3, 0).reshape(-1, rows))


def _linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer` along the first dimension of (features, B); with its adapter, where it has one that is on."""
    product = layer.weight @ x
    if type(layer) is not nn.Linear and not layer.disable_adapters:
        for name in layer.lora_A.keys() & set(layer.active_adapters):
            product.addmm_(layer.lora_B[name].weight, layer.lora_A[name].weight @ x, alpha=layer.scaling[name])
    return product


def _norm(norm: LlamaRMSNorm, x: Tensor) -> Tensor:
    """`norm` along the first dimension of (features, B)."""
    exact = x.float()
    inverse_rms = torch.rsqrt(exact.square().mean(0) + norm.variance_epsilon)
    return (exact * inverse_rms).to(x.dtype) * norm.weight[:, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Heads (H, D, B) turned by angles (D, B) (arXiv:2104.09864), halves paired as in transformers."""
    first, second = x.chunk(2, dim=1)
    return x * cos + torch.cat((-second, first), dim=1) * sin
