"""Answers to prompts: batched decoding, greedy or sampled, in which no answer depends on its batch mates.

In place of transformers' `generate`, which draws from one stream for the whole batch, so that an answer depends on
the batch it was in and no two models can be given the same random numbers; which keeps rows that have ended in the
batch; and which is slower (`make bench-generate`).
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicLayer

from stages.lib.model.llama_step import LlamaStep, is_plain_llama
from stages.lib.model.loading import DTYPES
from stages.lib.model.memory import with_what_fits
from stages.lib.model.packing import shared_prefix_length, shares_prefixes
from stages.lib.run.errors import UserError

CACHE_BLOCK = 64  # positions by which the key-value cache grows
SAMPLE_BLOCK = 256  # tokens whose probabilities are summed before one of them is looked for
NOT_A_NUMBER = -1  # in place of a token
ROW_BLOCK = 4  # rows by which a batch shrinks: each time all keys and values are copied
LOOK_EVERY = 8  # tokens after which the host looks at what a GPU has answered, and waits for it


@dataclass(frozen=True)
class Answer:
    """One model's answer to one prompt."""

    ids: list[int]  # as generated, EOS included
    text: str  # without special tokens
    ended: bool  # by itself, not at the token limit


def answer_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    max_new_tokens: int | Sequence[int],
    precision: str,
    batch_size: int = 64,
    **options,
) -> list[Answer]:
    """`generate` on the model's own device, with the answers as texts too."""
    responses = generate(
        model, tokenizer, prompt_ids, max_new_tokens, model.device, precision, batch_size=batch_size, **options
    )
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    return [
        Answer(ids, text.strip(), ids[-1] == tokenizer.eos_token_id)
        for ids, text in zip(responses, texts, strict=True)
    ]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: list[list[int]],
    max_new_tokens: int | Sequence[int],
    device: torch.device,
    precision: str,
    temperature: float | None | Sequence[float | None] = None,
    top_p: float = 1.0,
    seed: int = 0,
    uniforms: Tensor | None = None,
    batch_size: int = 16,
    progress: str | None = None,
) -> list[list[int]]:
    """One answer to each prompt.

    Prompts of like length share a batch, padded so that all their last tokens predict in the same column; what
    all of them begin with is read once (on CPUs). Rows that have ended leave their batch: at once on CPUs, every
    LOOK_EVERY tokens on a GPU, which is not waited for in between. Decoding reads every weight once per token and is
    bound by memory, so the weights themselves are held in `precision` (a copy; the model given stays as it is).

    Sampling draws one uniform number per prompt and position from `seed` and looks it up in the cumulative
    distribution, so the answer to a prompt does not depend on `batch_size`, beyond rounding. After memory ran out the
    batch is answered anew, half of it at a time.

    Args:
        prompt_ids: N lists of token ids, generation header included.
        max_new_tokens: for all, or one for each prompt.
        temperature: None is greedy; else logits are divided by it. For all, or one for each prompt.
        top_p: nucleus sampling (arXiv:1904.09751): the fewest likeliest tokens that reach this probability.
        uniforms: (N, longest budget) the uniform numbers themselves, in place of those of `seed`.
        progress: label of a progress bar, None for no bar.

    Returns:
        N lists of response ids in the order of `prompt_ids`, cut after the first EOS, which is included. The
        pad token is never generated.

    Raises:
        ValueError: an empty prompt, no new tokens, or a temperature or top_p outside its range.
        UserError: the logits of an answer, before its end, are not numbers.
    """
    budgets = [max_new_tokens] * len(prompt_ids) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(budgets) != len(prompt_ids) or not all(prompt_ids) or min(budgets, default=1) < 1:
        raise ValueError("each prompt needs at least one token and a budget of at least one new token")
    alike = temperature is None or isinstance(temperature, (int, float))
    temperatures = [temperature] * len(prompt_ids) if alike else list(temperature)
    if len(temperatures) != len(prompt_ids) or not all(each is None or each > 0 for each in temperatures):
        raise ValueError(f"temperature {temperature} must be positive, or one such or None for each prompt")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p {top_p} must lie within (0, 1]")
    if uniforms is None:
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(prompt_ids), max(budgets, default=0), generator=generator)
    training = model.training
    model = in_precision(model, precision).to(device).eval()
    responses: list[list[int]] = [[] for _ in prompt_ids]
    # long budgets together, then by length: fewest pads, and no batch shrinks to one row early
    order = sorted(range(len(prompt_ids)), key=lambda i: (-budgets[i], -len(prompt_ids[i])))
    bar = tqdm(total=len(order), desc=progress, unit="answer", mininterval=2, disable=progress is None)
    done = 0

    def answer(size: int) -> list[list[int]]:
        bar.n = done
        of = order[done : done + size]
        own = [prompt_ids[i] for i in of], [budgets[i] for i in of], [temperatures[i] for i in of]
        return _decode(model, tokenizer, *own, top_p, uniforms[of], bar)

    while done < len(order):
        answers, batch_size = with_what_fits(
            answer,
            min(batch_size, len(order) - done),
            1,
            "memory ran out: goes on with {} answers at a time",
            device,
        )
        for i, response in zip(order[done : done + batch_size], answers, strict=True):
            responses[i] = response
        done += batch_size
    bar.close()
    model.train(training)
    return responses


def in_precision(model: PreTrainedModel, precision: str) -> PreTrainedModel:
    """The model itself where its weights have that precision already, else a copy of it that has.

    The weights that have it are shared with the copy: of a model with adapters, all frozen linear layers.
    """
    dtype = DTYPES[precision]
    shared = {id(parameter): parameter for parameter in model.parameters() if parameter.dtype == dtype}
    if len(shared) == len(list(model.parameters())):
        return model
    copied = copy.deepcopy(model, shared)
    for parameter in copied.parameters():  # not the buffers: rotary frequencies in bf16 lose the positions
        parameter.data = parameter.data.to(dtype)
    return copied


def sample_token(logits: Tensor, uniform: Tensor, temperature: float | Tensor, top_p: float) -> Tensor:
    """Tokens by inverse transform: the first whose cumulative probability exceeds the uniform number.

    Args:
        logits: (B, V); -inf for tokens that must not appear.
        uniform: (B,) in [0, 1).
        temperature: for all, or (B, 1).

    Returns:
        (B,) token ids; NOT_A_NUMBER where there is no distribution, which the host sees when it reads the tokens.
    """
    probs = torch.softmax(logits.float() / temperature, dim=-1)
    tokens = None
    if top_p < 1:
        probs, tokens = _nucleus(probs, top_p)
    picked = _inverse_transform(probs, uniform)
    if tokens is None:
        return picked
    return torch.where(picked < 0, picked, tokens.gather(1, picked.clamp(min=0)[:, None]).squeeze(1))


def _inverse_transform(probs: Tensor, uniform: Tensor) -> Tensor:
    """(B,) places in `probs` (B, V) that the numbers (B,) select; one of probability 0 is never selected.

    By sums of blocks first and within the selected block then: the same place as in one cumulative sum over V,
    of which most would never be looked at.
    """
    exact = torch.float32 if probs.device.type == "mps" else torch.float64  # 49,152 small terms; MPS has no fp64
    if rest := -probs.shape[1] % SAMPLE_BLOCK:
        probs = functional.pad(probs, (0, rest))
    blocks = probs.unflatten(1, (-1, SAMPLE_BLOCK))
    sums = blocks.sum(-1).cumsum(-1, dtype=exact)  # few terms a block: as exact in float32 as they are
    target = uniform.to(sums)[:, None] * sums[:, -1:]
    broken = target[:, 0].isnan()
    target, sums = target.nan_to_num(0.0), sums.nan_to_num(0.0)
    block = _first_above(sums, target)
    before = functional.pad(sums, (1, 0)).gather(1, block)
    inside = blocks[torch.arange(len(blocks), device=probs.device), block[:, 0]].to(exact).cumsum(-1)
    picked = (block * SAMPLE_BLOCK + _first_above(inside, target - before)).squeeze(1)
    return picked.masked_fill(broken, NOT_A_NUMBER)


def _first_above(cumulative: Tensor, target: Tensor) -> Tensor:
    """(B, 1) first places whose cumulative sum exceeds the target, at most the last that adds to the sum."""
    end = cumulative[:, -1:].contiguous()
    last = torch.searchsorted(cumulative, end)  # rounding may have put the target at the end
    found = torch.searchsorted(cumulative, target, right=True)
    return torch.minimum(found, last).clamp(max=cumulative.shape[1] - 1)  # not a number: sorts beyond the end


def _nucleus(probs: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """(B, k) probabilities and their tokens, likeliest first, 0 outside the nucleus."""
    # on a CPU a full sort of the vocabulary costs more than the model, and the nucleus is mostly small
    k = min(256, probs.shape[-1]) if is_read_at_once(probs.device) else probs.shape[-1]
    while True:
        top, tokens = probs.topk(k)
        if k == probs.shape[-1] or bool((top.sum(-1) >= top_p).all()):
            break
        k = min(8 * k, probs.shape[-1])
    before = top.cumsum(-1) - top
    return top.masked_fill(before >= top_p, 0.0), tokens


def is_read_at_once(device: torch.device) -> bool:
    """Whether the host reads what is on the device without waiting for it."""
    return device.type == "cpu"


def _sampled_rows(temperatures: list[float | None], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows that have a temperature, (S,), and theirs, (S, 1), on the device."""
    rows = [row for row, temperature in enumerate(temperatures) if temperature is not None]
    heat = torch.tensor([temperatures[row] for row in rows], device=device)[:, None]
    return torch.tensor(rows, dtype=torch.long, device=device), heat


def _next_tokens(logits: Tensor, uniform: Tensor, sampled: Tensor, heat: Tensor, top_p: float) -> Tensor:
    """(B,) tokens: sampled in the rows `sampled` at the temperatures `heat`, in the others the likeliest."""
    if not len(sampled):
        return _likeliest(logits)
    if len(sampled) == len(logits):
        return sample_token(logits, uniform, heat, top_p)
    tokens = _likeliest(logits)
    tokens[sampled] = sample_token(logits[sampled], uniform[sampled], heat, top_p)
    return tokens


def _likeliest(logits: Tensor) -> Tensor:
    """(B,) tokens, NOT_A_NUMBER for a row with a NaN, which counts as its largest."""
    tokens = logits.argmax(-1)
    return tokens.masked_fill(logits.gather(1, tokens[:, None])[:, 0].isnan(), NOT_A_NUMBER)


class RoomyLayer(DynamicLayer):
    """A cache layer with room to grow: a step writes one column, where DynamicLayer copies all of them."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
            self.rooms = self.keys, self.values
            # transformers 5.24 then makes the mask of one more token without looking for pads, which would wait
            self.is_compileable = not is_read_at_once(key_states.device)
        length = self.keys.shape[2]
        total = length + key_states.shape[2]
        if self.rooms[0].shape[2] < total or self.rooms[0].shape[0] != self.keys.shape[0]:
            batch, heads, _, width = self.keys.shape
            self.rooms = tuple(x.new_empty(batch, heads, total + CACHE_BLOCK, width) for x in self.rooms)
            self.rooms[0][:, :, :length], self.rooms[1][:, :, :length] = self.keys, self.values
        self.rooms[0][:, :, length:total], self.rooms[1][:, :, length:total] = key_states, value_states
        self.keys, self.values = (room[:, :, :total] for room in self.rooms)
        return self.keys, self.values


def _decode(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    budgets: list[int],
    temperatures: list[float | None],
    top_p: float,
    uniforms: Tensor,
    bar: tqdm,
) -> list[list[int]]:
    """The answers to `prompts` in one batch; uniforms (B, longest budget)."""
    device = model.device
    common = shared_prefix_length(prompts) if shares_prefixes(device) else 0
    cache = Cache(layer_class_to_replicate=RoomyLayer)
    # by index, which copies: of a frozen model's slice of hidden states, torch would make the logits with one copy
    # of the output weights per row
    last = torch.tensor([-1], device=device)
    if common:
        prefix = torch.tensor([prompts[0][:common]], device=device)
        model(input_ids=prefix, cache=cache, use_cache=True, logits_to_keep=last)
        cache.batch_repeat_interleave(len(prompts))
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    ids = [[tokenizer.pad_token_id] * pad + prompt[common:] for prompt, pad in zip(prompts, pads, strict=True)]
    inputs = torch.tensor(ids, device=device)
    mask = [[1] * common + [0] * pad + [1] * (width - common - pad) for pad in pads]
    mask = torch.tensor(mask, device=device)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, common:]
    uniforms = uniforms.to(device)
    sampled, heat = _sampled_rows(temperatures, device)
    responses: list[list[int]] = [[] for _ in prompts]
    rows = list(range(len(prompts)))  # of the batch: which prompt each of them answers
    going = rows  # places, in the batch, of the rows that have not ended
    steps = 1 if is_read_at_once(device) else LOOK_EVERY
    unseen: list[Tensor] = []  # tokens (B,) of the steps since the last look
    lean: LlamaStep | None = None
    longest = max(budgets)
    for step in range(longest):
        if lean:
            logits = lean(inputs[:, 0], positions)
        else:
            logits = model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                cache=cache,
                use_cache=True,
                logits_to_keep=last,
            ).logits[:, -1]
        logits[:, tokenizer.pad_token_id] = -torch.inf
        tokens = _next_tokens(logits, uniforms[:, step], sampled, heat, top_p)
        unseen.append(tokens)
        if len(unseen) == steps or step + 1 == longest:
            answered = torch.stack(unseen, dim=1).tolist()
            unseen.clear()
            before = len(going)
            going = [
                place
                for place in going
                if _goes_on(responses[rows[place]], answered[place], budgets[rows[place]], tokenizer.eos_token_id)
            ]
            bar.update(before - len(going))
            if not going:
                break
        if step == 0 and is_plain_llama(model):
            lean = LlamaStep(model, cache, mask, CACHE_BLOCK)
        room = math.ceil(len(going) / ROW_BLOCK) * ROW_BLOCK
        if room < len(rows):
            ended = sorted(set(range(len(rows))) - set(going))
            kept = sorted(going + ended[: room - len(going)])
            going = [kept.index(place) for place in going]
            rows = [rows[place] for place in kept]
            sampled, heat = _sampled_rows([temperatures[row] for row in rows], device)
            kept = torch.tensor(kept, device=device)
            (lean.keep if lean else cache.batch_select_indices)(kept)
            tokens, mask, positions, uniforms = tokens[kept], mask[kept], positions[kept], uniforms[kept]
        inputs = tokens.clamp(min=0)[:, None]  # not a number: no embedding has it
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return responses


def _goes_on(response: list[int], tokens: list[int], budget: int, eos: int) -> bool:
    """Appends to the response what belongs to it of the tokens that were looked at; whether it has not ended.

    Raises:
        UserError: NOT_A_NUMBER is among it.
    """
    tokens = tokens[: budget - len(response)]
    if eos in tokens:
        tokens = tokens[: tokens.index(eos) + 1]
    if NOT_A_NUMBER in tokens:
        raise UserError("the model's logits are not numbers (NaN); train it anew, or try base.precision=fp32")
    response += tokens
    return response[-1] != eos and len(response) < budget
