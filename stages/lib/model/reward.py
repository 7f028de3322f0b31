"""The reward model: one linear head on a backbone, read at each sequence's last token.

A conversation is scored where its final <|im_end|> stands, in training, in PPO and in analysis alike, by the
one function here. The head is applied in fp32: a bf16 score near 4 has steps of 0.03.
"""

import re
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.reward_trainer import suppress_seqcls_warning

from stages.lib.model.attention import hidden_states, use_packed_attention
from stages.lib.model.loading import autocast, disable_dropout_in_model, on_device
from stages.lib.model.packing import packed_groups
from stages.lib.run.errors import UserError

SENTENCE_END = re.compile(r"[.!?…。！？।؟][\"'”’)\]]*\s*$")


def new_reward_model(folder: Path, pad_token_id: int) -> PreTrainedModel:
    """The causal model in `folder` with a fresh head in place of its output layer, fp32, on the CPU.

    The head's weights are drawn here: seed first.
    """
    with suppress_seqcls_warning():  # the head is missing from the checkpoint, and should be
        model = AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=1, dtype=torch.float32, local_files_only=True
        )
    model.config.pad_token_id = pad_token_id
    disable_dropout_in_model(model)
    return model.eval()


class Fp32Linear(nn.Linear):
    """A linear layer that computes in fp32 whatever autocast says."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return super().forward(input.float())


def with_fp32_head(model: PreTrainedModel) -> PreTrainedModel:
    """The reward model, whose own forward pass now computes scores as `apply_head` does; in place."""
    head_of(model).__class__ = Fp32Linear
    return model


def closed(response: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A response as the reward model reads it, with an EOS at its end.

    One that the token limit cut is read up to its last whole sentence. The head knows whole answers and spoilt ones
    alone: read as it broke off, it would be a spoilt one, and PPO would learn to end after a sentence rather than to
    end. What not ending costs is `missing_eos_penalty`. (arXiv:1909.08593, section 2.1, cuts at a full stop alike.)

    Args:
        response: token ids, at least one.
    """
    eos = cast(int, tokenizer.eos_token_id)
    if response[-1] == eos:
        return response
    texts = [*tokenizer.batch_decode([[token] for token in response]), " "]
    for length in range(len(response), 0, -1):
        if SENTENCE_END.search(texts[length - 1]) and texts[length][:1].isspace():
            return [*response[:length], eos]
    return [*response, eos]


def load_reward_model(folder: Path, device: torch.device | None = None) -> PreTrainedModel:
    """The trained reward model in `folder`: fp32, eval mode, no dropout, on `device` or the CPU.

    Raises:
        UserError: the checkpoint lacks a weight, so that transformers would draw a random head without a word.
    """
    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, dtype=torch.float32, local_files_only=True, output_loading_info=True
    )
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{folder}: {', '.join(missing)} is missing from the checkpoint; run train_reward again")
    disable_dropout_in_model(model)
    return on_device(model, device).eval()


def backbone_of(model: PreTrainedModel) -> PreTrainedModel:
    """The transformer below the head of a sequence classification model."""
    return getattr(model, model.base_model_prefix)


def head_of(model: PreTrainedModel) -> nn.Linear:
    """What makes a sequence classification model's score of a hidden state."""
    return cast(nn.Linear, model.score)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are of one type and hold the same parameters, bit for bit."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return (
        type(one) is type(other)
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours)
    )


def apply_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """(N, H) hidden states to (N,) scores or values, in fp32 whatever autocast says."""
    with torch.autocast(hidden.device.type, enabled=False):
        return head_of(model)(hidden.float()).squeeze(-1)


@torch.no_grad()
def pooled_features(
    model: PreTrainedModel,
    sequences: list[list[int]],
    micro_batch_tokens: int,
    precision: str,
    progress: str | None = None,
) -> Tensor:
    """What the reward head reads: the backbone's hidden state at each sequence's last token.

    Args:
        model: a sequence classification model, on the device where the work shall happen.
        sequences: N lists of token ids, at least two each.
        micro_batch_tokens: memory dial; changes the result by rounding only.
        precision: 'bf16', 'fp16' or 'fp32'.
        progress: a label for a progress bar over tokens, or None for none.

    Returns:
        (N, H) float32 on the CPU, in the order given.
    """
    backbone = backbone_of(model)
    features = torch.empty(len(sequences), model.config.hidden_size)
    texts = [ids[:-1] for ids in sequences], [ids[-1:] for ids in sequences]
    bar = tqdm(
        total=sum(map(len, sequences)), desc=progress, unit="tok", unit_scale=True, disable=progress is None
    )
    with use_packed_attention(backbone), autocast(model.device, precision), bar:
        for group, batch in packed_groups(*texts, micro_batch_tokens, model.device, bar):
            features[group] = hidden_states(backbone, batch)[batch.last_index].float().cpu()
    return features


@torch.no_grad()
def score_sequences(
    model: PreTrainedModel,
    sequences: list[list[int]],
    micro_batch_tokens: int,
    precision: str,
    progress: str | None = None,
) -> list[float]:
    """The reward model's score of each whole conversation (prompt and completion), read at its last token."""
    features = pooled_features(model, sequences, micro_batch_tokens, precision, progress)
    return apply_head(model, features.to(model.device)).tolist()
