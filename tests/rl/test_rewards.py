"""Per-token rewards worked by hand."""

import math

import pytest
import torch

from stages.lib.rl.rewards import (
    adapted_kl_coef,
    penalize_unfinished,
    score_scale,
    sum_by_answer,
    token_kl,
    token_rewards,
)


def test_sums_by_answer():
    values, lengths = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]), torch.tensor([2, 1, 2])
    assert sum_by_answer(values, lengths).tolist() == [3.0, 4.0, 24.0]


def test_token_rewards_price_kl_and_pay_the_score_on_the_last_token():
    kl = torch.tensor([0.5, 1.0, 0.2, 0.4, 0.6])  # answers of two and three tokens
    rewards = token_rewards(kl, torch.tensor([2.0, -1.0]), torch.tensor([2, 3]), kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([-0.05, 1.9, -0.02, -0.04, -1.06]))


def test_kl_estimators():
    # the policy finds the token twice as likely: k1 = ln 2; k3 = 1/2 - 1 + ln 2
    logps, ref_logps = torch.tensor([math.log(0.5)]), torch.tensor([math.log(0.25)])
    assert token_kl(logps, ref_logps, "k1").item() == pytest.approx(math.log(2))
    assert token_kl(logps, ref_logps, "k3").item() == pytest.approx(math.log(2) - 0.5)
    assert token_kl(ref_logps, logps, "k3").item() == pytest.approx(2 - 1 - math.log(2))  # never negative


def test_penalty_is_for_the_unfinished():
    scores, ended = torch.tensor([1.0, 1.0]), torch.tensor([True, False])
    assert penalize_unfinished(scores, ended, 0.5).tolist() == [1.0, 0.5]


def test_adaptive_kl_coefficient():
    assert adapted_kl_coef(0.1, kl=6.0, target=6.0) == pytest.approx(0.1)
    assert adapted_kl_coef(0.1, kl=6.6, target=6.0) == pytest.approx(0.1 * 1.01)  # 10 % over, gain 0.1
    assert adapted_kl_coef(0.1, kl=60.0, target=6.0) == pytest.approx(0.1 * 1.02)  # the error is capped at 20 %
    assert adapted_kl_coef(0.1, kl=-1.0, target=6.0) == pytest.approx(0.1 * 0.98)  # a k1 estimate can be negative


def test_score_scale():
    assert score_scale(torch.tensor([1.0, 3.0])) == (2.0, pytest.approx(math.sqrt(2)))
    assert score_scale(torch.full((5,), 0.1)) == (pytest.approx(0.1), 1.0)  # no spread: shifted, not blown up
    assert score_scale(torch.tensor([7.0])) == (7.0, 1.0)
