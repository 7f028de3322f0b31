"""Padding, collating, packing and grouping."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.model import packing
from stages.lib.model.packing import (
    group_by_tokens,
    micro_batches_of_process,
    pack,
    packed_groups,
    pad,
    pad_collate_fn,
    shared_prefix_length,
)


def test_pad_right_and_left():
    rows = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    assert pad(rows, 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad(rows, 9, "left").tolist() == [[1, 2, 3], [9, 9, 4]]


def test_pad_pads_the_leading_dimension_only_and_keeps_the_dtype():
    padded = pad([torch.ones(2, 3, dtype=torch.float64), torch.ones(1, 3, dtype=torch.float64)])
    assert padded.shape == (2, 2, 3) and padded.dtype == torch.float64
    assert padded[1].tolist() == [[1, 1, 1], [0, 0, 0]]


def test_pad_accepts_an_empty_row():
    assert pad([torch.tensor([], dtype=torch.int64), torch.tensor([5])], 7).tolist() == [[7], [5]]


@pytest.mark.parametrize("side", ["center", "", "LEFT"])
def test_pad_refuses_an_unknown_side(side):
    with pytest.raises(ValueError, match="padding_side"):
        pad([torch.tensor([1])], padding_side=side)


def test_pad_refuses_nothing():
    with pytest.raises(ValueError, match="empty"):
        pad([])


def test_collate_pads_prompts_left_and_completions_right():
    batch = [
        {"prompt_input_ids": [1, 2], "chosen_input_ids": [3], "rejected_input_ids": [4, 5, 6]},
        {"prompt_input_ids": [7], "chosen_input_ids": [8, 9], "rejected_input_ids": [2]},
    ]
    out = pad_collate_fn(batch, pad_token_id=0)
    assert out["prompt_input_ids"].tolist() == [[1, 2], [0, 7]]
    assert out["prompt_attn_mask"].tolist() == [[1, 1], [0, 1]]
    assert out["chosen_input_ids"].tolist() == [[3, 0], [8, 9]]
    assert out["chosen_attn_mask"].tolist() == [[1, 0], [1, 1]]
    assert out["rejected_input_ids"].tolist() == [[4, 5, 6], [2, 0, 0]]
    assert out["rejected_attn_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert len(out) == 6


def test_a_real_token_that_equals_the_pad_id_keeps_its_mask():
    batch = [{"prompt_input_ids": [2, 2], "chosen_input_ids": [2], "rejected_input_ids": [2, 2, 2]}]
    out = pad_collate_fn(batch, pad_token_id=2)
    assert out["prompt_attn_mask"].tolist() == [[1, 1]]
    assert out["rejected_attn_mask"].tolist() == [[1, 1, 1]]


def test_pack_worked_example():
    packed = pack([[10, 11], [20]], [[12], [21, 22]])
    assert packed.input_ids.tolist() == [[10, 11, 12, 20, 21, 22]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert packed.sequence_lengths == [3, 3]
    # 12 is predicted at 11 (position 1), 21 at 20 (position 3), 22 at 21 (position 4)
    assert packed.completion_index.tolist() == [1, 3, 4]
    assert packed.labels.tolist() == [12, 21, 22]
    assert packed.label_sequence.tolist() == [0, 1, 1]


def test_pack_shares_equal_prompts_worked_example():
    first, other = [10, 11, 12, 13], [20]
    packed = pack([first, other, first], [[14], [21, 22], [15, 16]], share_prefixes=True)
    # [10 11 12 13] | [20 21 22] | [14] | [15 16]
    assert packed.input_ids.tolist() == [[10, 11, 12, 13, 20, 21, 22, 14, 15, 16]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 4, 4, 5]]
    assert packed.sequence_lengths == [4, 3, 1, 2]
    assert packed.contexts == [None, None, 0, 0]
    # 14 and 15 are predicted at the shared 13 (place 3), 16 at 15 (place 8)
    assert packed.completion_index.tolist() == [3, 4, 5, 3, 8]
    assert packed.last_index.tolist() == [7, 6, 9]
    assert packed.labels.tolist() == [14, 21, 22, 15, 16]
    assert packed.label_sequence.tolist() == [0, 1, 1, 2, 2]
    assert packed.num_completions == 3


def test_pack_shares_whatever_texts_begin_with_worked_example():
    system, one, other = [1, 2, 3, 4], [10, 11, 12, 13], [20, 21]
    answer = [30, 31, 32, 33]
    texts = [([*system, *one], [*answer, 40]), ([*system, *other], [50]), ([*system, *one], [*answer, 41, 42])]
    packed = pack(*zip(*texts, strict=True), share_prefixes=True)
    # [1 2 3 4] | [10 11 12 13 30 31 32 33] | [20 21 50] | [40] | [41 42]: the two answers part within the answer
    assert packed.input_ids.tolist() == [[*system, *one, *answer, *other, 50, 40, 41, 42]]
    assert packed.position_ids.tolist() == [[*range(12), 4, 5, 6, 12, 12, 13]]
    assert packed.sequence_lengths == [4, 8, 3, 1, 2]
    assert packed.contexts == [None, 0, 0, 1, 1]
    # the shared answer's tokens are predicted at places 7 to 10, 40 and 41 at 11, 50 at 13, 42 at 16
    assert packed.completion_index.tolist() == [7, 8, 9, 10, 11, 13, 7, 8, 9, 10, 11, 16]
    assert packed.last_index.tolist() == [15, 14, 17]
    assert packed.label_sequence.tolist() == [0] * 5 + [1] + [2] * 6


def test_pack_does_not_cut_texts_for_a_few_tokens_that_they_share():
    packed = pack([[1, 2, 3], [1, 2, 3]], [[4, 5], [6]], share_prefixes=True)
    assert packed.sequence_lengths == [5, 4] and packed.contexts == [None, None]


@pytest.mark.parametrize("share_prefixes", [False, True])
def test_equal_texts_are_packed_once_and_one_may_end_within_another(share_prefixes):
    packed = pack([[1, 2], [1, 2], [1]], [[3, 4], [3, 4, 5, 6], [2, 3, 4]], share_prefixes)
    assert packed.input_ids.numel() == (6 if share_prefixes else 10)
    assert packed.last_index[0] == packed.last_index[2]  # [1 2 3 4] both
    assert packed.labels.tolist() == [3, 4, 3, 4, 5, 6, 2, 3, 4]
    assert packed.label_sequence.tolist() == [0] * 2 + [1] * 4 + [2] * 3


@pytest.mark.parametrize(
    ("texts", "length"),
    [
        ([], 0),
        ([[1, 2, 3]], 0),
        ([[1, 2, 3], [1, 2, 4]], 2),
        ([[1, 2, 3], [1, 2]], 1),  # each keeps a token of its own: the one that predicts its completion
        ([[1], [1, 2]], 0),
        ([[3, 1], [2, 1], [3, 2]], 0),
    ],
)
def test_what_texts_begin_with(texts, length):
    assert shared_prefix_length(texts) == length


token_lists = st.lists(st.integers(0, 1), min_size=1, max_size=8)


@given(st.lists(st.tuples(token_lists, token_lists), min_size=1, max_size=8), st.booleans())
def test_a_packed_text_reads_back_through_its_contexts(texts, share_prefixes):
    prompts, completions = map(list, zip(*texts, strict=True))
    packed = pack(prompts, completions, share_prefixes)
    ids, positions = packed.input_ids[0].tolist(), packed.position_ids[0].tolist()
    starts = [sum(packed.sequence_lengths[:i]) for i in range(len(packed.sequence_lengths))]

    def text_up_to(place: int) -> list[int]:
        number = max(i for i, start in enumerate(starts) if start <= place)
        context = packed.contexts[number]
        before = [] if context is None else text_up_to(starts[context] + packed.sequence_lengths[context] - 1)
        text = before + ids[starts[number] : place + 1]
        assert positions[place] == len(text) - 1
        return text

    assert [text_up_to(place) for place in packed.last_index.tolist()] == [p + c for p, c in texts]
    seen = [text_up_to(place) for place in packed.completion_index.tolist()]
    assert seen == [p + c[:i] for p, c in texts for i in range(len(c))]
    if share_prefixes:
        assert len(ids) <= sum(len(p) + len(c) for p, c in texts)


@pytest.mark.parametrize(("prompt", "completion"), [([], [1]), ([1], [])])
def test_pack_refuses_an_empty_side(prompt, completion):
    with pytest.raises(ValueError, match="sequence 1"):
        pack([[5], prompt], [[5], completion])


some_texts = st.lists(st.tuples(token_lists, token_lists), max_size=12)


@given(some_texts, st.integers(1, 40), st.booleans())
def test_packed_groups_hold_every_text_once_within_the_budget(texts, budget, share):
    prompts, completions = ([list(text[side]) for text in texts] for side in (0, 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "shares_prefixes", lambda device: share)
        patch.setattr(packing, "SHORTEST_SHARED", 1)
        groups = list(packed_groups(prompts, completions, budget, torch.device("cpu")))
    assert sorted(i for rows, _ in groups for i in rows) == list(range(len(texts)))
    for rows, batch in groups:
        assert batch.labels.tolist() == [token for i in rows for token in completions[i]]
        assert len(rows) == 1 or batch.input_ids.numel() <= budget


lengths_and_budget = (
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 120),
)


@given(*lengths_and_budget)
def test_groups_hold_every_item_once_within_the_budget(lengths, budget):
    groups = group_by_tokens(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[i] for i in group) <= budget for group in groups)


def test_groups_are_alike_where_they_can_be():
    """As many as first-fit-decreasing finds: [7, 2, 1], [5, 5], [4]; the longest pass takes the most memory."""
    lengths = [5, 7, 5, 4, 2, 1]
    sizes = [sum(lengths[i] for i in group) for group in group_by_tokens(lengths, 10)]
    assert sorted(sizes) == [7, 8, 9]
    # one after another to the emptier group they would be 6 4 4 and 6 4: 14 is beyond the budget
    tight = [6, 6, 4, 4, 4]
    groups = group_by_tokens(tight, 12)
    assert sorted(map(len, groups)) == [2, 3]
    assert [sum(tight[i] for i in group) for group in groups] == [12, 12]


@given(*lengths_and_budget, st.integers(1, 5))
def test_processes_share_the_batch_exactly_and_run_the_same_number_of_micro_batches(lengths, budget, processes):
    shares = [micro_batches_of_process(lengths, budget, rank, processes) for rank in range(processes)]
    counted = [i for share in shares for group, weight in share if weight == 1.0 for i in group]
    assert sorted(counted) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    assert all(weight in (0.0, 1.0) and group for share in shares for group, weight in share)
