"""What TRL's RewardTrainer needs to train as a stage does: one device, features for tokens, checkpoints when due.

Of TRL 1.16 and transformers 5.24, whose behaviour is named where it is relied on.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer

from stages.lib.run.checkpoints import Checkpoints

HISTORY = ["loss", "accuracy", "margin", "min_reward", "mean_reward", "max_reward"]  # TRL 1.16's own, whose
# accuracy counts a tie as wrong; metrics.json has half, as everywhere here (ranked_right)


class OneDevice(RewardConfig):
    """RewardConfig for one device, however many are visible.

    Without a launcher HF's Trainer wraps the model in DataParallel when it sees several GPUs, which multiplies
    the batch; RewardTrainer refuses to start then (TRL 1.16). Both ask `n_gpu`.
    """

    @property
    def n_gpu(self) -> int:
        return 1


class HeadOnFeatures(PreTrainedModel):
    """A reward model's head, given what its frozen backbone made of each sequence."""

    config_class = PreTrainedConfig

    def __init__(self, score: nn.Linear, tokenizer: PreTrainedTokenizerBase):
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        super().__init__(PreTrainedConfig(**ids))
        self.config.num_labels = 1
        self.score = score

    def forward(self, features: Tensor, **_) -> SequenceClassifierOutput:
        """(B, H) features to (B, 1) scores."""
        return SequenceClassifierOutput(logits=self.score(features))


def collate_features(rows: list[dict]) -> dict[str, Tensor]:
    """Chosen first, then rejected, as RewardTrainer splits them."""
    features = [row["chosen_features"] for row in rows] + [row["rejected_features"] for row in rows]
    tokens = [len(row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")]
    # RewardTrainer sums the attention mask to count tokens
    return {"features": torch.stack(features), "attention_mask": torch.tensor(tokens)}


class EndWhenAsked(TrainerCallback):
    """Asked to end, the trainer ends after the step."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints

    def on_step_end(self, args: RewardConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop |= self.checkpoints.asked_to_end and state.global_step < state.max_steps


class KeepAtRows(EndWhenAsked):
    """The trainer's own checkpoints, when one is due: at rows of the history, where no figure is half a mean.

    What came after the last row is done again.
    """

    def on_step_end(self, args: RewardConfig, state: TrainerState, control: TrainerControl, **how: Any) -> None:
        super().on_step_end(args, state, control, **how)
        asked = self.checkpoints.asked_to_end and state.global_step < state.max_steps
        control.should_save = control.should_log and (asked or self.checkpoints.due())

    def on_save(self, args: RewardConfig, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.checkpoints.saved()


def run_trainer(
    trainer: RewardTrainer, num_steps: int, checkpoints: Checkpoints, **kept: Tensor
) -> tuple[list[dict[str, float]], int]:
    """Trains for `num_steps`.

    Args:
        checkpoints: of the stage. A trainer that keeps its own in its `output_dir`, by `KeepAtRows`, goes on from them.
        kept: what the stage's own holds where the trainer keeps none.

    Returns:
        The history, a row per logged step; and the number of optimizer steps that the trainer made.

    Raises:
        AssertionError: it made another number of steps.
        Stopped: a signal asked for the end.
    """
    trainer.remove_callback(PrinterCallback)  # history.csv has it
    folder = Path(str(trainer.args.output_dir))
    last = last_whole(folder)
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.state.global_step < num_steps and checkpoints.asked_to_end:
        if kept:
            checkpoints.save_if_due(**kept)  # and raises Stopped
        checkpoints.stop(saved=last_whole(folder) is not None)
    assert trainer.state.global_step == num_steps, f"{trainer.state.global_step} steps instead of {num_steps}"
    return history_of(trainer.state.log_history), trainer.state.global_step


def last_whole(folder: Path) -> Path | None:
    """The newest of the trainer's checkpoints that it finished: trainer_state.json is what it writes last."""
    whole = [state.parent for state in folder.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.partition("-")[2]), default=None)


def history_of(log: list[dict[str, float]]) -> list[dict[str, float]]:
    """One row per logged step out of the trainer's separate training and evaluation entries."""
    heldout = {entry["step"]: entry for entry in log if "eval_loss" in entry}
    history = []
    for entry in log:
        if "loss" in entry:
            row = {name: entry[name] for name in ("step", "epoch", *HISTORY, "grad_norm", "learning_rate")}
            row |= {f"eval_{name}": heldout[entry["step"]][f"eval_{name}"] for name in HISTORY}
            history.append(row)
    return history
