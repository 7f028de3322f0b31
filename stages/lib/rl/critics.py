"""What a state is worth: a linear read-out of the frozen side, or a value model of its own."""

from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel, get_scheduler

from stages.lib.model.attention import hidden_states, use_packed_attention
from stages.lib.model.loading import autocast
from stages.lib.model.memory import MemoryDial
from stages.lib.model.packing import PackedBatch, read_tokens
from stages.lib.model.reward import apply_head, backbone_of
from stages.lib.rl.losses import value_losses
from stages.lib.rl.rollout import Rollout
from stages.lib.rl.steps import optimizer_step

DECAY = 0.8  # weight of an update's returns in the fit one update later
RIDGE = 30.0  # on weights of features of length sqrt(H)


class Critic(Protocol):
    """Values of the states before each token, learned from the returns that followed."""

    def values(self, rollout: Rollout, features: Tensor) -> Tensor:
        """(N,) values for a share of a rollout with its (N, H) features."""
        ...

    def learn(
        self, rollout: Rollout, returns: Tensor, share: Rollout, features: Tensor, steps: list[list[int]]
    ) -> dict[str, float]:
        """Learns the (N,) returns of a whole rollout, of which `share` with its features is this process's.

        Args:
            steps: the answers of each mini-batch, in order.
        """
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FrozenCritic:
    """Ridge regression of returns on the frozen side's hidden states, which cost no pass of their own.

    The normal equations of earlier updates count DECAY as much with every update; until the first fit all values
    are 0. In float64: the equations of correlated features are badly conditioned.
    """

    def __init__(self, hidden_size: int, accelerator: Accelerator):
        self.accelerator = accelerator
        self.gram = torch.zeros(hidden_size + 1, hidden_size + 1, dtype=torch.float64)
        self.moment = torch.zeros(hidden_size + 1, dtype=torch.float64)

    def values(self, rollout: Rollout, features: Tensor) -> Tensor:
        penalty = RIDGE * torch.eye(len(self.gram), dtype=torch.float64)
        return (self._columns(features) @ torch.linalg.solve(self.gram + penalty, self.moment)).float()

    def learn(
        self, rollout: Rollout, returns: Tensor, share: Rollout, features: Tensor, steps: list[list[int]]
    ) -> dict[str, float]:
        columns = self._columns(features)
        own = returns[rollout.tokens_of(share.places)].double()
        for total, new in ((self.gram, columns.T @ columns), (self.moment, columns.T @ own)):
            if self.accelerator.num_processes > 1:
                new = cast(Tensor, self.accelerator.reduce(new.to(self.accelerator.device))).cpu()
            total.mul_(DECAY).add_(new)
        return {}

    def _columns(self, features: Tensor) -> Tensor:
        """(N, H + 1): features at one length, so that no state weighs more for its size, and a 1."""
        length = features.shape[1] ** 0.5
        scaled = features.double() * (length / features.double().norm(dim=1, keepdim=True).clamp(min=1e-6))
        return torch.cat([scaled, scaled.new_ones(len(scaled), 1)], dim=1)

    def state_dict(self) -> dict[str, Any]:
        return {"gram": self.gram, "moment": self.moment}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.gram.copy_(state["gram"])
        self.moment.copy_(state["moment"])


class ValueHead(nn.Module):
    """A sequence classification model as a function from packed sequences to (N,) values before each token.

    Normalised as the scores are, so that it starts as the reward model's own estimate.
    """

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model
        self.score_mean, self.score_std = 0.0, 1.0

    def forward(self, batch: PackedBatch) -> Tensor:
        hidden = hidden_states(backbone_of(self.model), batch)
        return (apply_head(self.model, hidden[batch.completion_index]) - self.score_mean) / self.score_std


class SeparateCritic:
    """A value model that starts as the reward model, with the clipped value loss and an optimizer of its own."""

    def __init__(
        self,
        model: PreTrainedModel,
        accelerator: Accelerator,
        precision: str,
        learning_rate: float,
        num_updates: int,
        vf_coef: float,
        cliprange_value: float,
        max_grad_norm: float,
        dial: MemoryDial,
    ):
        self.accelerator, self.precision = accelerator, precision
        self.vf_coef, self.cliprange_value = vf_coef, cliprange_value
        self.max_grad_norm, self.dial = max_grad_norm, dial
        self.head = ValueHead(model)
        optimizer = torch.optim.AdamW(self.head.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)
        self.wrapped, self.optimizer = accelerator.prepare(self.head, optimizer)
        self.scheduler = get_scheduler("linear", self.optimizer.optimizer, 0, num_updates)

    def normalise_by(self, score_mean: float, score_std: float) -> None:
        """The unit of the scores, in which the values are."""
        self.head.score_mean, self.head.score_std = score_mean, score_std

    def values(self, rollout: Rollout, features: Tensor) -> Tensor:
        texts, device = (rollout.prompts, rollout.responses), self.accelerator.device

        def read(_: list[int], batch: PackedBatch) -> tuple[Tensor]:
            return (self.head(batch),)

        with use_packed_attention(backbone_of(self.head.model)), autocast(device, self.precision):
            return self.dial.run(read_tokens, read, *texts, device=device)[0]

    def learn(
        self, rollout: Rollout, returns: Tensor, share: Rollout, features: Tensor, steps: list[list[int]]
    ) -> dict[str, float]:
        def losses_of(values: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            old, wanted = rollout.values[tokens].to(values.device), returns[tokens].to(values.device)
            losses, clipped = value_losses(values, old, wanted, self.cliprange_value)
            return losses, {"clipfrac": clipped.float()}

        taken = []
        with use_packed_attention(backbone_of(self.head.model)):
            for answers in steps:
                how = (losses_of, self.dial, self.max_grad_norm, self.vf_coef)
                step = optimizer_step(self.accelerator, self.wrapped, self.optimizer, rollout, answers, *how)
                taken.append((sum(len(rollout.responses[i]) for i in answers), step))
        self.scheduler.step()
        tokens = sum(count for count, _ in taken)
        return {
            "loss/value_avg": sum(count * step["loss"] for count, step in taken) / tokens,
            "val/clipfrac_avg": sum(count * step["clipfrac"] for count, step in taken) / tokens,
            "value/grad_norm": sum(step["grad_norm"] for _, step in taken) / len(taken),
        }

    def _parts(self) -> dict[str, Any]:
        return {"model": self.head.model, "optimizer": self.optimizer.optimizer, "scheduler": self.scheduler}

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
