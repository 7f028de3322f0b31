"""The DPO losses against numbers worked by hand and TRL's trainer."""

import math

import pytest
import torch

from stages.lib.rl.dpo import dpo_loss, dpo_losses, implicit_rewards, ipo_losses, sft_losses


def tensors(*rows):
    return [torch.tensor(row, dtype=torch.float32) for row in rows]


def test_dpo_loss_worked_example():
    # policy prefers chosen by 20 nats, reference by 10: margin = 0.1 * (20 - 10) = 1
    # loss = log(1 + e^-1) = 0.313262
    loss, accuracy, margin = dpo_loss(*tensors([-30.0], [-50.0], [-35.0], [-45.0]), beta=0.1)
    assert loss.item() == pytest.approx(0.313262, abs=1e-6)
    assert accuracy.item() == 1.0
    assert margin.item() == pytest.approx(1.0, abs=1e-6)


def test_dpo_loss_is_ln2_when_policy_is_the_reference():
    loss, accuracy, margin = dpo_loss(*tensors([-30.0, -7.0], [-50.0, -3.0], [-30.0, -7.0], [-50.0, -3.0]))
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    assert accuracy.item() == 0.5  # a tie counts half
    assert margin.item() == 0.0


def test_dpo_loss_averages_over_the_batch():
    # margins 0.5 * (4, -4) = (2, -2): losses log(1 + e^-2) = 0.126928 and log(1 + e^2) = 2.126928
    loss, accuracy, margin = dpo_loss(
        *tensors([-10.0, -14.0], [-10.0, -10.0], [-14.0, -10.0], [-10.0, -10.0]), beta=0.5
    )
    assert loss.item() == pytest.approx(1.126928, abs=1e-6)
    assert accuracy.item() == 0.5
    assert margin.item() == pytest.approx(0.0, abs=1e-7)


def test_swapping_chosen_and_rejected_negates_the_margin():
    generator = torch.Generator().manual_seed(1)
    chosen, rejected, ref_chosen, ref_rejected = -50 * torch.rand(4, 9, generator=generator)
    _, _, margin = dpo_loss(chosen, rejected, ref_chosen, ref_rejected)
    _, _, swapped = dpo_loss(rejected, chosen, ref_rejected, ref_chosen)
    assert swapped.item() == pytest.approx(-margin.item(), abs=1e-6)


@pytest.mark.parametrize("gap", [1e4, -1e4, 1e8, -1e8])
def test_extreme_margins_stay_finite(gap):
    chosen, rejected, zero, other = tensors([gap], [0.0], [0.0], [0.0])
    chosen.requires_grad_(True)
    loss, _, _ = dpo_loss(chosen, rejected, zero, other, beta=1.0)
    loss.backward()
    assert loss.item() == pytest.approx(max(0.0, -gap))
    assert chosen.grad.item() == pytest.approx(0.0 if gap > 0 else -1.0)


def test_gradient_is_beta_sigmoid_of_the_negated_margin():
    # Eq. 7: d loss / d chosen logp = -beta * sigmoid(-margin); margin 0.1 * 10 = 1, sigmoid(-1) = 0.268941
    chosen, rejected, ref_chosen, ref_rejected = tensors([-30.0], [-50.0], [-35.0], [-45.0])
    chosen.requires_grad_(True), rejected.requires_grad_(True)
    dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1)[0].backward()
    assert chosen.grad.item() == pytest.approx(-0.0268941, abs=1e-7)
    assert rejected.grad.item() == pytest.approx(0.0268941, abs=1e-7)


def test_label_smoothing_worked_example():
    # margin 1, e = 0.1: 0.9 * 0.313262 + 0.1 * 1.313262 = 0.413262
    losses = dpo_losses(*tensors([-30.0], [-50.0], [-35.0], [-45.0]), beta=0.1, label_smoothing=0.1)
    assert losses.item() == pytest.approx(0.413262, abs=1e-6)


def test_ipo_worked_example():
    # log-ratio margin 0.2 - (-0.1) = 0.3, target 1 / (2 * 0.5) = 1: (0.3 - 1)^2 = 0.49
    losses = ipo_losses(*tensors([-1.0], [-2.1], [-1.2], [-2.0]), beta=0.5)
    assert losses.item() == pytest.approx(0.49, abs=1e-6)


def test_sft_is_the_mean_negative_log_prob():
    assert sft_losses(torch.tensor([-30.0]), torch.tensor([12])).item() == pytest.approx(2.5)


def test_implicit_rewards_worked_example():
    chosen, rejected = implicit_rewards(*tensors([-30.0], [-50.0], [-35.0], [-45.0]), beta=0.1)
    assert (chosen.item(), rejected.item()) == (pytest.approx(0.5), pytest.approx(-0.5))
