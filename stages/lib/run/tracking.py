"""Following a run elsewhere, where the environment asks for it: a matter of where it is watched, not of what it is.

TRACK=wandb, trackio, tensorboard, ... (several with commas) are Accelerate's trackers, each the package of its name.
Unset, nothing is imported. Accelerate would leave out an unknown or missing one without a word; here it is an error.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from stages.lib.run.errors import UserError
from stages.lib.run.params import Section

FOLDER = Path("runs")  # for trackers that write files; Git ignores it


@contextmanager
def tracked(stage: str, params: Section) -> Iterator[Callable[[dict[str, float]], None]]:
    """Yields a function that sends one history row, with its `step`, to the trackers in $TRACK.

    The trackers' project is the stage, so that its runs lie side by side; the parameters are a run's configuration.
    Only the main process sends.

    Raises:
        UserError: a tracker is unknown or not installed.
    """
    names = [name.strip() for name in os.environ.get("TRACK", "").split(",") if name.strip()]
    if not names or os.environ.get("RANK", "0") != "0":
        yield lambda row: None
        return
    with ExitStack() as finally_finished:
        trackers = []
        for name in dict.fromkeys(names):
            tracker = _new_tracker(name, stage)
            tracker.start()
            finally_finished.callback(tracker.finish)
            tracker.store_init_configuration({key: _plain(value) for key, value in params.model_dump().items()})
            trackers.append(tracker)

        def log(row: dict[str, float]) -> None:
            for tracker in trackers:
                tracker.log({key: value for key, value in row.items() if key != "step"}, step=int(row["step"]))

        yield log


def _new_tracker(name: str, stage: str) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    from accelerate.utils import LoggerType

    if name not in LOGGER_TYPE_TO_CLASS:
        raise UserError(f"TRACK={name}: unknown; Accelerate knows {', '.join(LOGGER_TYPE_TO_CLASS)}")
    if name in LoggerType.list() and name not in map(str, get_available_trackers()):
        raise UserError(f"TRACK={name}: not installed; pip install {name.replace('_', '-')}, or unset TRACK")
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    return tracker_class(stage, FOLDER) if tracker_class.requires_logging_directory else tracker_class(stage)


def _plain(value: Any) -> bool | int | float | str:
    """TensorBoard takes no null and no nested value among its hyperparameters."""
    return value if isinstance(value, bool | int | float | str) else str(value)
