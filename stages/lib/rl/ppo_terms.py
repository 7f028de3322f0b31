"""What PPO computes from log-probs, values and scores: rewards, advantages and losses, free of any model.

Per-token tensors are (B, T) with T the longest response, and 0 after each answer's end; flat ones are (N,) over
the tokens that count.
"""

import torch
from torch import Tensor

KL_CONTROLLER_GAIN = 0.1  # K_beta of arXiv:1909.08593, section 2.2


# 3. per-token rewards


def penalize_unfinished(scores: Tensor, ended: Tensor, penalty: float | None) -> Tensor:
    """(B,) scores, less `penalty` for the answers that did not end in EOS."""
    return scores - (penalty or 0.0) * (~ended).to(scores.dtype)


def token_kl(logps: Tensor, ref_logps: Tensor, estimator: str) -> Tensor:
    """(B, T) KL to the reference on sampled tokens, by the k1 or k3 estimator (joschu.net/blog/kl-approx.html)."""
    log_ratio = ref_logps - logps
    return -log_ratio if estimator == "k1" else log_ratio.exp() - 1 - log_ratio


def token_rewards(
    kl: Tensor, scores: Tensor, lengths: Tensor, kl_coef: float, on_last_token: bool = True
) -> Tensor:
    """-kl_coef * KL on every token, plus the score of the whole answer on one (arXiv:1909.08593, Eq. 2).

    Args:
        kl: (B, T), 0 after each answer's end.
        scores: (B,)
        lengths: (B,) tokens of each answer, EOS included.
        on_last_token: else one position later where T leaves room, as stock does.

    Returns:
        (B, T)
    """
    rewards = -kl_coef * kl
    position = lengths - 1 if on_last_token else lengths.clamp(max=kl.shape[1] - 1)
    rewards[torch.arange(len(rewards), device=rewards.device), position] += scores
    return rewards


# 4. advantages


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (arXiv:1506.02438, Eq. 16): A_t = delta_t + gamma * lam * A_{t+1},
    delta_t = r_t + gamma * V_{t+1} - V_t. The value after the last position is 0.

    Args:
        rewards, values: (B, T), 0 after each answer's end, so that nothing flows back from there.

    Returns:
        (B, T)
    """
    advantages = torch.zeros_like(rewards)
    following = torch.zeros_like(rewards[:, 0])
    next_values = torch.zeros_like(following)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_values - values[:, t]
        following = delta + gamma * lam * following
        advantages[:, t] = following
        next_values = values[:, t]
    return advantages


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean where `mask` is True; 0 rather than NaN where it never is."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """To variance 1 and, with `shift_mean`, mean 0 over the mask; 0 outside it.

    A single token, or tokens without spread, have no variance: they are only shifted.
    """
    mean, count = masked_mean(values, mask), mask.sum()
    variance = masked_mean((values - mean) ** 2, mask) * count / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0)


# 5. losses


def policy_losses(logps: Tensor, old_logps: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """The clipped surrogate, negated, and whether clipping decided (arXiv:1707.06347, Eq. 7); all (N,)."""
    ratio = torch.exp(logps - old_logps)
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def value_losses(values: Tensor, old_values: Tensor, returns: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """Half the squared error, with the value held near the old one, and whether that decided; all (N,)."""
    held = old_values + (values - old_values).clamp(-cliprange, cliprange)
    unclipped, clipped = (values - returns) ** 2, (held - returns) ** 2
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped


def adapted_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """The log-proportional controller of arXiv:1909.08593, section 2.2: the error is clipped to 20 %."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + KL_CONTROLLER_GAIN * error)


def score_scale(scores: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) to normalise by; the deviation is 1 where the scores have no spread."""
    mean, std = scores.mean().item(), scores.std().item() if len(scores) > 1 else 0.0
    return mean, std if std > 1e-6 * max(1.0, abs(mean)) else 1.0
