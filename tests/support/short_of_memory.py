"""A device on which only so many texts have room at once."""

import torch

from stages.lib.model import memory, packing


def install(monkeypatch, most: int = 2, module=packing) -> None:
    """`module.pack`, through which every micro-batch goes, raises as a card does where it holds more texts."""
    pack = module.pack

    def packed(prompts, completions, *args):
        if len(completions) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return pack(prompts, completions, *args)

    monkeypatch.setattr(module, "pack", packed)
    monkeypatch.setattr(memory, "FEWEST", 1)
