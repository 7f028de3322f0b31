"""PPO's two clipped losses, per token (arXiv:1707.06347)."""

import torch
from torch import Tensor


def policy_losses(logps: Tensor, old_logps: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate, negated, and whether clipping decided (arXiv:1707.06347, Eq. 7); all (N,)."""
    ratio = torch.exp(logps - old_logps)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Half the squared error, with the value held near the old one, and whether that decided; all (N,)."""
    held = values.clamp(old_values - cliprange, old_values + cliprange)  # exactly `values` where it is free
    unclipped, clipped = (values - returns) ** 2, (held - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped
