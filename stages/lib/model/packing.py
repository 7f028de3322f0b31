"""Padding, collating, packing, and grouping by a token budget."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from tqdm import tqdm

SHORTEST_SHARED = 4  # tokens that texts must begin with alike: a sequence of its own costs as much as a few tokens


def pad(tensors: list[Tensor], padding_value: int = 0, padding_side: str = "right") -> Tensor:
    """Stacks tensors of different lengths, padding their leading dimension.

    Args:
        tensors: N tensors (T_i, ...), equal in all dimensions but the first.
        padding_value: what fills the gaps.
        padding_side: 'left' or 'right'.

    Returns:
        (N, max T_i, ...), of the first tensor's dtype and device.

    Raises:
        ValueError: no tensors, or an unknown side.
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side must be 'left' or 'right', not {padding_side!r}")
    if not tensors:
        raise ValueError("nothing to pad: the list of tensors is empty")
    longest = max(len(tensor) for tensor in tensors)
    padded = tensors[0].new_full((len(tensors), longest, *tensors[0].shape[1:]), padding_value)
    for row, tensor in zip(padded, tensors, strict=True):
        start = longest - len(tensor) if padding_side == "left" else 0
        row[start : start + len(tensor)] = tensor
    return padded


def pad_collate_fn(batch: list[dict[str, list[int]]], pad_token_id: int) -> dict[str, Tensor]:
    """Collates tokenized pairs: prompts padded on the left, completions on the right.

    So a prompt ends where its completion begins, and the two can be joined along the length. The masks come
    from the lengths: a real token that equals the pad id keeps its 1.

    Args:
        batch: B rows with prompt_input_ids, chosen_input_ids and rejected_input_ids.
        pad_token_id: fills the gaps.

    Returns:
        {prompt,chosen,rejected}_{input_ids,attn_mask}, each (B, longest of its kind), int64;
        a mask is 1 on real tokens and 0 on padding.
    """
    collated = {}
    for part, side in (("prompt", "left"), ("chosen", "right"), ("rejected", "right")):
        ids = [torch.tensor(row[f"{part}_input_ids"], dtype=torch.int64) for row in batch]
        collated[f"{part}_input_ids"] = pad(ids, pad_token_id, side)
        collated[f"{part}_attn_mask"] = pad([torch.ones_like(row) for row in ids], 0, side)
    return collated


@dataclass(frozen=True)
class PackedBatch:
    """S texts (prompt + completion) one after another in a single row of T tokens, without padding.

    Where prefixes are shared, a text is cut into sequences: what it has in common with others is a sequence of
    its own, which theirs continue.

    input_ids:         (1, T)
    position_ids:      (1, T) restarting at 0 in each sequence, or going on where its context ends
    sequence_lengths:  ints whose sum is T; S of them unless prefixes are shared
    contexts:          for each of these sequences the number of an earlier one that it continues, or None
    sequence_ends:     int32, 0 and the running sums of sequence_lengths: attention's kernels read them in every layer
    num_completions:   S
    completion_index:  (N,) positions whose hidden state predicts a completion token
    last_index:        (S,) position of each completion's last token
    labels:            (N,) those completion tokens
    label_sequence:    (N,) which of the S completions each label belongs to
    """

    input_ids: Tensor
    position_ids: Tensor
    sequence_lengths: list[int]
    contexts: list[int | None]
    sequence_ends: Tensor
    num_completions: int
    completion_index: Tensor
    last_index: Tensor
    labels: Tensor
    label_sequence: Tensor

    def to(self, device: torch.device) -> "PackedBatch":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def pack(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], share_prefixes: bool = False
) -> PackedBatch:
    """Packs S prompts with their completions; both have at least one token each.

    Equal texts go into the row once.

    Args:
        share_prefixes: what different texts begin with goes into the row once too, wherever they part: a chat
            template's system message, the prompt of two answers, an answer up to where a copy of it differs.
            Causality makes that exact: what a prefix computes does not depend on what follows it.

    Raises:
        ValueError: an empty prompt or completion: no position would predict the completion's first token.
    """
    for number, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        if len(prompt) == 0 or len(completion) == 0:
            raise ValueError(f"sequence {number}: prompt and completion need at least one token each")
    texts = [(*prompt, *completion) for prompt, completion in zip(prompts, completions, strict=True)]
    input_ids: list[int] = []
    position_ids: list[int] = []
    sequence_lengths: list[int] = []
    contexts: list[int | None] = []
    places_of: dict[tuple[int, ...], list[int]] = {}  # text -> where each of its tokens lies in the row
    # a prefix tree, node after node: texts that begin alike, with how long, the sequence that ends there, and places
    todo: list[tuple[list[tuple[int, ...]], int, int | None, list[int]]]
    todo = [(sorted(set(texts)) if share_prefixes else list(dict.fromkeys(texts)), 0, None, [])]
    while todo:
        group, start, context, before = todo.pop()
        for branch in _branches(group, start) if share_prefixes else [[text] for text in group]:
            end = shared_length(branch[0], branch[-1])  # the others lie between in the dictionary's order
            places = before + list(range(len(input_ids), len(input_ids) + end - start))
            input_ids += branch[0][start:end]
            position_ids += range(start, end)
            sequence_lengths.append(end - start)
            contexts.append(context)
            places_of |= {text: places for text in branch if len(text) == end}
            if longer := [text for text in branch if len(text) > end]:
                todo.append((longer, end, len(contexts) - 1, places))
    spans = [(places_of[text], len(prompt)) for text, prompt in zip(texts, prompts, strict=True)]
    return PackedBatch(
        input_ids=torch.tensor([input_ids]),
        position_ids=torch.tensor([position_ids]),
        sequence_lengths=sequence_lengths,
        contexts=contexts,
        sequence_ends=torch.tensor([0, *sequence_lengths]).cumsum(0, dtype=torch.int32),
        num_completions=len(completions),
        completion_index=torch.tensor([place for places, start in spans for place in places[start - 1 : -1]]),
        last_index=torch.tensor([places[-1] for places, _ in spans]),
        labels=torch.tensor([token for completion in completions for token in completion]),
        label_sequence=torch.tensor([i for i, completion in enumerate(completions) for _ in completion]),
    )


def rows_at(x: Tensor, index: Tensor) -> Tensor:
    """(T, H) to its (N, H) rows at an index, some more than once: with the same gradient, to the bit, every time.

    torch 2.13 adds the rows' gradients in the order in which threads come to them: for `x[index]` on CPUs, for
    `index_select` on GPUs.
    """
    return x.index_select(0, index) if x.device.type == "cpu" else x[index]


def _branches(texts: list[tuple[int, ...]], start: int) -> list[list[tuple[int, ...]]]:
    """Cuts different texts in sorted order, alike up to `start`, where they do not go on alike for long enough."""
    branches = [texts[:1]]
    for previous, text in zip(texts, texts[1:], strict=False):
        if shared_length(previous, text) < start + SHORTEST_SHARED:
            branches.append([])
        branches[-1].append(text)
    return branches


def shared_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts both begin with."""
    most = min(len(one), len(other))
    return next((i for i in range(most) if one[i] != other[i]), most)


def shares_prefixes(device: torch.device) -> bool:
    """Whether to run equal beginnings once: on CPUs; variable-length attention on GPUs wants whole sequences."""
    return device.type == "cpu"


def shared_prefix_length(texts: Sequence[list[int]]) -> int:
    """How many tokens several different texts all begin with; at least one of each text is left over.

    One text, or none, shares nothing: 0.
    """
    if len(texts) < 2:
        return 0
    # the others lie between in the dictionary's order
    return min(shared_length(min(texts), max(texts)), min(map(len, texts)) - 1)


def group_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Packs items into as few groups as first-fit-decreasing finds, each of at most `budget` tokens.

    Where they can be, groups are alike: the longest pass takes the most memory, and passes of ever other lengths leave
    holes in it.

    Args:
        lengths: tokens of each item.
        budget: tokens a group may hold; an item longer than it gets a group of its own.

    Returns:
        Groups of indices into `lengths`; each index is in exactly one group.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups: list[list[int]] = []
    room: list[int] = []
    for index in by_length:
        for number, left in enumerate(room):
            if lengths[index] <= left:
                groups[number].append(index)
                room[number] -= lengths[index]
                break
        else:
            groups.append([index])
            room.append(budget - lengths[index])
    alike: list[list[int]] = [[] for _ in groups]
    tokens = [0] * len(groups)
    for index in by_length:
        least = tokens.index(min(tokens))
        alike[least].append(index)
        tokens[least] += lengths[index]
    return alike if max(tokens, default=0) <= budget - min(room, default=0) else groups


@torch.no_grad()
def read_tokens(
    read: Callable[[list[int], PackedBatch], tuple[Tensor, ...]],
    prompts: list[list[int]],
    responses: list[list[int]],
    micro_batch_tokens: int,
    device: torch.device,
    bar: tqdm | None = None,
) -> list[Tensor]:
    """What a model makes of each response token, in the order given, whatever groups it reads them in.

    Args:
        read: indices of some texts and these, packed, to K tensors (n, ...): an entry per response token of theirs.
        prompts, responses: B lists of token ids each.
        micro_batch_tokens: memory dial: tokens per group.
        bar: counts the tokens.

    Returns:
        K tensors (N, ...) on the CPU, answer after answer.
    """
    order: list[int] = []
    found: list[tuple[Tensor, ...]] = []
    for rows, batch in packed_groups(prompts, responses, micro_batch_tokens, device, bar):
        found.append(tuple(values.cpu() for values in read(rows, batch)))
        order += rows
    place_of = {row: place for place, row in enumerate(order)}
    tables = [torch.cat(parts).split([len(responses[i]) for i in order]) for parts in zip(*found, strict=True)]
    return [torch.cat([table[place_of[i]] for i in range(len(order))]) for table in tables]


def packed_groups(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    micro_batch_tokens: int,
    device: torch.device,
    bar: tqdm | None = None,
) -> Iterator[tuple[list[int], PackedBatch]]:
    """All texts once, to be read without gradient, those that begin alike together, whose beginnings are read once.

    Args:
        prompts, completions: S lists of token ids each.
        micro_batch_tokens: memory dial: tokens of a group's row; a longer text gets a group of its own.
        bar: counts the texts' tokens, group by group.

    Yields:
        (indices of the group's texts, these packed, on `device`).
    """
    share = shares_prefixes(device)
    texts = [(*prompt, *completion) for prompt, completion in zip(prompts, completions, strict=True)]
    groups: list[list[int]] = []
    room = 0
    for i in sorted(range(len(texts)), key=texts.__getitem__):
        new = len(texts[i]) - (shared_length(texts[groups[-1][-1]], texts[i]) if share and groups else 0)
        if not groups or new > room:
            groups.append([])
            room, new = micro_batch_tokens, len(texts[i])
        groups[-1].append(i)
        room -= new
    for group in groups:
        yield group, pack([prompts[i] for i in group], [completions[i] for i in group], share).to(device)
        if bar is not None:
            bar.update(sum(len(texts[i]) for i in group))


def micro_batches_of_process(
    lengths: Sequence[int], budget: int, process: int, num_processes: int
) -> list[tuple[list[int], float]]:
    """This process's micro-batches of one optimizer batch, each with a weight.

    Long items are dealt out first, one process after another, so that all have similar work. Every process gets
    as many micro-batches as the busiest, since collective operations must match: the extra ones repeat the
    shortest item with weight 0.

    Args:
        lengths: tokens of each item of the whole batch.
        budget: tokens of a micro-batch.
        process: index of this process, below num_processes.

    Returns:
        (indices into `lengths`, weight 1.0 or 0.0) per micro-batch. Over all processes each index has weight 1
        exactly once.
    """
    by_length = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    groups_per_process = []
    for first in range(num_processes):
        share = by_length[first::num_processes]
        groups = group_by_tokens([lengths[i] for i in share], budget)
        groups_per_process.append([[share[i] for i in group] for group in groups])
    rounds = max(map(len, groups_per_process))
    mine = groups_per_process[process]
    idle = [(by_length[-1:], 0.0)] * (rounds - len(mine))
    return idle + [(group, 1.0) for group in mine]
