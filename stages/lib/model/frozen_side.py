"""What frozen models say of answers: a base its log-probs and hidden states, a reward model its scores."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.lib.model.adapters import REWARD, adapters_off, put_beside
from stages.lib.model.answer_means import hidden_after, mean_of_completions, until_end
from stages.lib.model.attention import hidden_states, use_packed_attention
from stages.lib.model.loading import DTYPES, autocast, cast_linear_layers, freeze, own_memory
from stages.lib.model.logps import TokenLogps
from stages.lib.model.memory import MemoryDial, let_go
from stages.lib.model.packing import packed_groups
from stages.lib.model.reward import apply_head, backbone_of, closed, same_weights, score_sequences


@dataclass(frozen=True)
class Opinions:
    """What is said of B answers, float32 on the CPU. Per-token tensors are (N,), answer after answer.

    logps:     (N,) of the answers that were to be read, under the base at its temperature, nats
    entropies: (N,) of its distributions before their tokens, nats
    features:  (N, H) its hidden states before their tokens; (0,) where they were not asked for
    scores:    (B,) of the reward model
    means:     (B, H) of a layer over each answer's own tokens; (0, H) where none was asked for
    """

    logps: Tensor
    entropies: Tensor
    features: Tensor
    scores: Tensor
    means: Tensor


class FrozenSide:
    """A base and a reward model that never change: one forward pass where the backbones are equal, bit for bit.

    The reward model's is then let go; it is too where adapters make it of the base's, which are on for the score
    alone. Adapters that the base is given afterwards are off here.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        reward_model: PreTrainedModel,
        temperature: float,
        tokenizer: PreTrainedTokenizerBase,
        precision: str,
        dial: Callable[[PreTrainedModel], MemoryDial],
        adapter: Path | None = None,
    ):
        """
        Args:
            base, reward_model: on the device where the work shall happen; frozen here.
            temperature: of the log-probs and entropies.
            dial: tokens of a forward pass through a model, asked for when all that stays is in its place.
            adapter: the folder of what the reward model has beside a base, if it has.
        """
        self.base, self.reward_model = freeze(base), freeze(reward_model)
        self.tokenizer, self.precision = tokenizer, precision
        self.logps = TokenLogps(base, temperature)
        backbones = base.get_decoder(), backbone_of(reward_model)
        self.one_pass = same_weights(*backbones)
        self.shares_backbone = self.one_pass or (adapter is not None and put_beside(*backbones, adapter))
        if self.shares_backbone:
            setattr(reward_model, reward_model.base_model_prefix, base.get_decoder())
        if precision != "fp32":
            for model in (base, reward_model):
                cast_linear_layers(model, DTYPES[precision], but=("score",))
        own_memory(base)
        own_memory(reward_model.get_submodule("score") if self.shares_backbone else reward_model)
        let_go(base.device)
        self.dial = dial(base)

    def opinions(
        self,
        prompts: list[list[int]],
        responses: list[list[int]],
        read: list[bool] | None = None,
        layer: int | None = None,
        with_features: bool = False,
        progress: str | None = None,
    ) -> Opinions:
        """What is said of B answers; the reward model reads them `closed`, the means are of what comes before the EOS.

        Args:
            prompts, responses: B lists of token ids each.
            read: whose log-probs are wanted; None: everyone's.
            layer: of the base, whose means are wanted.
            progress: a label for a progress bar over tokens, or None for none.
        """
        wanted = [i for i in range(len(responses)) if read is None or read[i]]
        how = {"layer": layer, "with_features": with_features, "progress": progress}
        return self.dial.run(self._opinions, prompts, responses, wanted, **how)

    @torch.no_grad()
    def _opinions(
        self,
        prompts: list[list[int]],
        responses: list[list[int]],
        wanted: list[int],
        layer: int | None,
        with_features: bool,
        progress: str | None,
        micro_batch_tokens: int,
    ) -> Opinions:
        base, count = self.base, len(responses)
        ends = [closed(response, self.tokenizer) for response in responses]
        # texts of three kinds, of which most are equal or begin alike: packed once
        kinds = [
            [(i, until_end(responses[i], base.config.eos_token_id)) for i in range(count if layer else 0)],
            [(i, responses[i]) for i in wanted],
            [(i, ends[i]) for i in range(count if self.one_pass else 0)],
        ]
        kind_of = torch.tensor([kind for kind, texts in enumerate(kinds) for _ in texts])
        owner_of = torch.tensor([i for texts in kinds for i, _ in texts])
        asked, said = [prompts[i] for i in owner_of.tolist()], [text for texts in kinds for _, text in texts]
        means, scores = torch.empty(len(kinds[0]), base.config.hidden_size), torch.empty(count)
        of_tokens: dict[int, tuple[Tensor, ...]] = {}  # of an answer: logps, entropies and, if asked for, features
        tokens = sum(map(len, asked)) + sum(map(len, said))
        bar = tqdm(total=tokens, desc=progress, unit="tok", unit_scale=True, disable=progress is None)
        with adapters_off(base), use_packed_attention(base), autocast(base.device, self.precision), bar:
            for rows, batch in packed_groups(asked, said, micro_batch_tokens, base.device, bar):
                to_mean, to_read, to_score = (kind_of[rows] == kind for kind in range(3))
                owners = owner_of[rows]
                if layer:
                    middle, last = hidden_after(base.get_decoder(), batch, [layer], to_end=True)
                    means[owners[to_mean]] = mean_of_completions(middle, batch).cpu()[to_mean]
                else:
                    last = hidden_states(base.get_decoder(), batch)
                own = to_read.to(base.device)[batch.label_sequence]
                before = last[batch.completion_index[own]]
                columns = [*self.logps.of_hidden(before, batch.labels[own])]
                columns += [before.float()] if with_features else []
                lengths = [len(said[row]) for row in torch.tensor(rows)[to_read].tolist()]
                parts = [column.cpu().split(lengths) for column in columns]
                of_tokens |= dict(zip(owners[to_read].tolist(), zip(*parts, strict=True), strict=True))
                last = last[batch.last_index[to_score.to(base.device)]]
                scores[owners[to_score]] = apply_head(self.reward_model, last).cpu()
        if not self.one_pass:
            whole = [prompt + end for prompt, end in zip(prompts, ends, strict=True)]
            how = micro_batch_tokens, self.precision, progress
            with adapters_off(base, but=REWARD):
                scores = torch.tensor(score_sequences(self.reward_model, whole, *how))
        columns = [torch.cat(parts) for parts in zip(*(of_tokens[i] for i in wanted), strict=True)]
        logps, entropies, features = [*columns, *[torch.empty(0)] * 3][:3]
        return Opinions(logps, entropies, features, scores, means)
