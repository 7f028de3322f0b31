"""Answers of the policy in training, and what the policy makes of them.

Under a launcher each process answers and reads its share of the prompts; `gathered` then gives all of them the
whole rollout in its one order, so that rewards and advantages are computed everywhere and differ nowhere.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from stages.lib.model.generate import generate, in_precision
from stages.lib.model.loading import freeze, return_freed_memory
from stages.lib.model.logps import TokenLogps, read_answers
from stages.lib.model.memory import MemoryDial
from stages.lib.run.errors import UserError


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
        return_freed: bool = False,
    ):
        """
        Args:
            policy: not wrapped for training; its weights are the optimizer's.
            response_length: tokens of an answer, at most.
            dial: tokens of a forward pass.
            return_freed: on a CPU, before and after each phase, for every one wants memory in blocks of other sizes:
                less memory, at some cost in time.
        """
        self.policy, self.tokenizer, self.accelerator = policy, tokenizer, accelerator
        self.precision = precision
        self.response_length, self.dial = response_length, dial
        self.return_freed = return_freed
        self.sampler = policy.model  # decoding is bound by reading weights: a copy in the lower precision
        if precision != "fp32":
            self.sampler = freeze(in_precision(policy.model, precision))

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], seed: int) -> tuple[list[int], list[list[int]]]:
        """This process's share of the prompts, by place, and one response to each; EOS included, never empty.

        The random numbers belong to the prompt's place, so that the answers do not depend on who samples them.

        Raises:
            UserError: there are fewer prompts than processes.
        """
        if len(prompts) < self.accelerator.num_processes:
            raise UserError(
                f"{self.accelerator.num_processes} processes and {len(prompts)} prompts to answer: LAUNCH fewer, or "
                "raise look_prompts, batch_size or score_norm_episodes, whichever asked for so few"
            )
        if self.sampler is not self.policy.model:
            for copied, trained in zip(self.sampler.parameters(), self.policy.model.parameters(), strict=True):
                if copied is not trained:
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
        self._let_go()
        places, responses = self.sample(prompts, seed)
        own = [prompts[i] for i in places]
        self._let_go()
        logps, entropies = self.dial.run(read_answers, self.policy, own, responses, precision=self.precision)
        eos = self.tokenizer.eos_token_id
        ended = torch.tensor([response[-1] == eos for response in responses])
        nothing = torch.empty(0)
        self._let_go()
        return Rollout(places, own, responses, ended, logps, entropies, nothing, nothing, nothing)

    def _let_go(self) -> None:
        if self.return_freed:
            return_freed_memory(self.accelerator.device)
