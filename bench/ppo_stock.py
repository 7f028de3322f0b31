"""One measured run of TRL 1.12.0's PPOTrainer in a process of its own; bench_ppo starts it.

In the environment of bench/requirements-trl112.txt, which lacks this project's packages: nothing of it but
bench/worker.py is imported here.
"""

import json
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    set_seed,
)
from trl.experimental import ppo
from trl.experimental.ppo import ppo_trainer

from bench.worker import PrecisionWatch, answer, now, peak_mb


class Clock(TrainerCallback):
    """When each update ended, and what the phases had taken by then."""

    def __init__(self, device: torch.device, phase_seconds: dict[str, float]):
        self.device, self.phase_seconds = device, phase_seconds
        self.marks: list[float] = []
        self.phases: list[dict[str, float]] = []

    def on_step_end(self, *args, **kwargs):
        self.marks.append(now(self.device))
        self.phases.append(dict(self.phase_seconds))


def time_phases(trainer: ppo.PPOTrainer, device: torch.device) -> dict[str, float]:
    """Puts clocks around what TRL's `train` calls; the dictionary returned fills as it runs."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(function, name_of):
        def call(*args, **kwargs):
            started = now(device)
            result = function(*args, **kwargs)
            seconds[name_of(*args)] += now(device) - started
            return result

        return call

    def forward_name(model, *_):
        return "reference" if model is trainer.ref_model else "update: forward"

    def reward_name(model, *_):
        return "score" if model is trainer.reward_model else "values"

    ppo_trainer.batch_generation = timed(ppo_trainer.batch_generation, lambda *_: "generation")
    ppo_trainer.forward = timed(ppo_trainer.forward, forward_name)
    ppo_trainer.get_reward = timed(ppo_trainer.get_reward, reward_name)
    trainer.accelerator.backward = timed(trainer.accelerator.backward, lambda *_: "update: backward")
    trainer.optimizer.step = timed(trainer.optimizer.step, lambda *_: "update: step")
    return seconds


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs `spec["updates"]` updates after one to warm up.

    Returns:
        seconds and phase_seconds of the updates after the first, first_update_seconds, episodes, kl, entropy and
        eos of every update, precision of each model, peak_memory_mb, versions.
    """
    root, device = Path(spec["root"]), torch.device(spec["device"])
    tokenizer = AutoTokenizer.from_pretrained(root / "models/base", padding_side="left")
    set_seed(spec["seed"])

    def load(auto_class: type, folder: str) -> PreTrainedModel:
        return auto_class.from_pretrained(root / "models" / folder, dtype=torch.float32)

    trainer = ppo.PPOTrainer(
        args=ppo.PPOConfig(
            output_dir=str(root / "out"),
            per_device_train_batch_size=spec["batch_size"],
            total_episodes=spec["batch_size"] * (spec["updates"] + 1),
            response_length=spec["response_length"],
            num_ppo_epochs=spec["num_ppo_epochs"],
            num_mini_batches=spec["num_mini_batches"],
            stop_token="eos",
            missing_eos_penalty=1.0,
            seed=spec["seed"],
            bf16=spec["bf16"],
            use_cpu=device.type == "cpu",
            num_sample_generations=0,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=tokenizer,
        model=load(AutoModelForCausalLM, "base"),
        ref_model=load(AutoModelForCausalLM, "base"),
        reward_model=load(AutoModelForSequenceClassification, "reward"),
        value_model=load(AutoModelForSequenceClassification, "reward"),
        train_dataset=Dataset.from_dict(json.loads((root / "prompts.json").read_text())),
    )
    models = {
        "policy": trainer.model.policy,
        "value": trainer.model.value_model,
        "reference": trainer.ref_model,
        "reward": trainer.reward_model,
    }
    watches = {name: PrecisionWatch() for name in models}
    for name, model in models.items():
        watches[name].on(getattr(model, model.base_model_prefix))
    clock = Clock(device, time_phases(trainer, device))
    trainer.add_callback(clock)
    started = time.perf_counter()
    trainer.train()
    first, last = clock.phases[0], clock.phases[-1]
    history = [row for row in trainer.state.log_history if "objective/kl" in row]
    return {
        "seconds": clock.marks[-1] - clock.marks[0],
        "first_update_seconds": clock.marks[0] - started,
        "episodes": spec["batch_size"] * spec["updates"],
        "phase_seconds": {name: last[name] - first.get(name, 0.0) for name in last},
        "kl": [row["objective/kl"] for row in history],
        "entropy": [row["objective/entropy"] for row in history],
        "eos": [row["val/num_eos_tokens"] for row in history],
        "precision": {name: watch.seen() for name, watch in watches.items()},
        "peak_memory_mb": peak_mb(device),
        "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
    }


if __name__ == "__main__":
    answer(measure)
