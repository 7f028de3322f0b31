"""What never changes while PPO trains: the reference and the reward model."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.lib.model.attention import hidden_states, use_packed_attention
from stages.lib.model.loading import DTYPES, autocast, cast_linear_layers, freeze, own_memory
from stages.lib.model.logps import TokenLogps
from stages.lib.model.memory import MemoryDial
from stages.lib.model.packing import PackedBatch, read_tokens
from stages.lib.model.reward import apply_head, backbone_of, closed, same_weights
from stages.lib.rl.rollout import Rollout


class FrozenSide:
    """Reads answers: in one forward pass where the reward model's backbone is the reference's, bit for bit.

    The backbone is then let go.
    """

    def __init__(
        self,
        reference: PreTrainedModel,
        reward_model: PreTrainedModel,
        temperature: float,
        tokenizer: PreTrainedTokenizerBase,
        precision: str,
        dial: MemoryDial,
    ):
        self.reference, self.reward_model = freeze(reference), freeze(reward_model)
        self.tokenizer, self.precision, self.dial = tokenizer, precision, dial
        self.logps = TokenLogps(reference, temperature)
        backbone = reference.get_decoder()
        self.shares_backbone = same_weights(backbone, backbone_of(reward_model))
        if self.shares_backbone:
            setattr(reward_model, reward_model.base_model_prefix, backbone)
        if precision != "fp32":
            for model in (reference, reward_model):
                cast_linear_layers(model, DTYPES[precision], but=("score",))
        own_memory(reference)
        own_memory(reward_model.get_submodule("score") if self.shares_backbone else reward_model)

    @torch.no_grad()
    def judge(self, rollout: Rollout) -> tuple[Rollout, Tensor]:
        """The rollout with reference log-probs and raw scores.

        Returns:
            The rollout, and (N, H) float32 features: the reference's hidden state before each response token.
        """
        prompts, responses, count = rollout.prompts, rollout.responses, len(rollout.responses)
        closed_responses = [closed(response, self.tokenizer) for response in responses]
        scores = torch.empty(count)

        def read(rows: list[int], batch: PackedBatch) -> tuple[Tensor, Tensor]:
            """Of the first `count` texts the reference's log-probs; of the closed ones after them the score."""
            hidden = hidden_states(self.reference.get_decoder(), batch)
            said = torch.tensor([row < count for row in rows], device=hidden.device)
            last = hidden[batch.last_index[~said]]
            scores[[row - count for row in rows if row >= count]] = apply_head(self.reward_model, last).cpu()
            own = said[batch.label_sequence]
            before = hidden[batch.completion_index]
            ref_logps = before.new_zeros(len(before), dtype=torch.float32)
            ref_logps[own] = self.logps.of_hidden(before[own], batch.labels[own])[0]
            return ref_logps, before.float()

        def read_closed(rows: list[int], batch: PackedBatch) -> tuple[()]:
            hidden = hidden_states(backbone_of(self.reward_model), batch)
            scores[rows] = apply_head(self.reward_model, hidden[batch.last_index]).cpu()
            return ()

        if self.shares_backbone:  # 2B texts, of which most are equal or begin alike: packed once
            ref_logps, features = self._pass(read, self.reference, prompts * 2, responses + closed_responses)
        else:
            ref_logps, features = self._pass(read, self.reference, prompts, responses)
            self._pass(read_closed, self.reward_model, prompts, closed_responses)
        own = slice(0, int(rollout.lengths.sum()))
        return replace(rollout, ref_logps=ref_logps[own], raw_scores=scores), features[own]

    def _pass(self, read: Callable, model: PreTrainedModel, prompts: list, responses: list) -> list[Tensor]:
        with use_packed_attention(model), autocast(model.device, self.precision):
            return self.dial.run(read_tokens, read, prompts, responses, device=model.device)
