"""README.md quotes the committed reports, and only what they say; where it does not, a test shows the right line.

After a run: commit the reports, run this file, and put the lines it asks for into the README.
"""

import json
import re
import subprocess

import pytest
from ruamel.yaml import YAML

from tests.conftest import REPO
from tests.test_pipeline import IN_ORDER

README = (REPO / "README.md").read_text(encoding="utf-8")
LINES = README.splitlines()


def committed(path: str) -> dict | list | None:
    """A JSON file of the newest commit (a run of one's own may have rewritten it); None if it is not there."""
    command = ["git", "show", f"HEAD:{path}"]
    shown = subprocess.run(command, cwd=REPO, capture_output=True, text=True)
    return json.loads(shown.stdout) if shown.returncode == 0 else None


def metrics(stage: str) -> dict:
    return committed(f"reports/{stage}/metrics.json")


def row_of(label: str) -> str:
    """The one table row whose first cell is `label`."""
    rows = [line for line in LINES if line.startswith(f"| {label} |")]
    assert len(rows) == 1, f"README.md: {len(rows)} rows begin with '| {label} |'"
    return rows[0]


def interval(values: dict, key: str, sign: bool = False, digits: int = 2) -> str:
    """'0.97 [0.85, 0.99]'"""
    mean, low, high = (
        f"{values[name]:{'+' if sign else ''}.{digits}f}" for name in (key, f"{key}_low", f"{key}_high")
    )
    return f"{mean} [{low}, {high}]"


def test_pairs_ranked_right_are_those_of_the_committed_run():
    analysis = metrics("analyze_logps")
    rankers = analysis["rankers"]
    best = max((key for key in rankers if f"{key}_low" in rankers), key=rankers.get)
    for label, values, key in (
        ("DPO: pairs its implicit reward ranks right", analysis["dpo"], "rewards/accuracies"),
        ("reward model: pairs its score ranks right", analysis["reward_model"], "accuracy"),
        (f"counting {best.replace('_', ' ')}, nothing trained: pairs ranked right", rankers, best),
    ):
        assert row_of(label) == f"| {label} | {interval(values, key)} |"


def test_ppos_gain_is_that_of_the_committed_run():
    ppo = metrics("train_ppo")
    label = f"PPO: change of the mean score on {ppo['heldout_prompts']} prompts"
    assert row_of(label) == f"| {label} | {interval(ppo, 'score_gain', sign=True)} |"


def test_the_number_of_pairs_is_that_of_the_committed_run():
    counts = metrics("fetch_pairs")
    expected = f"({counts['train_pairs']} training pairs, {counts['heldout_pairs']} held out)"
    assert re.findall(r"\(\d+ training pairs, \d+ held out\)", README) == [expected]


def test_the_answers_are_those_of_the_committed_run():
    samples = committed("reports/sample_responses/samples.json")
    (sample,) = [sample for sample in samples if f"| {sample['prompt']} |" in README]
    for model, label in (("base", "**base**"), ("dpo", "**DPO**"), ("ppo", "**PPO**")):
        shown = row_of(label).removeprefix(f"| {label} | ").removesuffix(" |")
        answer = " ".join(sample["answers"][model]["greedy"].split())
        start = answer[: len(shown.removesuffix(" …"))]
        assert shown == (answer if start == answer else f"{start} …")


def test_the_answer_quotes_the_committed_run():
    answer = README[README.index("Do the trained models find their training data more likely?") :].split("\n\n")[0]
    quoted = re.findall(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]", " ".join(answer.split()))
    analysis = metrics("analyze_logps")
    estimates = [(model, key) for model in ("dpo", "ppo") for key in ("change_train_chosen", "did")]
    assert quoted == [interval(analysis[model], key, sign=True, digits=3) for model, key in estimates]
    for model in ("dpo", "ppo"):
        assert (analysis[model]["did_low"] <= 0 <= analysis[model]["did_high"]) == (
            "no difference found" in answer
        )


@pytest.mark.parametrize("stage", IN_ORDER)
def test_time_and_memory_are_those_of_the_committed_run(stage):
    run = committed(f"reports/{stage}/run.json")
    expected = "| – | – |"  # a stage that no committed run has
    if run:
        seconds = f"{run['seconds']:.0f} s" if run["seconds"] >= 1 else "< 1 s"
        expected = f"| {seconds} | {run['peak_memory_mb'] / 1000:.1f} GB |"
    row = row_of(f"`{stage}`")
    assert "| " + row.split(" | ", 3)[3] == expected, row


def test_the_total_time_is_that_of_the_committed_run():
    runs = [committed(f"reports/{stage}/run.json") for stage in IN_ORDER]
    total = sum(run["seconds"] for run in runs if run)
    assert re.findall(r"(\d+) minutes in all", README) == [f"{total / 60:.0f}"]


@pytest.mark.parametrize("name", ["dpo", "ppo"])
def test_speed_is_that_of_the_committed_benchmark(name):
    result = committed(f"bench/results/{name}_cpu.json")
    expected = f"| {name.upper()} | {result['speedup']:.1f} x | {100 * result['memory_ratio']:.0f} % |"
    assert expected in LINES, f"README.md, Speed: expected the row {expected}"
    assert result["date"] in README and result["machine"].split(",")[0] in README


def test_every_stage_recipe_and_file_it_names_is_there():
    stages = YAML(typ="safe").load((REPO / "dvc.yaml").read_text())["stages"]
    named = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert [name for name in named if name in stages] == list(stages)
    for file in ("README.md", "CONTRIBUTING.md", "recipes/README.md"):
        text = (REPO / file).read_text(encoding="utf-8")
        paths = re.findall(r"`((?:stages|recipes|bench|data|reports|tests)/[\w./-]+\.\w+)`", text)
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
        missing = [path for path in paths if not (REPO / path).exists()]
        missing += [path for path in pictures if not ((REPO / file).parent / path).exists()]
        assert not missing, f"{file} names {missing}"
    assert len(re.findall(r"!\[", README)) >= 2


def test_it_is_short():
    assert len(LINES) <= 160  # what is for later readers goes to CONTRIBUTING.md or recipes/README.md
