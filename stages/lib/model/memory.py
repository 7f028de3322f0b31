"""How many tokens a forward pass may have: what the device's memory allows, and half as many when it ran out.

The number changes no result but rounding, so `auto` may differ from machine to machine.
"""

import gc
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from stages.lib.run.errors import is_out_of_memory
from stages.lib.run.params import MicroBatchTokens

T = TypeVar("T")

FEWEST = 256  # tokens: with less, a text has a pass of its own already
WITHOUT_GRADIENT = 4096  # tokens, at least, of passes that keep nothing
MOST = 2**17  # tokens: with more, nothing is faster
SHARE = 0.7  # of the free memory: the rest is for slices of logits, key-value caches and fragments
# float32 numbers that a token keeps in each layer until the backward pass, per feature of hidden state and MLP: 4 in
# SmolLM2-135M (30 layers of 576 + 1,536 features, bf16 autocast, lean layers), where a token takes 1.0 MB; layers of
# other architectures keep half as much again
KEPT_IN_TRAINING = 6.0
HELD_WITHOUT_GRADIENT = 12.0  # the same without a backward pass, of one layer


class MemoryDial:
    """Tokens per pass, for as long as they fit."""

    def __init__(self, tokens: int, stage: str = "", device: torch.device | None = None):
        self.tokens, self.stage, self.device = tokens, stage, device

    def run(self, work: Callable[..., T], *args: Any, undo: Callable[[], None] | None = None, **how: Any) -> T:
        """`work(*args, micro_batch_tokens=..., **how)`; after memory ran out again, with half as many.

        Every later call begins with what fitted. Not where several processes work together: the others would wait
        for one that began again.

        Args:
            undo: takes back what `work` has left undone.

        Raises:
            Exception: whatever `work` raises, if it is not that, or if fewer tokens would not help any more.
        """
        alone = os.environ.get("WORLD_SIZE", "1") == "1"
        result, self.tokens = with_what_fits(
            lambda tokens: work(*args, micro_batch_tokens=tokens, **how),
            self.tokens,
            FEWEST if alone else self.tokens,
            f"{self.stage}: memory ran out: goes on with micro-batches of {{}} tokens",
            self.device,
            undo,
        )
        return result


def with_what_fits(
    work: Callable[[int], T],
    size: int,
    fewest: int,
    message: str,
    device: torch.device | None,
    undo: Callable[[], None] | None = None,
) -> tuple[T, int]:
    """`work(size)`, and the size that fitted: after memory ran out again, with half of it.

    Args:
        fewest: with so much the error stays.
        message: printed, with the new size in place of {}.
        undo: takes back what `work` has left undone.
    """
    while True:
        try:
            return work(size), size
        except Exception as error:
            if not (is_out_of_memory(error) and size > fewest):
                raise
        # here, where the error and the tensors of its frames are gone
        size = max(fewest, size // 2)
        print(message.format(size))
        if undo:
            undo()
        let_go(device)


def let_go(device: torch.device | None) -> None:
    """Gives back what no tensor holds any more: after memory ran out, and its error is gone."""
    gc.collect()
    if device is not None and device.type == "cuda":
        torch.cuda.empty_cache()


def memory_dial(
    asked: MicroBatchTokens,
    on_cpu: int,
    model: PreTrainedModel,
    stage: str,
    training: bool = False,
    parts: int = 1,
) -> MemoryDial:
    """The dial as the parameters ask for it; `auto` is what fits, and on a CPU what was measured to be fastest there.

    Args:
        on_cpu: tokens.
        model: on its device, where all that stays is already, but gradients and optimizer state if `training`.
        parts: of these two, one of which the device holds.
    """
    device = model.device
    if asked == "auto":
        free = free_memory(device)
        asked = on_cpu if free is None else tokens_that_fit(free, model, training, parts)
    return MemoryDial(asked, stage, device)


def reading_dial(asked: MicroBatchTokens) -> MicroBatchTokens:
    """The dial of passes without gradient in a stage whose parameters speak of those with one."""
    return asked if asked == "auto" else max(asked, WITHOUT_GRADIENT)


def tokens_that_fit(free: float, model: PreTrainedModel, training: bool, parts: int = 1) -> int:
    """Tokens that a pass through `model` may have with so many bytes free."""
    config = model.config.get_text_config()
    features = config.hidden_size + (getattr(config, "intermediate_size", None) or 4 * config.hidden_size)
    per_token = 4 * features * HELD_WITHOUT_GRADIENT
    if training:
        per_token += 4 * features * KEPT_IN_TRAINING * config.num_hidden_layers
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        free -= 12 * trained / parts  # gradients, two moments
    return int(min(MOST, max(FEWEST, SHARE * free / per_token)))


def free_memory(device: torch.device) -> int | None:
    """Bytes that tensors could have on `device`; None on a CPU, where what is fastest is less than what fits."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None
