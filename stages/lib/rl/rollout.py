"""Answers of the policy in training, what the policy makes of them, and what the frozen side makes of them.

Under a launcher each process answers and reads its share of the prompts; `gathered` then gives all of them the
whole rollout in its one order, so that rewards and advantages are computed everywhere and differ nowhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.lib.model.attention import hidden_states, use_packed_attention
from stages.lib.model.generate import generate, in_precision
from stages.lib.model.loading import DTYPES, autocast, cast_linear_layers, freeze, own_memory
from stages.lib.model.logps import TokenLogps, read_answers
from stages.lib.model.memory import MemoryDial
from stages.lib.model.packing import PackedBatch, read_tokens
from stages.lib.model.reward import apply_head, backbone_of, closed, same_weights


@dataclass(frozen=True)
class Rollout:
    """B answered prompts: plain data on the CPU, without a graph. Per-token tensors are (N,), answer after answer.

    places:     of its answers in the whole rollout
    lengths:    (B,) tokens of each response, the EOS included
    ended:      (B,) whether the response ends in EOS
    logps:      (N,) of the response tokens under the policy that sampled them, at the sampling temperature
    entropies:  (N,) of that policy's distribution before each of them, nats
    ref_logps:  (N,) under the reference, at the same temperature
    raw_scores: (B,) the reward model's
    values:     (N,) the critic's, of the state before each token; empty without a critic
    """

    places: list[int]
    prompts: list[list[int]]
    responses: list[list[int]]
    ended: Tensor
    logps: Tensor
    entropies: Tensor
    ref_logps: Tensor
    raw_scores: Tensor
    values: Tensor

    @property
    def lengths(self) -> Tensor:
        return torch.tensor([len(response) for response in self.responses])

    def tokens_of(self, answers: list[int]) -> Tensor:
        """Indices into the per-token tensors of the tokens of `answers`, one answer after another."""
        ends = self.lengths.cumsum(0).tolist()
        return torch.cat([torch.arange(ends[i] - len(self.responses[i]), ends[i]) for i in answers])

    def gathered(self, accelerator: Accelerator) -> "Rollout":
        """The whole rollout, of every process's share; in one process itself."""
        if accelerator.num_processes == 1:
            return self
        shares: list[Rollout] = gather_object([self])
        columns: dict[str, Any] = {}
        for each in fields(Rollout):
            parts = [getattr(share, each.name) for share in shares]
            columns[each.name] = sum(parts, []) if isinstance(parts[0], list) else torch.cat(parts)
        joined = Rollout(**columns)
        order = sorted(range(len(joined.places)), key=joined.places.__getitem__)
        tokens = joined.tokens_of(order)
        for name, values in columns.items():
            if isinstance(values, list):
                columns[name] = [values[i] for i in order]
            elif len(values):
                columns[name] = values[tokens if len(values) == len(tokens) else order]
        return Rollout(**columns)


class Actor:
    """The policy in training: it answers prompts and reads its answers."""

    def __init__(
        self,
        policy: TokenLogps,
        tokenizer: PreTrainedTokenizerBase,
        accelerator: Accelerator,
        precision: str,
        response_length: int,
        dial: MemoryDial,
    ):
        """
        Args:
            policy: not wrapped for training; its weights are the optimizer's.
            response_length: tokens of an answer, at most.
            dial: tokens of a forward pass.
        """
        self.policy, self.tokenizer, self.accelerator = policy, tokenizer, accelerator
        self.precision = precision
        self.response_length, self.dial = response_length, dial
        self.sampler = policy.model  # decoding is bound by reading weights: a copy in the lower precision
        if precision != "fp32":
            self.sampler = freeze(in_precision(policy.model, precision))

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], seed: int) -> tuple[list[int], list[list[int]]]:
        """This process's share of the prompts, by place, and one response to each; EOS included, never empty.

        The random numbers belong to the prompt's place, so that the answers do not depend on who samples them.
        """
        if self.sampler is not self.policy.model:
            for copied, trained in zip(self.sampler.parameters(), self.policy.model.parameters(), strict=True):
                copied.copy_(trained)
        places = list(range(self.accelerator.process_index, len(prompts), self.accelerator.num_processes))
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(len(prompts), self.response_length, generator=generator)
        responses = generate(
            self.sampler,
            self.tokenizer,
            [prompts[i] for i in places],
            self.response_length,
            self.accelerator.device,
            self.precision,
            temperature=self.policy.temperature,
            uniforms=uniforms[places],
            batch_size=64,
        )
        return places, responses

    def roll_out(self, prompts: list[list[int]], seed: int) -> Rollout:
        """The policy answers the prompts and reads its answers once; what the frozen side adds is still empty."""
        places, responses = self.sample(prompts, seed)
        own = [prompts[i] for i in places]
        logps, entropies = self.dial.run(read_answers, self.policy, own, responses, precision=self.precision)
        eos = self.tokenizer.eos_token_id
        ended = torch.tensor([response[-1] == eos for response in responses])
        nothing = torch.empty(0)
        return Rollout(places, own, responses, ended, logps, entropies, nothing, nothing, nothing)


class FrozenSide:
    """Reference and reward model, which never change: one forward pass where they share their backbone.

    Where the reward model's backbone has the reference's weights bit for bit, it is let go.
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
        self.temperature, self.tokenizer = temperature, tokenizer
        self.precision, self.dial = precision, dial
        self.policy_like = TokenLogps(reference, temperature)
        backbone = reference.get_decoder()
        self.shares_backbone = same_weights(backbone, backbone_of(reward_model))
        if self.shares_backbone:
            setattr(reward_model, reward_model.base_model_prefix, backbone)
        if precision != "fp32":
            for model in (reference, reward_model):
                cast_linear_layers(model, DTYPES[precision], but=("score",))
        own_memory(reference)
        own_memory(reward_model.score if self.shares_backbone else reward_model)

    @torch.no_grad()
    def judge(self, rollout: Rollout) -> tuple[Rollout, Tensor]:
        """The rollout with reference log-probs and raw scores.

        Returns:
            The rollout, and (N, H) float32 features: the reference's hidden state before each response token.
        """
        responses, scores = rollout.responses, torch.empty(len(rollout.responses))
        closed_responses = [closed(response, self.tokenizer) for response in responses]
        if self.shares_backbone:  # 2B texts, of which most are equal or begin alike: packed once
            texts = rollout.prompts * 2, responses + closed_responses
        else:
            texts = rollout.prompts, responses

        def score(rows: list[int], last: Tensor) -> None:
            scores[rows] = apply_head(self.reward_model, last).cpu()

        def read(rows: list[int], batch: PackedBatch) -> tuple[Tensor, Tensor]:
            hidden = hidden_states(self.reference.get_decoder(), batch)
            said = torch.tensor([row < len(responses) for row in rows], device=hidden.device)
            if self.shares_backbone:
                score(
                    [row - len(responses) for row in rows if row >= len(responses)],
                    hidden[batch.last_index[~said]],
                )
            own = said[batch.label_sequence]
            before = hidden[batch.completion_index]
            ref_logps = before.new_zeros(len(before), dtype=torch.float32)
            ref_logps[own] = self.policy_like.of_hidden(before[own], batch.labels[own])[0]
            return ref_logps, before.float()

        def read_closed(rows: list[int], batch: PackedBatch) -> tuple[()]:
            score(rows, hidden_states(backbone_of(self.reward_model), batch)[batch.last_index])
            return ()

        ref_logps, features = self._pass(read, self.reference, *texts)
        if not self.shares_backbone:
            self._pass(read_closed, self.reward_model, rollout.prompts, closed_responses)
        own = slice(0, int(rollout.lengths.sum()))
        return replace(rollout, ref_logps=ref_logps[own], raw_scores=scores), features[own]

    def _pass(self, read: Callable, model: PreTrainedModel, prompts: list, responses: list) -> list[Tensor]:
        with use_packed_attention(model), autocast(model.device, self.precision):
            return self.dial.run(read_tokens, read, prompts, responses, device=model.device)
