"""The DPO loss and its variants, as pure functions of log-probabilities.

Every loss takes the same four (B,) vectors of summed completion log-probs, in nats and float32, and returns
(B,) losses; the caller averages. None of them overflows: log-sigmoid and softplus are linear in their tails.
"""

from torch import Tensor
from torch.nn.functional import logsigmoid

from stages.lib.model.ranked_right import ranked_right


def dpo_losses(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log sigmoid of the reward margin (arXiv:2305.18290, Eq. 7).

    With `label_smoothing` e > 0, cDPO (Mitchell, 2023, https://ericmitchell.ai/cdpo.pdf, Eq. 3): each
    preference is taken to be flipped with probability e, so the loss is (1 - e) loss(m) + e loss(-m).

    Returns:
        (B,) losses; ln 2 where policy and reference agree.
    """
    chosen_rewards, rejected_rewards = implicit_rewards(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta
    )
    margins = chosen_rewards - rejected_rewards
    return -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)


def ipo_losses(
    chosen_mean_logps: Tensor,
    rejected_mean_logps: Tensor,
    ref_chosen_mean_logps: Tensor,
    ref_rejected_mean_logps: Tensor,
    beta: float,
) -> Tensor:
    """Squared distance of the log-ratio margin from 1 / (2 beta) (IPO, arXiv:2310.12036, Eq. 17).

    Takes means over completion tokens, not sums, as its authors advised
    (https://huggingface.co/blog/pref-tuning) and TRL does: sums would punish long completions.

    Returns:
        (B,) losses; 1 / (4 beta^2) where policy and reference agree.
    """
    chosen_log_ratios = chosen_mean_logps - ref_chosen_mean_logps
    rejected_log_ratios = rejected_mean_logps - ref_rejected_mean_logps
    return (chosen_log_ratios - rejected_log_ratios - 1 / (2 * beta)) ** 2


def sft_losses(chosen_logps: Tensor, chosen_lengths: Tensor) -> Tensor:
    """Mean negative log-prob per chosen token (RPO, arXiv:2404.19733, Eq. 2), added against displacement.

    Args:
        chosen_logps: (B,) summed log-probs.
        chosen_lengths: (B,) completion tokens.

    Returns:
        (B,) nats per token.
    """
    return -chosen_logps / chosen_lengths


def implicit_rewards(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """beta x (policy - reference log-prob) of chosen and rejected, (B,) each."""
    return beta * (chosen_logps - ref_chosen_logps), beta * (rejected_logps - ref_rejected_logps)


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float = 0.1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The DPO loss of a batch with its two usual companions.

    Args:
        chosen_logps, rejected_logps: (B,) of the policy.
        ref_chosen_logps, ref_rejected_logps: (B,) of the reference, without gradient.
        beta: implicit-reward temperature.

    Returns:
        Three scalars: mean loss; share of pairs whose chosen reward is above the rejected one (a tie counts
        half); mean reward margin. The last two carry no gradient.
    """
    logps = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    chosen_rewards, rejected_rewards = (rewards.detach() for rewards in implicit_rewards(*logps, beta))
    accuracy = ranked_right(chosen_rewards, rejected_rewards).mean()
    return dpo_losses(*logps, beta).mean(), accuracy, (chosen_rewards - rejected_rewards).mean()
