"""Weights & Biases, where the environment asks for it: a matter of where a run is watched, not of what it is."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from stages.lib.run.errors import UserError
from stages.lib.run.params import Section


@contextmanager
def tracked(stage: str, params: Section) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yields a function that sends one history row to W&B, or does nothing unless $WANDB_PROJECT is set.

    Raises:
        UserError: $WANDB_PROJECT is set and wandb is not installed.
    """
    project = os.environ.get("WANDB_PROJECT")
    if not project or os.environ.get("RANK", "0") != "0":
        yield lambda row: None
        return
    try:
        import wandb  # pyright: ignore[reportMissingImports]: an extra
    except ImportError:
        raise UserError("WANDB_PROJECT is set but wandb is missing: pip install wandb, or unset it") from None
    with wandb.init(project=project, name=stage, config=params.model_dump()) as run:
        yield lambda row: run.log({k: v for k, v in row.items() if k != "step"}, step=int(row["step"]))
