"""fp16 with its loss scale on a CPU, which accelerate has on accelerators only."""

import torch
from accelerate import Accelerator

from stages.lib.model import loading


def make_accelerator(device: torch.device, precision: str) -> Accelerator:
    """As `loading.make_accelerator` gives it for fp16 on a CUDA card."""
    assert precision == "fp16"
    accelerator = Accelerator(cpu=True)
    accelerator.state._mixed_precision, accelerator.native_amp = precision, True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=loading.INITIAL_LOSS_SCALE)
    return accelerator
