"""What a state is worth: a linear read-out of the frozen side, or a value model of its own."""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from stages.lib.model.attention import hidden_states, use_packed_attention
from stages.lib.model.loading import autocast
from stages.lib.model.packing import PackedBatch, read_tokens, rows_at
from stages.lib.model.reward import apply_head, backbone_of
from stages.lib.rl.learner import Learner
from stages.lib.rl.losses import value_losses
from stages.lib.rl.mini_batch import step_on
from stages.lib.rl.rollout import Rollout
from stages.lib.run.checkpoints import Stateful

DECAY = 0.8  # weight of an update's returns in the fit one update later
RIDGE = 30.0  # on weights of features of length sqrt(H)


class Critic(Stateful, Protocol):
    """Values of the states before each token, learned from the returns that followed.

    `share` is this process's share of a rollout, and `features` are its (N, H) of `FrozenSide.opinions`.
    """

    def values(self, share: Rollout, features: Tensor) -> Tensor:
        """(N,) of the share's tokens."""
        ...

    def learn(
        self, rollout: Rollout, returns: Tensor, share: Rollout, features: Tensor, mini_batches: list[list[int]]
    ) -> dict[str, float]:
        """Learns the (N,) returns of a whole rollout; what happened, under TRL's names."""
        ...


class FrozenCritic(nn.Module):
    """Ridge regression of returns on the frozen side's hidden states, which cost no pass of their own.

    The normal equations of earlier updates count DECAY as much with every update; until the first fit all values
    are 0. In float64: the equations of correlated features are badly conditioned.
    """

    def __init__(self, hidden_size: int, accelerator: Accelerator):
        super().__init__()
        self.accelerator = accelerator
        size = hidden_size + 1
        self.gram = nn.Buffer(torch.zeros(size, size, dtype=torch.float64))
        self.moment = nn.Buffer(torch.zeros(size, dtype=torch.float64))

    def values(self, share: Rollout, features: Tensor) -> Tensor:
        penalty = RIDGE * torch.eye(len(self.gram), dtype=torch.float64)
        return (self._columns(features) @ torch.linalg.solve(self.gram + penalty, self.moment)).float()

    def learn(
        self, rollout: Rollout, returns: Tensor, share: Rollout, features: Tensor, mini_batches: list[list[int]]
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
        return (apply_head(self.model, rows_at(hidden, batch.completion_index)) - self.score_mean) / self.score_std


@dataclass
class SeparateCritic:
    """A value model that starts as the reward model, with the clipped value loss and an optimizer of its own."""

    head: ValueHead
    learner: Learner  # of the head
    coef: float  # of the loss; AdamW does not see it, clipping does
    precision: str
    cliprange: float  # of a value, around what it was in the rollout

    def normalise_by(self, score_mean: float, score_std: float) -> None:
        """The unit of the scores, in which the values are."""
        self.head.score_mean, self.head.score_std = score_mean, score_std

    def values(self, share: Rollout, features: Tensor) -> Tensor:
        texts, device = (share.prompts, share.responses), self.learner.accelerator.device
        with use_packed_attention(self.head.model), autocast(device, self.precision):
            return self.learner.dial.run(read_tokens, lambda _, batch: (self.head(batch),), *texts, device=device)[
                0
            ]

    def learn(
        self, rollout: Rollout, returns: Tensor, share: Rollout, features: Tensor, mini_batches: list[list[int]]
    ) -> dict[str, float]:
        def losses_of(values: Tensor, tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            old, wanted = rollout.values[tokens].to(values.device), returns[tokens].to(values.device)
            losses, clipped = value_losses(values, old, wanted, self.cliprange)
            return self.coef * losses, {"value_loss": losses.detach(), "clipfrac": clipped.float()}

        steps = [step_on(self.learner, rollout, answers, losses_of) for answers in mini_batches]
        self.learner.next_learning_rate()
        names = {"value_loss": "loss/value_avg", "clipfrac": "val/clipfrac_avg", "grad_norm": "value/grad_norm"}
        return {name: sum(step[of] for step in steps) / len(steps) for of, name in names.items()}

    def state_dict(self) -> dict[str, Any]:
        return self.learner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.learner.load_state_dict(state)
