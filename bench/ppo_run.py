"""One measured PPO run, ours or TRL's, in a process of its own; bench_ppo starts it."""

import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl.experimental import ppo as trl_ppo
from trl.experimental.ppo import ppo_trainer

from bench.measure import PrecisionWatch, answer, now, peak_mb
from stages.lib.model.loading import load_causal_lm, load_tokenizer, pick_device, set_seed
from stages.lib.model.reward import load_reward_model
from stages.lib.rl.ppo import PPOTrainer
from stages.lib.rl.ppo_config import PPOConfig
from stages.lib.run.artefacts import read_json


class Clock(TrainerCallback):
    """When each update ended, and what the phases had taken by then."""

    def __init__(self, device: torch.device, phase_seconds: dict[str, float]):
        self.device, self.phase_seconds = device, phase_seconds
        self.marks: list[float] = []
        self.phases: list[dict[str, float]] = []

    def on_step_end(self, *args, **kwargs):
        self.marks.append(now(self.device))
        self.phases.append(dict(self.phase_seconds))


def time_stock_phases(trainer: trl_ppo.PPOTrainer, device: torch.device) -> dict[str, float]:
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
        seconds and phase_seconds of the updates after the first, episodes, response_tokens (mean of all updates),
        precision of each model, peak_memory_mb.
    """
    root = Path(spec["root"])
    os.environ["DEVICE"] = spec["device"]
    ours = spec["side"] == "ours"
    # the allocator setting that our stages run under is part of ours, not of TRL's
    device = pick_device() if ours else torch.device(spec["device"])
    tokenizer = load_tokenizer(root / "models/base")
    tokenizer.padding_side = "left"
    set_seed(spec["seed"])
    config = {
        "output_dir": str(root / "out"),
        "per_device_train_batch_size": spec["batch_size"],
        "total_episodes": spec["batch_size"] * (spec["updates"] + 1),
        "response_length": spec["response_length"],
        "num_ppo_epochs": spec["num_ppo_epochs"],
        "num_mini_batches": 1,
        "stop_token": "eos",
        "missing_eos_penalty": 1.0,
        "seed": spec["seed"],
        "bf16": spec["bf16"],
        "use_cpu": device.type == "cpu",
        "num_sample_generations": 0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    if ours:
        config["micro_batch_tokens"] = spec["micro_batch_tokens"]
    trainer = (PPOTrainer if ours else trl_ppo.PPOTrainer)(
        args=(PPOConfig if ours else trl_ppo.PPOConfig)(**config),
        processing_class=tokenizer,
        model=load_causal_lm(root / "models/base"),
        ref_model=load_causal_lm(root / "models/base"),
        reward_model=load_reward_model(root / "models/reward"),
        value_model=load_reward_model(root / "models/reward"),
        train_dataset=Dataset.from_dict({"input_ids": read_json(root / "prompts.json")["prompts"]}),
    )
    watches = {name: PrecisionWatch() for name in ("policy", "value", "reference", "reward")}
    for name, model in zip(
        watches,
        (trainer.model.policy, trainer.model.value_model, trainer.ref_model, trainer.reward_model),
        strict=True,
    ):
        watches[name].on(getattr(model, model.base_model_prefix))
    if ours and trainer.sampler is not trainer.policy:
        watches["sampler"] = PrecisionWatch()
        watches["sampler"].on(trainer.sampler)
    clock = Clock(device, trainer.phase_seconds if ours else time_stock_phases(trainer, device))
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
    }


if __name__ == "__main__":
    answer(measure)
