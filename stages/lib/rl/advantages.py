"""How much better a token was than expected: GAE over a critic's values, or leave-one-out without a critic.

Per-token tensors are flat, (N,) over the tokens of B answers one after another, with `lengths` (B,).
"""

import torch
from torch import Tensor


def gae(rewards: Tensor, values: Tensor, lengths: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates (arXiv:1506.02438, Eq. 16): A_t = delta_t + gamma * lam * A_{t+1},
    delta_t = r_t + gamma * V_{t+1} - V_t. The value after an answer's last token is 0.

    Args:
        rewards: (N,)
        values: (N,) of the state before each token.
        lengths: (B,) tokens of each answer.

    Returns:
        (N,)
    """
    advantages = torch.zeros_like(rewards)
    following = rewards.new_zeros(len(lengths))
    next_values = rewards.new_zeros(len(lengths))
    ends = lengths.cumsum(0) - 1
    for back in range(int(lengths.max())):  # from every answer's last token towards its first
        answers = (lengths > back).nonzero().squeeze(1)
        at = ends[answers] - back
        delta = rewards[at] + gamma * next_values[answers] - values[at]
        following[answers] = delta + gamma * lam * following[answers]
        advantages[at] = following[answers]
        next_values[answers] = values[at]
    return advantages


def leave_one_out(returns: Tensor, answers_per_prompt: int) -> Tensor:
    """An answer's return less the mean return of the other answers to its prompt (RLOO, arXiv:2402.14740, Eq. 7).

    Args:
        returns: (B,), the answers to one prompt next to each other.
        answers_per_prompt: at least 2.

    Returns:
        (B,), with mean 0 over each prompt's answers.
    """
    groups = returns.view(-1, answers_per_prompt)
    others = (groups.sum(1, keepdim=True) - groups) / (answers_per_prompt - 1)
    return (groups - others).flatten()


def whiten(values: Tensor) -> Tensor:
    """To mean 0 and variance 1.

    A single token, or tokens without spread, have no variance: they are only shifted.
    """
    mean = values.mean()
    variance = ((values - mean) ** 2).sum() / max(len(values) - 1, 1)
    return (values - mean) * torch.rsqrt(variance + 1e-8)


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(return - value) / Var(return): 1 for a perfect critic, 0 for one that says nothing."""
    spread = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / spread) if spread > 0 else 0.0
