"""An optimizer step of PPO: on the mean loss over the tokens of some answers of a rollout."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from stages.lib.model.attention import use_packed_attention
from stages.lib.rl.learner import Learner
from stages.lib.rl.rollout import Rollout


def step_on(
    learner: Learner,
    rollout: Rollout,
    answers: list[int],
    losses_of: Callable[[Any, Tensor], tuple[Tensor, dict[str, Tensor]]],
    target_kl: float | None = None,
) -> dict[str, float]:
    """One step on the mean loss over all tokens of `answers`.

    Args:
        losses_of: (the module's output, indices of its tokens in the rollout) to (n,) losses and statistics by name.
        target_kl: with a mean `approxkl` above it there is no step: the gradient is thrown away. None: always.

    Returns:
        Means over the tokens of `loss` and of every statistic; `grad_norm` before clipping (0 without a step), and
        `steps` and `skipped` (by fp16's scaler), 0 or 1.

    Raises:
        NotFinite: the gradient is not, and no scale of fp16's makes it so. Nothing has been changed then.
    """
    prompts, responses = [rollout.prompts[i] for i in answers], [rollout.responses[i] for i in answers]
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]

    def losses_of_part(part: list[int], output: Any) -> tuple[Tensor, dict[str, Tensor]]:
        return losses_of(output, rollout.tokens_of([answers[i] for i in part]))

    work = [prompts], [responses], lengths, losses_of_part, sum(map(len, responses))
    with use_packed_attention(learner.model):
        means = learner.dial.run(learner.mean_gradient, *work, undo=learner.optimizer.zero_grad)
    if target_kl is not None and means["approxkl"] > target_kl:
        learner.optimizer.zero_grad()
        return means | {"grad_norm": 0.0, "steps": 0, "skipped": 0}
    norm, skipped = learner.step()
    return means | {"grad_norm": 0.0 if skipped else norm, "steps": int(not skipped), "skipped": int(skipped)}
