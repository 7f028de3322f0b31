"""Advantages worked by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.rl.advantages import explained_variance, gae, leave_one_out, whiten


def test_gae_of_three_tokens():
    # gamma 0.9, lam 0.5; V after the end is 0
    # delta_2 = 2 + 0.9 * 0   - 1.0 = 1.0                    A_2 = 1.0
    # delta_1 = 0 + 0.9 * 1.0 - 0.5 = 0.4                    A_1 = 0.4 + 0.45 * 1.0 = 0.85
    # delta_0 = -1 + 0.9 * 0.5 - 0.2 = -0.75                 A_0 = -0.75 + 0.45 * 0.85 = -0.3675
    rewards, values = torch.tensor([-1.0, 0.0, 2.0]), torch.tensor([0.2, 0.5, 1.0])
    advantages = gae(rewards, values, torch.tensor([3]), gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([-0.3675, 0.85, 1.0]))


def test_gae_at_lam_one_is_what_follows_minus_the_value():
    rewards, values = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 20.0, 30.0])
    expected = torch.tensor([6.0 - 10, 5.0 - 20, 3.0 - 30])
    torch.testing.assert_close(gae(rewards, values, torch.tensor([3]), gamma=1.0, lam=1.0), expected)


def test_gae_at_lam_zero_looks_one_step_ahead():
    rewards, values = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.25])
    expected = torch.tensor([0.75, 1.75])
    torch.testing.assert_close(gae(rewards, values, torch.tensor([2]), gamma=1.0, lam=0.0), expected)


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6))
def test_nothing_flows_from_one_answer_into_another(lengths):
    generator = torch.Generator().manual_seed(sum(lengths))
    rewards, values = torch.rand(2, sum(lengths), generator=generator)
    together = gae(rewards, values, torch.tensor(lengths), 0.9, 0.8)
    parts = zip(rewards.split(lengths), values.split(lengths), lengths, strict=True)
    alone = [gae(r, v, torch.tensor([n]), 0.9, 0.8) for r, v, n in parts]
    torch.testing.assert_close(together, torch.cat(alone))


def test_leave_one_out_by_hand():
    # the first prompt's answers earn 1 and 5: each is measured against the other; 0, 3, 6 against 4.5, 3, 1.5
    assert leave_one_out(torch.tensor([1.0, 5.0]), 2).tolist() == [-4.0, 4.0]
    assert leave_one_out(torch.tensor([0.0, 3.0, 6.0, 1.0, 1.0, 1.0]), 3).tolist() == [-4.5, 0.0, 4.5, 0, 0, 0]


def test_whitening_by_hand():
    # mean 2, variance ((1 - 2)^2 + (3 - 2)^2) / (2 - 1) = 2
    torch.testing.assert_close(whiten(torch.tensor([1.0, 3.0])), torch.tensor([-1.0, 1.0]) / math.sqrt(2))


@pytest.mark.parametrize("values", [[5.0], [5.0, 5.0]])
def test_tokens_without_spread_are_only_shifted(values):
    assert whiten(torch.tensor(values)).tolist() == [0.0] * len(values)  # stock divides by zero tokens less one


def test_explained_variance():
    returns = torch.tensor([0.0, 1.0, 2.0])
    assert explained_variance(returns, returns) == 1.0
    assert explained_variance(torch.full((3,), 7.0), returns) == pytest.approx(0.0)
    assert explained_variance(torch.tensor([2.0, 1.0, 0.0]), returns) == pytest.approx(1 - 4.0)  # errors -2, 0, 2
    assert explained_variance(torch.zeros(2), torch.ones(2)) == 0.0
