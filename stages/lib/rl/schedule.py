"""How the learning rate goes, in DPO by optimizer steps and in PPO by updates."""

from typing import cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import get_scheduler


def learning_rate_schedule(name: str, optimizer: Optimizer, warmup_steps: int, num_steps: int) -> LambdaLR:
    """Constant, linear (to 0) or cosine (to 0) after a linear warm-up from 0."""
    name = "constant_with_warmup" if name == "constant" else name
    return cast(LambdaLR, get_scheduler(name, optimizer, warmup_steps, num_steps))
