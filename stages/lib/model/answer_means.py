"""What a middle layer of a model holds while it reads answers: the mean over each answer's own tokens."""

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

from stages.lib.data.eos import up_to_eos
from stages.lib.model.attention import hidden_states, use_packed_attention
from stages.lib.model.loading import autocast
from stages.lib.model.packing import PackedBatch, packed_groups
from stages.lib.run.errors import UserError


@torch.no_grad()
def answer_means(
    model: PreTrainedModel,
    prompts: list[list[int]],
    responses: list[list[int]],
    layers: list[int],
    micro_batch_tokens: int,
    precision: str,
    progress: str | None = None,
) -> Tensor:
    """Mean hidden state over each answer's tokens after each of some decoder layers, in one pass up to the deepest.

    Args:
        model: the frozen base, a causal language model, on the device where the work shall happen.
        prompts: N lists of token ids, generation header included.
        responses: N lists of token ids. They count up to their first EOS; an answer without any token before it
            is read at the EOS.
        layers: L numbers of decoder layers, from 1 to all.
        micro_batch_tokens: memory dial; changes the result by rounding only.
        precision: 'bf16', 'fp16' or 'fp32'.
        progress: a label for a progress bar over tokens, or None for none.

    Returns:
        (L, N, H) float32 on the CPU, in the order given.
    """
    eos = model.config.eos_token_id
    answers = [until_end(ids, eos) for ids in responses]
    means = torch.empty(len(layers), len(answers), model.config.hidden_size)
    tokens = sum(map(len, prompts)) + sum(map(len, answers))
    bar = tqdm(total=tokens, desc=progress, unit="tok", unit_scale=True, disable=progress is None)
    model.eval()
    with use_packed_attention(model), autocast(model.device, precision), bar:
        for group, batch in packed_groups(prompts, answers, micro_batch_tokens, model.device, bar):
            for number, hidden in enumerate(hidden_after(model.get_decoder(), batch, layers)):
                means[number, group] = mean_of_completions(hidden, batch).cpu()
    return means


def until_end(ids: list[int], eos_token_id: int) -> list[int]:
    """An answer as the judge reads it: without its EOS and what follows, or that EOS alone."""
    return [token for token in up_to_eos(ids, eos_token_id) if token != eos_token_id] or [eos_token_id]


def mean_of_completions(hidden: Tensor, batch: PackedBatch) -> Tensor:
    """(T, H) hidden states of a packed batch to the (S, H) means over each completion's tokens, float32.

    `completion_index` holds the positions that predict a completion: from its prompt's last token to the last but
    one of its own. Without the first and with its last token's they are the completion's own.
    """
    owner = batch.label_sequence
    own = torch.ones_like(owner, dtype=torch.bool)
    own[1:] = owner[1:] == owner[:-1]
    own[:1] = False
    positions = torch.cat((batch.completion_index[own], batch.last_index))
    owners = torch.cat((owner[own], torch.arange(batch.num_completions, device=owner.device)))
    sums = hidden.new_zeros(batch.num_completions, hidden.shape[1], dtype=torch.float32)
    sums.index_add_(0, owners, hidden[positions].float())
    return sums / torch.bincount(owners, minlength=batch.num_completions)[:, None]


class _DeepEnough(Exception):
    """Ends a forward pass at the deepest layer that is read."""


def hidden_after(
    backbone: PreTrainedModel, batch: PackedBatch, layers: list[int], to_end: bool = False
) -> list[Tensor]:
    """(T, H) hidden states of a packed batch after each of `layers`, under `use_packed_attention`.

    Args:
        to_end: the backbone's last hidden states too, after these.

    Raises:
        UserError: the backbone has no list of its decoder layers.
        ValueError: a layer that it does not have.
    """
    blocks = next(
        (
            module
            for module in backbone.modules()
            if isinstance(module, nn.ModuleList) and len(module) == backbone.config.num_hidden_layers
        ),
        None,
    )
    if blocks is None:
        raise UserError(f"{type(backbone).__name__}: has no list of decoder layers; choose another base model")
    if not all(1 <= layer <= len(blocks) for layer in layers):
        raise ValueError(f"layers {layers} of {len(blocks)}")
    read: dict[int, Tensor] = {}

    def reader(layer: int):
        def read_output(_module, _inputs, output) -> None:
            read[layer] = (output[0] if isinstance(output, tuple) else output)[0]
            if layer == max(layers) and not to_end:
                raise _DeepEnough

        return read_output

    handles = [blocks[layer - 1].register_forward_hook(reader(layer)) for layer in set(layers)]
    try:
        last = [hidden_states(backbone, batch)]
    except _DeepEnough:
        last = []
    finally:
        for handle in handles:
            handle.remove()
    return [read[layer] for layer in layers] + last
