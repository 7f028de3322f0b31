"""A model in training: optimizer steps in micro-batches, over any number of processes, with fp16's loss scale."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.lib.model.adapters import TrainedWeights
from stages.lib.model.loading import loss_scale, return_freed_memory
from stages.lib.model.memory import MemoryDial
from stages.lib.model.packing import micro_batches_of_process, pack, shares_prefixes
from stages.lib.rl.schedule import learning_rate_schedule

#: (indices of some items, the module's output for them) to (n,) losses and (n,) statistics by name
Losses = Callable[[list[int], Any], tuple[Tensor, dict[str, Tensor]]]


class NotFinite(ArithmeticError):
    """The gradient is not finite, and no loss scale makes it so. Nothing has been changed."""

    def __init__(self, norm: float, scaled: bool):
        where = ", at a loss scale below 1 too; try base.precision=fp32" if scaled else ""
        super().__init__(f"the gradient's norm is {norm}{where}")
        self.norm = norm


class Learner:
    """A module whose trainable parameters AdamW moves, at a learning rate that follows a schedule."""

    def __init__(
        self,
        module: nn.Module,
        accelerator: Accelerator,
        dial: MemoryDial,
        learning_rate: float,
        schedule: tuple[str, int, int],
        max_grad_norm: float | None,
        weight_decay: float = 0.0,
        beta1: float = 0.9,
        return_freed: bool = False,
    ):
        """
        Args:
            module: takes packed batches to what the losses are made of; its transformer is `module.model`.
            dial: tokens of a micro-batch.
            learning_rate: peak.
            schedule: its name, steps of warm-up and steps in all.
            max_grad_norm: clipping; None or 0: none.
            weight_decay: decoupled.
            beta1: of AdamW, the memory of its mean gradient.
            return_freed: on a CPU, after every pass, before fragments add up: less memory, at some cost in time.
        """
        self.model = cast(PreTrainedModel, module.model)
        self.accelerator, self.dial, self.max_grad_norm = accelerator, dial, max_grad_norm or math.inf
        dial.tokens = min(gather_object([dial.tokens]))  # all processes plan the same passes
        trained = [weight for weight in module.parameters() if weight.requires_grad]
        self.return_freed = return_freed
        optimizer = torch.optim.AdamW(
            trained, lr=learning_rate, betas=(beta1, 0.999), weight_decay=weight_decay, fused=True
        )
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        name, warmup, steps = schedule
        self.scheduler = learning_rate_schedule(name, self.optimizer.optimizer, warmup, steps)

    def outputs(
        self,
        prompts: list[list[list[int]]],
        completions: list[list[list[int]]],
        lengths: list[int],
        micro_batch_tokens: int,
    ) -> Iterator[tuple[list[int], float, Any]]:
        """This process's share of N items, a micro-batch at a time.

        In training the caller goes backward from an output before it asks for the next: all but the last backward
        pass leave the processes' gradients apart.

        Args:
            prompts, completions: K columns of N lists of token ids each: the K texts of an item.
            lengths: tokens that each item puts through the module.

        Yields:
            Indices of some items, their weight (1.0; or 0.0, where they only keep step with other processes), and the
            module's output for their texts, column after column.
        """
        accelerator = self.accelerator
        of_process = accelerator.process_index, accelerator.num_processes
        parts = micro_batches_of_process(lengths, micro_batch_tokens, *of_process)
        for number, (part, weight) in enumerate(parts):
            asked, said = ([column[i] for column in columns for i in part] for columns in (prompts, completions))
            batch = pack(asked, said, shares_prefixes(accelerator.device)).to(accelerator.device)
            alone = number == len(parts) - 1 or not torch.is_grad_enabled()
            with nullcontext() if alone else accelerator.no_sync(self.module):
                with accelerator.autocast():  # sharded by FSDP2, accelerate 1.15 leaves the module without it
                    output = self.module(batch)
                yield part, weight, output
            del output
            if self.return_freed:
                return_freed_memory(accelerator.device)

    def mean_gradient(
        self,
        prompts: list[list[list[int]]],
        completions: list[list[list[int]]],
        lengths: list[int],
        losses_of: Losses,
        count: int,
        micro_batch_tokens: int,
    ) -> dict[str, float]:
        """Adds the gradient of a mean loss over N items to the parameters', unless gradients are switched off.

        It is the same whatever the micro-batches and the number of processes.

        Args:
            prompts, completions, lengths: as of `outputs`.
            losses_of: (indices of some items, the module's output for them) to (n,) losses and (n,) statistics by
                name, an entry for each pair or token that the mean is over.
            count: of these entries, over all items.

        Returns:
            Means over all entries of `loss` and of every statistic, the same in all processes.
        """
        accelerator = self.accelerator
        names: list[str] = []
        found: list[tuple[float, Tensor]] = []  # weight and (K, n) of each micro-batch, on the device
        for part, weight, output in self.outputs(prompts, completions, lengths, micro_batch_tokens):
            losses, statistics = losses_of(part, output)
            if torch.is_grad_enabled():
                # data-parallel wrappers average over processes; the loss is a mean over the whole batch
                accelerator.backward(losses.sum() * (weight * accelerator.num_processes / count))
            names = ["loss", *statistics]
            found.append((weight, torch.stack([losses.detach(), *statistics.values()])))
        # copied once a batch, and summed on the CPU: MPS has no float64
        host = torch.cat([values for _, values in found], dim=1).cpu().double()
        split = host.split([values.shape[1] for _, values in found], dim=1)
        sums = torch.zeros(len(names), dtype=torch.float64)
        for (weight, _), values in zip(found, split, strict=True):
            sums += weight * torch.stack([row.sum() for row in values])
        if accelerator.num_processes > 1:
            sums = cast(Tensor, accelerator.reduce(sums.to(accelerator.device)))
        return dict(zip(names, (sums / count).tolist(), strict=True))

    def step(self) -> tuple[float, bool]:
        """Clips the gradient, steps on it and lets it go.

        Returns:
            The gradient's norm before clipping; and whether fp16's scaler left the step out, since the gradient
            overflowed, and halved its scale.

        Raises:
            NotFinite
        """
        accelerator = self.accelerator
        norm = float(cast(Tensor, accelerator.clip_grad_norm_(self.module.parameters(), self.max_grad_norm)))
        if accelerator.scaler is None and not math.isfinite(norm):
            self.optimizer.zero_grad()
            raise NotFinite(norm, scaled=False)
        scale = loss_scale(accelerator)
        self.optimizer.step()
        self.optimizer.zero_grad()
        skipped = loss_scale(accelerator) < scale
        if skipped and loss_scale(accelerator) < 1:
            raise NotFinite(norm, scaled=True)
        return norm, skipped

    def next_learning_rate(self) -> float:
        """Ends the schedule's step: the learning rate that it had; the next one has the schedule's next."""
        learning_rate = float(self.scheduler.get_last_lr()[0])
        self.scheduler.step()
        return learning_rate

    def _parts(self) -> dict[str, Any]:
        weights = TrainedWeights(self.model)
        return {"model": weights, "optimizer": self.optimizer.optimizer, "scheduler": self.scheduler}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
