"""Rewards, advantages and losses worked by hand, and against TRL's own helpers."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trl.experimental.ppo.ppo_trainer import masked_whiten

from stages.lib.rl.ppo_terms import (
    adapted_kl_coef,
    gae,
    masked_mean,
    penalize_unfinished,
    policy_losses,
    score_scale,
    token_kl,
    token_rewards,
    value_losses,
    whiten,
)


def test_gae_of_three_tokens():
    # gamma 0.9, lam 0.5; V after the end is 0
    # delta_2 = 2 + 0.9 * 0   - 1.0 = 1.0                    A_2 = 1.0
    # delta_1 = 0 + 0.9 * 1.0 - 0.5 = 0.4                    A_1 = 0.4 + 0.45 * 1.0 = 0.85
    # delta_0 = -1 + 0.9 * 0.5 - 0.2 = -0.75                 A_0 = -0.75 + 0.45 * 0.85 = -0.3675
    advantages = gae(torch.tensor([[-1.0, 0.0, 2.0]]), torch.tensor([[0.2, 0.5, 1.0]]), gamma=0.9, lam=0.5)
    torch.testing.assert_close(advantages, torch.tensor([[-0.3675, 0.85, 1.0]]))


def test_gae_at_lam_one_is_what_follows_minus_the_value():
    rewards, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[10.0, 20.0, 30.0]])
    expected = torch.tensor([[6.0 - 10, 5.0 - 20, 3.0 - 30]])
    torch.testing.assert_close(gae(rewards, values, gamma=1.0, lam=1.0), expected)


def test_gae_at_lam_zero_looks_one_step_ahead():
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.5, 0.25]])
    torch.testing.assert_close(gae(rewards, values, gamma=1.0, lam=0.0), torch.tensor([[0.75, 1.75]]))


@given(st.integers(1, 6), st.integers(0, 5))
def test_gae_ignores_the_room_after_an_answer(length, room):
    generator = torch.Generator().manual_seed(length)
    rewards, values = torch.rand(2, 1, length, generator=generator)
    padded = [torch.cat([x, torch.zeros(1, room)], dim=1) for x in (rewards, values)]
    torch.testing.assert_close(gae(*padded, 0.9, 0.8)[:, :length], gae(rewards, values, 0.9, 0.8))


def test_token_rewards_price_kl_and_pay_the_score_on_the_last_token():
    kl = torch.tensor([[0.5, 1.0, 0.0], [0.2, 0.4, 0.6]])  # the first answer has two tokens
    rewards = token_rewards(kl, torch.tensor([2.0, -1.0]), torch.tensor([2, 3]), kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 1.9, 0.0], [-0.02, -0.04, -1.06]]))


def test_stock_pays_one_position_later_where_there_is_room():
    kl = torch.zeros(2, 3)
    rewards = token_rewards(kl, torch.tensor([2.0, -1.0]), torch.tensor([2, 3]), 0.1, on_last_token=False)
    torch.testing.assert_close(rewards, torch.tensor([[0.0, 0.0, 2.0], [0.0, 0.0, -1.0]]))


def test_kl_estimators():
    # the policy finds the token twice as likely: k1 = ln 2; k3 = 1/2 - 1 + ln 2
    logps, ref_logps = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])
    assert token_kl(logps, ref_logps, "k1").item() == pytest.approx(math.log(2))
    assert token_kl(logps, ref_logps, "k3").item() == pytest.approx(math.log(2) - 0.5)
    assert token_kl(ref_logps, logps, "k3").item() == pytest.approx(2 - 1 - math.log(2))  # never negative


def test_penalty_is_for_the_unfinished():
    scores, ended = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    assert penalize_unfinished(scores, ended, 0.5).tolist() == [1.0, 0.5]
    assert penalize_unfinished(scores, ended, None).tolist() == [1.0, 1.0]


def test_whitening_equals_trls_where_trls_is_defined():
    generator = torch.Generator().manual_seed(0)
    values, mask = torch.randn(4, 5, generator=generator), torch.rand(4, 5, generator=generator) < 0.6
    for shift_mean in (True, False):
        expected = torch.where(mask, masked_whiten(values, mask, shift_mean), 0.0)
        torch.testing.assert_close(whiten(values, mask, shift_mean), expected)


def test_whitening_by_hand():
    # mean 2, variance ((1 - 2)^2 + (3 - 2)^2) / (2 - 1) = 2; the masked 100 counts for nothing
    whitened = whiten(torch.tensor([[1.0, 3.0, 100.0]]), torch.tensor([[True, True, False]]))
    torch.testing.assert_close(whitened, torch.tensor([[-1.0, 1.0, 0.0]]) / math.sqrt(2))


@pytest.mark.parametrize("mask", [[False, False], [True, False], [True, True]])
def test_whitening_and_means_are_numbers_where_trls_divide_by_zero(mask):
    values, mask = torch.tensor([5.0, 5.0]), torch.tensor(mask)
    assert whiten(values, mask).tolist() == [0.0, 0.0]
    assert masked_mean(values, mask).item() == (5.0 if mask.any() else 0.0)


def test_policy_losses_by_hand():
    # ratio 1.5, clipped to 1.2: a gain is capped (-1.2 beats -1.5), a loss is not (1.5 beats 1.2)
    old = torch.zeros(3)
    new = torch.tensor([1.5, 1.5, 0.9]).log()
    losses, clipped = policy_losses(new, old, torch.tensor([1.0, -1.0, 2.0]), cliprange=0.2)
    torch.testing.assert_close(losses, torch.tensor([-1.2, 1.5, -1.8]))
    assert clipped.tolist() == [True, False, False]


def test_a_clipped_gain_has_no_gradient():
    logps = torch.tensor([1.5, 1.1]).log().requires_grad_()
    losses, _ = policy_losses(logps, torch.zeros(2), torch.ones(2), 0.2)
    losses.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([0.0, -1.1]))  # d(-A e^x)/dx = -A * ratio


def test_value_losses_by_hand():
    # return 1, old value 0. New 0.5 is held at 0.2: 0.5 * max(0.25, 0.64). New 0.1 is free: 0.5 * 0.81
    losses, clipped = value_losses(torch.tensor([0.5, 0.1]), torch.zeros(2), torch.ones(2), cliprange=0.2)
    torch.testing.assert_close(losses, torch.tensor([0.32, 0.405]))
    assert clipped.tolist() == [True, False]


def test_adaptive_kl_coefficient():
    assert adapted_kl_coef(0.1, kl=6.0, target=6.0) == pytest.approx(0.1)
    assert adapted_kl_coef(0.1, kl=6.6, target=6.0) == pytest.approx(0.1 * 1.01)  # 10 % over, gain 0.1
    assert adapted_kl_coef(0.1, kl=60.0, target=6.0) == pytest.approx(0.1 * 1.02)  # the error is capped at 20 %
    assert adapted_kl_coef(0.1, kl=-1.0, target=6.0) == pytest.approx(0.1 * 0.98)  # a k1 estimate can be negative


def test_score_scale():
    assert score_scale(torch.tensor([1.0, 3.0])) == (2.0, pytest.approx(math.sqrt(2)))
    assert score_scale(torch.full((5,), 0.1)) == (pytest.approx(0.1), 1.0)  # no spread: shifted, not blown up
    assert score_scale(torch.tensor([7.0])) == (7.0, 1.0)
