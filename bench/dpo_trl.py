"""One measured run of TRL's DPOTrainer in a process of its own; bench_dpo starts it."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

from bench.worker import PrecisionWatch, answer, now, peak_mb
from stages.lib.run.artefacts import read_json

#: what each setting changes of DPOConfig's defaults
SETTINGS = {
    "trl_default": {},
    "trl_no_checkpointing": {"activation_checkpointing": False},
    "trl_precomputed": {"activation_checkpointing": False, "precompute_ref_log_probs": True},
    "trl_precomputed_checkpointing": {"precompute_ref_log_probs": True},
}


class TimedDPOTrainer(DPOTrainer):
    """DPOTrainer with a clock: the first batch warms up, the others count. Rows come in the given order."""

    def __init__(self, *args, device: torch.device, watch: PrecisionWatch, **kwargs):
        self.device, self.watch = device, watch
        self.reference_marks: list[float] = []
        self.tokens: list[int] = []
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)
        watch.on(self.model)
        if self.ref_model is not None:
            watch.on(self.ref_model)

    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)

    def compute_ref_log_probs(self, model, inputs):
        """Runs at construction, before training (trl 1.16)."""
        if not self.reference_marks:
            self.watch.on(model)
            self.reference_marks.append(now(self.device))
        logps = super().compute_ref_log_probs(model, inputs)
        self.reference_marks.append(now(self.device))
        return logps

    def training_step(self, model, inputs, *args, **kwargs):
        self.tokens.append(int(inputs["attention_mask"].sum()))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.losses.append(loss.item())
        return loss


class Clock(TrainerCallback):
    """When each optimizer step ended, and the peak memory at the end of training."""

    def __init__(self, device: torch.device):
        self.device = device
        self.marks: list[float] = []
        self.peak_mb = 0.0

    def on_step_end(self, *args, **kwargs):
        self.marks.append(now(self.device))

    def on_train_end(self, *args, **kwargs):
        self.marks.append(now(self.device))
        self.peak_mb = peak_mb(self.device)


def conversation(row: dict[str, str]) -> dict[str, list]:
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Trains over the pairs of `spec`'s root once, in their order.

    Returns:
        seconds: training without the first batch; reference_seconds: the precomputed reference without its
        first batch (None if the reference runs inside training); tokens: real ones put through training;
        losses; precision; peak_memory_mb.
    """
    root, device = Path(spec["root"]), torch.device(spec["device"])
    watch, clock = PrecisionWatch(), Clock(device)
    trainer = TimedDPOTrainer(
        model=str(root / "models/base"),
        args=DPOConfig(
            output_dir=str(root / "trl"),
            per_device_train_batch_size=spec["batch_size"],
            num_train_epochs=1,
            max_length=spec["max_length"],
            bf16=spec["precision"] == "bf16",
            fp16=spec["precision"] == "fp16",
            use_cpu=device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **SETTINGS[spec["setting"]],
        ),
        train_dataset=Dataset.from_list([conversation(row) for row in read_json(root / "pairs.json")["pairs"]]),
        processing_class=AutoTokenizer.from_pretrained(root / "models/base"),
        callbacks=[clock],
        device=device,
        watch=watch,
    )
    trainer.train()
    reference = trainer.reference_marks
    return {
        "seconds": clock.marks[-1] - clock.marks[0],
        "reference_seconds": reference[-1] - reference[1] if reference else None,
        "tokens": sum(trainer.tokens[1:]),
        "losses": trainer.losses,
        "precision": watch.seen(),
        "peak_memory_mb": clock.peak_mb,
    }


if __name__ == "__main__":
    answer(measure)
