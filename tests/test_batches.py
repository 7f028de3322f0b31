"""Padding, collating, packing and grouping."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.batches import (
    consecutive_groups,
    group_by_tokens,
    micro_batches_of_process,
    pack,
    pad,
    pad_collate_fn,
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


def test_pack_with_shared_prompts_worked_example():
    packed = pack([[10, 11], [20], [10, 11]], [[12], [21, 22], [13, 14]], share_prompts=True)
    assert packed.input_ids.tolist() == [[10, 11, 12, 20, 21, 22, 13, 14]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 2, 3]]
    assert packed.sequence_lengths == [2, 1, 1, 2, 2]
    assert packed.contexts == [None, 0, None, 2, 0]
    # 13 is predicted at the shared 11 (position 1), 14 at 13 (position 6)
    assert packed.completion_index.tolist() == [1, 3, 4, 1, 6]
    assert packed.labels.tolist() == [12, 21, 22, 13, 14]
    assert packed.label_sequence.tolist() == [0, 1, 1, 2, 2]
    assert packed.num_completions == 3


@pytest.mark.parametrize(("prompt", "completion"), [([], [1]), ([1], [])])
def test_pack_refuses_an_empty_side(prompt, completion):
    with pytest.raises(ValueError, match="sequence 1"):
        pack([[5], prompt], [[5], completion])


lengths_and_budget = (
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
    st.integers(1, 120),
)


@given(*lengths_and_budget)
def test_consecutive_groups_keep_the_order_and_the_budget(lengths, budget):
    groups = consecutive_groups(lengths, budget)
    assert [i for group in groups for i in group] == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[i] for i in group) <= budget for group in groups)
    for group, following in zip(groups, groups[1:], strict=False):  # none could have been longer
        assert sum(lengths[i] for i in [*group, following[0]]) > budget


@given(*lengths_and_budget)
def test_groups_hold_every_item_once_within_the_budget(lengths, budget):
    groups = group_by_tokens(lengths, budget)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or sum(lengths[i] for i in group) <= budget for group in groups)


@given(*lengths_and_budget, st.integers(1, 5))
def test_processes_share_the_batch_exactly_and_run_the_same_number_of_micro_batches(lengths, budget, processes):
    shares = [micro_batches_of_process(lengths, budget, rank, processes) for rank in range(processes)]
    counted = [i for share in shares for group, weight in share if weight == 1.0 for i in group]
    assert sorted(counted) == list(range(len(lengths)))
    assert len({len(share) for share in shares}) == 1
    assert all(weight in (0.0, 1.0) and group for share in shares for group, weight in share)
