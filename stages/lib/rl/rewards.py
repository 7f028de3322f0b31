"""What an answer earns: the reward model's score once, minus the price of KL on every token.

Per-token tensors are flat, (N,) over the tokens of B answers one after another, with `lengths` (B,).
"""

import torch
from torch import Tensor

KL_CONTROLLER_GAIN = 0.1  # K_beta of arXiv:1909.08593, section 2.2


def sum_by_answer(values: Tensor, lengths: Tensor) -> Tensor:
    """(N,) per token to (B,) sums per answer."""
    answers = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return values.new_zeros(len(lengths)).index_add(0, answers, values)


def token_kl(logps: Tensor, ref_logps: Tensor, estimator: str = "k1") -> Tensor:
    """(N,) KL to the reference on sampled tokens, by the k1 or k3 estimator (joschu.net/blog/kl-approx.html)."""
    log_ratio = ref_logps - logps
    return -log_ratio if estimator == "k1" else log_ratio.exp() - 1 - log_ratio


def penalize_unfinished(scores: Tensor, ended: Tensor, penalty: float) -> Tensor:
    """(B,) scores, less `penalty` for the answers that did not end in EOS."""
    return scores - penalty * (~ended).to(scores.dtype)


def token_rewards(kl: Tensor, scores: Tensor, lengths: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef x KL on every token, plus the answer's score on its last one (arXiv:1909.08593, Eq. 2).

    Args:
        kl: (N,)
        scores: (B,)
        lengths: (B,) tokens of each answer, EOS included.

    Returns:
        (N,)
    """
    rewards = -kl_coef * kl
    rewards[lengths.cumsum(0) - 1] += scores
    return rewards


def score_scale(scores: Tensor) -> tuple[float, float]:
    """(mean, standard deviation) to normalise by; the deviation is 1 where the scores have no spread."""
    mean, std = scores.mean().item(), scores.std().item() if len(scores) > 1 else 0.0
    return mean, std if std > 1e-6 * max(1.0, abs(mean)) else 1.0


def adapted_kl_coef(kl_coef: float, kl: float, target: float) -> float:
    """The log-proportional controller of arXiv:1909.08593, section 2.2: the error is clipped to 20 %."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + KL_CONTROLLER_GAIN * error)
