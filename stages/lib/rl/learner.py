"""Optimizer steps on answers of a rollout, in micro-batches and over any number of processes."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.lib.model.attention import use_packed_attention
from stages.lib.model.loading import loss_scale
from stages.lib.model.memory import MemoryDial
from stages.lib.model.packing import micro_batches_of_process, pack, shares_prefixes
from stages.lib.rl.rollout import Rollout
from stages.lib.rl.schedule import learning_rate_schedule

#: (module's output, indices of its tokens in the rollout) to (n,) losses and (n,) statistics by name
Losses = Callable[[Any, Tensor], tuple[Tensor, dict[str, Tensor]]]


class Collapse(RuntimeError):
    """The policy is lost: its KL, its entropy or a number that is not finite says so."""


class Learner:
    """A policy or a value model in training, with its optimizer and the schedule of its learning rate."""

    def __init__(
        self,
        module: nn.Module,
        accelerator: Accelerator,
        dial: MemoryDial,
        learning_rate: float,
        schedule: tuple[str, int, int],
        max_grad_norm: float,
        coef: float = 1.0,
    ):
        """
        Args:
            module: takes packed batches to what the losses are made of; its transformer is `module.model`.
            dial: tokens of a micro-batch.
            learning_rate: peak.
            schedule: its name, updates of warm-up and updates in all.
            max_grad_norm: clipping; 0: none.
            coef: weight of the loss.
        """
        self.model = cast(PreTrainedModel, module.model)
        self.accelerator, self.dial = accelerator, dial
        self.max_grad_norm, self.coef = max_grad_norm or math.inf, coef
        optimizer = torch.optim.AdamW(module.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
        self.wrapped, self.optimizer = accelerator.prepare(module, optimizer)
        name, warmup, updates = schedule
        self.scheduler = learning_rate_schedule(name, self.optimizer.optimizer, warmup, updates)

    def step(
        self,
        rollout: Rollout,
        answers: list[int],
        losses_of: Losses,
        forbidden: Callable[[dict[str, float]], bool] = lambda means: False,
    ) -> dict[str, float]:
        """One step on the mean loss over all tokens of `answers`, whatever the micro-batches and processes.

        Args:
            forbidden: whether these means forbid the step; the gradient is then thrown away.

        Returns:
            Means over the tokens of the loss and of every statistic (the maximum where its name ends in "max"), the
            same in all processes; `grad_norm` before clipping (0 where fp16's scaler skipped the step), and `steps`
            and `skipped`, 0 or 1.

        Raises:
            Collapse: the gradient is not finite, and no scale of fp16's makes it so. Nothing has been changed then.
        """
        accelerator, optimizer = self.accelerator, self.optimizer
        with use_packed_attention(self.model):
            means = self.dial.run(self._mean_gradient, rollout, answers, losses_of, undo=optimizer.zero_grad)
        if forbidden(means):
            optimizer.zero_grad()
            return means | {"grad_norm": 0.0, "steps": 0, "skipped": 0}
        norm = float(cast(Tensor, accelerator.clip_grad_norm_(self.wrapped.parameters(), self.max_grad_norm)))
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

    def _mean_gradient(
        self, rollout: Rollout, answers: list[int], losses_of: Losses, micro_batch_tokens: int
    ) -> dict[str, float]:
        prompts, responses, accelerator = rollout.prompts, rollout.responses, self.accelerator
        lengths = [len(prompts[i]) + len(responses[i]) for i in answers]
        num_tokens = sum(len(responses[i]) for i in answers)
        of_process = accelerator.process_index, accelerator.num_processes
        parts = micro_batches_of_process(lengths, micro_batch_tokens, *of_process)
        sums: dict[str, Tensor] = {}
        for number, (part, weight) in enumerate(parts):
            rows = [answers[i] for i in part]
            texts = [prompts[i] for i in rows], [responses[i] for i in rows]
            batch = pack(*texts, shares_prefixes(accelerator.device)).to(accelerator.device)
            with nullcontext() if number == len(parts) - 1 else accelerator.no_sync(self.wrapped):
                with accelerator.autocast():
                    output = self.wrapped(batch)
                losses, statistics = losses_of(output, rollout.tokens_of(rows))
                # data-parallel wrappers average over processes; the loss is a mean over the whole mini-batch
                accelerator.backward(losses.sum() * (self.coef * weight * accelerator.num_processes / num_tokens))
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

    def end_update(self) -> float:
        """The learning rate of the update that ends here; the next one has the schedule's next."""
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        return learning_rate

    def _parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer.optimizer, "scheduler": self.scheduler}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
