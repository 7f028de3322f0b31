"""README.md quotes the committed reports, and only what they say."""

import json
import re
import subprocess

import pytest
from ruamel.yaml import YAML

from tests.conftest import REPO
from tests.test_pipeline import IN_ORDER

README = (REPO / "README.md").read_text(encoding="utf-8")
LINES = README.splitlines()


def committed(path: str) -> dict:
    """A JSON file of the newest commit: a run of one's own may have rewritten it in the working tree."""
    command = ["git", "show", f"HEAD:{path}"]
    return json.loads(subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout)


def metrics(stage: str) -> dict:
    return committed(f"reports/{stage}/metrics.json")


def line_with(start: str) -> str:
    (line,) = [line for line in LINES if line.startswith(start)]
    return line


def interval(values: dict, key: str, sign: bool = False, digits: int = 2) -> str:
    """'0.97 [0.85, 0.99]'"""
    mean, low, high = (
        f"{values[name]:{'+' if sign else ''}.{digits}f}" for name in (key, f"{key}_low", f"{key}_high")
    )
    return f"{mean} [{low}, {high}]"


def test_the_expected_numbers_are_those_of_the_committed_run():
    analysis, ppo = metrics("analyze_logps"), metrics("train_ppo")
    best = max(
        (key for key in analysis["rankers"] if f"{key}_low" in analysis["rankers"]), key=analysis["rankers"].get
    )
    assert interval(analysis["dpo"], "rewards/accuracies") in line_with(
        "| DPO: pairs its implicit reward ranks right"
    )
    assert interval(analysis["reward_model"], "accuracy") in line_with(
        "| reward model: pairs its score ranks right"
    )
    assert interval(analysis["rankers"], best) in line_with(
        f"| counting {best.replace('_', ' ')}, nothing trained"
    )
    assert interval(ppo, "score_gain", sign=True) in line_with("| PPO: change of the mean score")
    assert f"on {ppo['heldout_prompts']} prompts" in line_with("| PPO: change of the mean score")
    counts = metrics("fetch_pairs")
    assert f"({counts['train_pairs']} training pairs, {counts['heldout_pairs']} held out" in README


def test_the_answer_quotes_the_committed_run():
    answer = README[README.index("Do the trained models find their training data more likely?") :].split("\n\n")[0]
    answer = " ".join(answer.split())
    analysis = metrics("analyze_logps")
    for model in ("dpo", "ppo"):
        for key in ("change_train_chosen", "did"):
            assert interval(analysis[model], key, sign=True, digits=3) in answer, (model, key)
        assert (analysis[model]["did_low"] <= 0 <= analysis[model]["did_high"]) == (
            "no difference found" in answer
        )


def test_ppos_figures_are_those_of_the_committed_run():
    ppo = metrics("train_ppo")
    for key in ("eos_rate", "question_rate", "exclamation_rate", "emoji_rate", "distinct_2"):
        row = line_with(f"| {key.replace('_', ' ')} ")
        assert f"| {ppo['before'][key]:.2f} | {ppo['after'][key]:.2f} |" in row
    assert f"| {ppo['before']['response_length']:.0f} | {ppo['after']['response_length']:.0f} |" in README
    assert f"KL {ppo['kl']:.2f} nats" in README


@pytest.mark.parametrize("stage", IN_ORDER)
def test_time_and_memory_are_those_of_the_committed_run(stage):
    run = committed(f"reports/{stage}/run.json")
    seconds = f"{run['seconds']:.0f} s" if run["seconds"] >= 1 else "< 1 s"
    assert line_with(f"| `{stage}`").endswith(f"| {seconds} | {run['peak_memory_mb'] / 1000:.1f} GB |")


def test_the_total_time_is_that_of_the_committed_run():
    total = sum(committed(f"reports/{stage}/run.json")["seconds"] for stage in IN_ORDER)
    assert f"{total / 60:.0f} minutes in all" in README


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_speed_is_that_of_the_committed_benchmark(name):
    result = committed(f"bench/results/{name}_cpu.json")
    row = line_with(f"| {name.upper()} |")
    assert f"| {result['speedup']:.1f} x | {100 * result['memory_ratio']:.0f} % |" in row
    assert result["date"] in README and result["machine"].split(",")[0] in README


def test_every_stage_recipe_and_file_it_names_is_there():
    stages = YAML(typ="safe").load((REPO / "dvc.yaml").read_text())["stages"]
    assert re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)[: len(stages)] == list(stages)
    named = re.findall(r"`((?:stages|recipes|bench|data|reports)/[\w./-]+\.\w+)`", README)
    assert named and all((REPO / name).exists() for name in named), named
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", README)
    assert len(pictures) >= 2 and all((REPO / name).exists() for name in pictures)
