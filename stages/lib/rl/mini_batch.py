"""An optimizer step of PPO: on the mean loss over the tokens of some answers of a rollout."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from stages.lib.model.attention import use_packed_attention
from stages.lib.rl.learner import Learner
from stages.lib.rl.rollout import Rollout

#: (module's output, indices of its tokens in the rollout) to (n,) losses and (n,) statistics by name
Losses = Callable[[Any, Tensor], tuple[Tensor, dict[str, Tensor]]]
Means = dict[str, float]


def step_on(
    learner: Learner,
    rollout: Rollout,
    answers: list[int],
    losses_of: Losses,
    coef: float = 1.0,
    forbidden: Callable[[Means], bool] = lambda means: False,
) -> Means:
    """One step on `coef` times the mean loss over all tokens of `answers`, whatever the micro-batches and processes.

    Args:
        forbidden: whether these means forbid the step; the gradient is then thrown away.

    Returns:
        `mean_gradient`'s; `grad_norm` before clipping (0 where fp16's scaler skipped the step), and `steps` and
        `skipped`, 0 or 1.

    Raises:
        NotFinite: the gradient is not, and no scale of fp16's makes it so. Nothing has been changed then.
    """
    with use_packed_attention(learner.model):
        work = learner, rollout, answers, losses_of, coef
        means = learner.dial.run(mean_gradient, *work, undo=learner.optimizer.zero_grad)
    if forbidden(means):
        learner.optimizer.zero_grad()
        return means | {"grad_norm": 0.0, "steps": 0, "skipped": 0}
    norm, skipped = learner.step()
    return means | {"grad_norm": 0.0 if skipped else norm, "steps": int(not skipped), "skipped": int(skipped)}


def mean_gradient(
    learner: Learner,
    rollout: Rollout,
    answers: list[int],
    losses_of: Losses,
    coef: float,
    micro_batch_tokens: int,
) -> Means:
    """Adds the gradient of that mean to the parameters'.

    Returns:
        Means over the tokens of the loss and of every statistic (the maximum where its name ends in "max"), the same
        in all processes.
    """
    prompts, responses = [rollout.prompts[i] for i in answers], [rollout.responses[i] for i in answers]
    lengths = [len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True)]
    num_tokens, accelerator = sum(map(len, responses)), learner.accelerator
    sums: dict[str, Tensor] = {}
    for part, weight, output in learner.outputs([prompts], [responses], lengths, micro_batch_tokens):
        losses, statistics = losses_of(output, rollout.tokens_of([answers[i] for i in part]))
        # data-parallel wrappers average over processes; the loss is a mean over the whole mini-batch
        accelerator.backward(losses.sum() * (coef * weight * accelerator.num_processes / num_tokens))
        for name, values in {"loss": losses.detach(), **statistics}.items():
            value = weight * (values.max() if name.endswith("max") else values.sum())
            before = sums.get(name, torch.zeros_like(value))
            sums[name] = torch.maximum(before, value) if name.endswith("max") else before + value
    everywhere = cast(Tensor, accelerator.gather(torch.stack(list(sums.values()))[None]))
    means = [
        column.max() if name.endswith("max") else column.sum() / num_tokens
        for name, column in zip(sums, everywhere.T, strict=True)
    ]
    return dict(zip(sums, torch.stack(means).tolist(), strict=True))  # copied to the host once
