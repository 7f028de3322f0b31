"""Learning rates, and one optimizer step on some answers, in micro-batches and over any number of processes."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler

from stages.lib.model.loading import loss_scale
from stages.lib.model.memory import MemoryDial
from stages.lib.model.packing import micro_batches_of_process, pack, shares_prefixes
from stages.lib.rl.rollout import Rollout

#: (module's output, indices of its tokens in the rollout) to (n,) losses and (n,) statistics by name
Losses = Callable[[Any, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Collapse(RuntimeError):
    """The policy is lost: its KL, its entropy or a number that is not finite says so."""


def learning_rate_schedule(name: str, optimizer: Optimizer, warmup_steps: int, num_steps: int) -> LambdaLR:
    """Constant, linear (to 0) or cosine (to 0) after a linear warm-up from 0."""
    name = "constant_with_warmup" if name == "constant" else name
    return cast(LambdaLR, get_scheduler(name, optimizer, warmup_steps, num_steps))


def optimizer_step(
    accelerator: Accelerator,
    module: nn.Module,
    optimizer: AcceleratedOptimizer,
    rollout: Rollout,
    answers: list[int],
    losses_of: Losses,
    dial: MemoryDial,
    max_grad_norm: float,
    coef: float = 1.0,
    forbidden: Callable[[dict[str, float]], bool] = lambda means: False,
) -> dict[str, float]:
    """One step on the mean loss over all tokens of `answers`, whatever the micro-batches and processes.

    Args:
        module: takes a packed batch; prepared by `accelerator`, under packed attention.
        dial: tokens of a micro-batch.
        coef: weight of the loss.
        max_grad_norm: clipping; 0: none.
        forbidden: whether these means forbid the step; the gradient is then thrown away.

    Returns:
        Means over the tokens of the loss and of every statistic (the maximum where its name ends in "max"), the
        same in all processes; `grad_norm` before clipping (0 where fp16's scaler skipped the step), and `steps`
        and `skipped`, 0 or 1.

    Raises:
        Collapse: the gradient is not finite, and no scale of fp16's makes it so. Nothing has been changed then.
    """
    how = (accelerator, module, rollout, answers, losses_of, coef)
    means = dial.run(mean_gradient, *how, undo=lambda: optimizer.zero_grad())
    if forbidden(means):
        optimizer.zero_grad()
        return means | {"grad_norm": 0.0, "steps": 0, "skipped": 0}
    norm = float(cast(Tensor, accelerator.clip_grad_norm_(module.parameters(), max_grad_norm or math.inf)))
    if not math.isfinite(norm) and accelerator.scaler is None:
        optimizer.zero_grad()
        raise Collapse(f"the gradient's norm is {norm}")
    scale = loss_scale(accelerator)
    optimizer.step()  # with fp16's scaler, a step whose gradient overflowed is skipped and the scale halved
    optimizer.zero_grad()
    skipped = loss_scale(accelerator) < scale
    if skipped and loss_scale(accelerator) < 1:
        raise Collapse(f"the gradient's norm is {norm}, at a loss scale below 1 too; try base.precision=fp32")
    return means | {"grad_norm": 0.0 if skipped else norm, "steps": int(not skipped), "skipped": int(skipped)}


def mean_gradient(
    accelerator: Accelerator,
    module: nn.Module,
    rollout: Rollout,
    answers: list[int],
    losses_of: Losses,
    coef: float,
    micro_batch_tokens: int,
) -> dict[str, float]:
    """Adds the gradient of `optimizer_step`'s loss to the module's parameters; the means over the tokens."""
    prompts, responses = rollout.prompts, rollout.responses
    num_tokens = sum(len(responses[i]) for i in answers)
    parts = micro_batches_of_process(
        [len(prompts[i]) + len(responses[i]) for i in answers],
        micro_batch_tokens,
        accelerator.process_index,
        accelerator.num_processes,
    )
    sums: dict[str, Tensor] = {}
    for number, (part, weight) in enumerate(parts):
        rows = [answers[i] for i in part]
        texts = [prompts[i] for i in rows], [responses[i] for i in rows]
        batch = pack(*texts, shares_prefixes(accelerator.device)).to(accelerator.device)
        with nullcontext() if number == len(parts) - 1 else accelerator.no_sync(module):
            with accelerator.autocast():
                output = module(batch)
            losses, statistics = losses_of(output, rollout.tokens_of(rows))
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
