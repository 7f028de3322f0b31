"""PPO's losses worked by hand."""

import torch

from stages.lib.rl.losses import policy_losses, value_losses


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
