"""One measured run of this project's train_ppo in a process of its own; bench_ppo starts it.

The stage's own `main` runs, on a temporary root. What it calls is wrapped only to read the clock and the dtypes.
"""

import csv
import os
import time
from pathlib import Path
from typing import Any

from torch import nn

from bench.worker import PrecisionWatch, answer, now, peak_mb
from stages import train_ppo
from stages.lib.model.loading import pick_device
from stages.lib.model.reward import backbone_of
from stages.lib.run.params import Base

#: PPOConfig's values of TRL 1.12.0, and none of what it lacks
LIKE_STOCK = {
    "policy": "base",
    "answers_per_prompt": 1,
    "learning_rate": 3e-6,
    "schedule": "linear",
    "warmup_updates": 0,
    "adam_beta1": 0.9,
    "temperature": 0.7,
    "kl_coef": 0.05,
    "kl_target": None,
    "kl_estimator": "k1",
    "target_kl": None,
    "missing_eos_penalty": 1.0,
    "score_norm_episodes": 0,
    "advantages": "gae",
    "value_warmup_updates": 0,
    "value_learning_rate": 3e-6,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "whiten_advantages": True,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "max_grad_norm": 0.0,
    "max_kl": 1e9,
    "min_entropy": 0.0,
}


def params_of(spec: dict[str, Any]) -> train_ppo.Params:
    """The settings of `spec["train_ppo"]`, or stock's with its `critic`; batches, lengths and passes are the spec's."""
    settings = spec.get("train_ppo") or LIKE_STOCK | {"critic": spec["critic"]}
    measured = {
        name: spec[name] for name in ("batch_size", "num_ppo_epochs", "num_mini_batches", "response_length")
    }
    measured |= {"episodes": spec["batch_size"] * (spec["updates"] + 1)}
    measured |= {"micro_batch_tokens": spec["micro_batch_tokens"]}
    # looks before the first update and after the last: outside of what is measured
    return train_ppo.Params(**settings | measured | {"look_prompts": 1, "look_every": 0})


def watch_models() -> dict[str, PrecisionWatch]:
    """Watches the models that the stage will load, in the order in which it loads them, and the sampler's copy."""
    watches = {name: PrecisionWatch() for name in ("policy", "reference", "reward", "value", "sampler")}

    def watched(load: Any, names: list[str]) -> Any:
        def call(*args: Any) -> nn.Module:
            model = load(*args)
            watches[names.pop(0)].on(backbone_of(model))
            return model

        return call

    train_ppo.loading.load_causal_lm = watched(train_ppo.loading.load_causal_lm, ["policy", "reference"])
    train_ppo.load_reward_model = watched(train_ppo.load_reward_model, ["reward", "value"])

    class WatchedActor(train_ppo.Actor):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **kwargs)
            if self.sampler is not self.policy.model:
                watches["sampler"].on(backbone_of(self.sampler))

    train_ppo.Actor = WatchedActor
    return watches


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs `spec["updates"]` updates after one to warm up.

    Returns:
        As bench/ppo_stock.py's; `precision` of the models that were run: the reward model shares the
        reference's pass where they share their backbone, and there is a value model with critic 'separate' alone.
    """
    os.environ |= {"DEVICE": spec["device"], "CHECKPOINT_MINUTES": "600"}
    root, device = Path(spec["root"]), pick_device()
    phases: list[train_ppo.Phases] = []
    marks: list[float] = []
    phases_at: list[dict[str, float]] = []
    peak = 0.0

    class SeenPhases(train_ppo.Phases):
        def __init__(self, *args: Any):
            super().__init__(*args)
            phases.append(self)

    check_health = train_ppo.check_health

    def end_of_update(*args: Any) -> None:
        nonlocal peak
        check_health(*args)
        marks.append(now(device))
        phases_at.append(dict(phases[0].seconds))
        peak = peak_mb(device)

    train_ppo.Phases, train_ppo.check_health = SeenPhases, end_of_update
    watches = watch_models()
    started = time.perf_counter()
    train_ppo.main(Base(seed=spec["seed"], precision="bf16" if spec["bf16"] else "fp32"), params_of(spec), root)
    with open(root / "reports/train_ppo/history.csv") as file:
        history = list(csv.DictReader(file))
    first, last = phases_at[0], phases_at[-1]
    return {
        "seconds": marks[-1] - marks[0],
        "first_update_seconds": marks[0] - started,  # loading included
        "episodes": spec["batch_size"] * spec["updates"],
        "phase_seconds": {name: last[name] - first.get(name, 0.0) for name in last},
        "kl": [float(row["objective/kl"]) for row in history],
        "entropy": [float(row["objective/entropy"]) for row in history],
        "eos": [int(row["val/num_eos_tokens"]) for row in history],
        "precision": {name: seen for name, watch in watches.items() if (seen := watch.seen())},
        "peak_memory_mb": peak,
        "whole_peak_memory_mb": peak_mb(device),
    }


if __name__ == "__main__":
    answer(measure)
