"""README.md quotes the committed reports, and only what they say.

After a run: `python -m tests.support.readme_blocks` rewrites what stands between the README's comments; commit it
with the reports, run this file, and put the few lines it asks for into the README.
"""

import json
import re
import subprocess

import pytest
from ruamel.yaml import YAML

from tests.conftest import REPO
from tests.support.example_reports import write_example_reports
from tests.support.readme_blocks import blocks, scorecard, with_blocks

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


def test_what_it_quotes_is_of_the_committed_run():
    def read(path: str) -> str | None:
        shown = subprocess.run(["git", "show", f"HEAD:{path}"], cwd=REPO, capture_output=True, text=True)
        return shown.stdout if shown.returncode == 0 else None

    expected = with_blocks(README, blocks(read))
    assert README.splitlines() == expected.splitlines(), "run: python -m tests.support.readme_blocks"


def test_no_accuracy_stands_before_the_verdict():
    assert "accuracy" not in README[: README.index("<!-- scorecard -->")]
    assert README.index("<!-- verdicts -->") < README.index("<!-- scorecard -->")


def test_what_it_says_is_not_reached_is_not():
    card = metrics("score_responses")
    assert "**Not reached**: as many answers that end, emoji and tokens as the data have\n" in README
    for model in ("dpo", "ppo"):
        for measure in ("ended", "emoji", "tokens"):
            assert card[model][measure] < card["preferred"][measure][0]


def test_the_answer_quotes_the_committed_run():
    answer = README[README.index("Do the trained models find their training data more likely?") :].split("\n\n")[0]
    quoted = re.findall(r"[+-][\d.]+ \[[+-][\d.]+, [+-][\d.]+\]", " ".join(answer.split()))
    analysis = metrics("analyze_logps")
    estimates = [(model, key) for model in ("dpo", "ppo") for key in ("change_train_chosen", "did")]
    assert quoted == [interval(analysis[model], key, sign=True, digits=3) for model, key in estimates]
    unclear = [analysis[model]["did_low"] <= 0 <= analysis[model]["did_high"] for model in ("dpo", "ppo")]
    assert answer.count("no difference found") == sum(unclear)


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("dpo_cpu", "DPO at"),
        ("dpo_cpu_real", "human pairs"),
        ("ppo_cpu", "PPO at"),
        ("ppo_cpu_defaults", "default settings"),
    ],
)
def test_speed_is_that_of_the_committed_benchmark(file, name):
    result = committed(f"bench/results/{file}.json")
    speedup, memory = f"{result['speedup']:.1f} x", f"{100 * result['memory_ratio']:.0f} %"
    speed = " ".join(README[README.index("Against TRL") :].split())
    quoted = re.search(rf"{name} ([\d.]+ x) .*?(\d+ %)", speed)
    assert quoted and quoted.groups() == (speedup, memory), (
        f"README.md, Against TRL: expected {speedup} and {memory}"
    )
    assert result["date"] in README and result["machine"].split(",")[0] in README


def test_every_stage_recipe_and_file_it_names_is_there():
    stages = YAML(typ="safe").load((REPO / "dvc.yaml").read_text())["stages"]
    named = re.findall(r"^\| `(\w+)` \|", README, re.MULTILINE)
    assert ["check_paths", *(name for name in named if name in stages)] == list(stages)
    for file in ("README.md", "CONTRIBUTING.md", "recipes/README.md"):
        text = (REPO / file).read_text(encoding="utf-8")
        paths = re.findall(r"`((?:stages|recipes|bench|data|reports|tests)/[\w./-]+\.\w+)`", text)
        pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
        missing = [path for path in paths if not (REPO / path).exists()]
        missing += [path for path in pictures if not ((REPO / file).parent / path).exists()]
        assert not missing, f"{file} names {missing}"
    assert len(re.findall(r"!\[", README)) >= 2


def test_the_share_of_answers_with_emoji_stands_for_their_mean_number_where_it_was_measured(tmp_path):
    reports = write_example_reports(tmp_path)
    card = scorecard(lambda path: (reports / path).read_text(encoding="utf-8"), "reports")
    assert "| has an emoji | 50 % [30, 70] |" in card and "| emoji |" not in card


def test_it_is_short():
    assert len(LINES) <= 150  # what is for later readers goes to CONTRIBUTING.md or recipes/README.md
