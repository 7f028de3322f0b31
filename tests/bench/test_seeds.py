"""bench.seeds: the committed table has every figure with its interval, of the default's seeds."""

import csv

import pytest

from bench import seeds
from tests.conftest import REPO

SCORECARD = REPO / "reports/score_responses/scorecard.csv"


def judged(row):
    """The judge's share with its interval, as the tables have it."""
    return "{:.0f} % [{:.0f}, {:.0f}]".format(
        *(100 * float(row["win_rate" + end]) for end in ("", "_low", "_high"))
    )


def test_a_row_holds_the_scorecards_own_figures():
    with open(SCORECARD) as file:
        scorecard = list(csv.DictReader(file))
    metrics = {"dpo": {"verdict": "better"}, "ppo": {"verdict": "no difference found"}}
    dpo, ppo = seeds.rows_of(7, metrics, scorecard)
    assert (dpo["seed"], dpo["model"], dpo["verdict"]) == (7, "dpo", "better") and ppo["model"] == "ppo"
    cells = {(row["model"], row["decoding"], row["measure"]): row for row in scorecard}
    assert dpo["win_rate_low"] == pytest.approx(float(cells["dpo", "sampled", "win_rate"]["low"]))
    assert ppo["greedy_rep_4_change"] == pytest.approx(float(cells["ppo", "greedy", "rep_4"]["change"]))
    assert ppo["score_change_high"] == pytest.approx(float(cells["ppo", "sampled", "score"]["change_high"]))


def test_the_committed_table_is_what_the_readmes_say_of_it():
    with open(seeds.RESULT) as file:
        rows = list(csv.DictReader(file))
    assert [(row["seed"], row["model"]) for row in rows] == [
        (s, m) for s in ("42", "1", "2") for m in ("dpo", "ppo")
    ]
    # "Both are better with all three", and none of them loops more than the base by more than 0.10
    assert {row["verdict"] for row in rows} == {"better"}
    assert all(float(row["greedy_rep_4_change"]) < 0.1 for row in rows)
    assert all(2.5 < float(row["kl"]) < 5 for row in rows)
    recipes = (REPO / "recipes/README.md").read_text(encoding="utf-8")
    for row in rows:
        judge = judged(row)
        loops = "{:+.2f} [{:+.2f}, {:+.2f}]".format(
            *(float(row["greedy_rep_4_change" + end]) for end in ("", "_low", "_high"))
        )
        beginning = f"| {row['seed']} | {row['model'].upper()} | {row['verdict']} | {judge} |"
        assert any(line.startswith(beginning) and f"| {loops} |" in line for line in recipes.splitlines())


def test_the_run_with_adapters_is_what_the_readmes_say_of_it():
    with open(REPO / "bench/results/lora_default.csv") as file:
        rows = list(csv.DictReader(file))
    recipes, readme = ((REPO / name).read_text(encoding="utf-8") for name in ("recipes/README.md", "README.md"))
    assert [(row["model"], row["rank"]) for row in rows] == [("dpo", "16"), ("ppo", "16")]
    for row in rows:
        judge = judged(row)
        kl, memory = f"{float(row['kl']):.1f}", f"{float(row['peak_memory_mb']) / 1000:.1f} GB"
        beginning = f"| {row['model'].upper()} | {row['verdict']} | {judge} | {kl} |"
        assert any(line.startswith(beginning) and f"| {memory} (" in line for line in recipes.splitlines())
        if row["model"] == "dpo":
            assert f"DPO comes to {judge}, at {memory}" in readme
