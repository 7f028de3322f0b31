"""bench.seeds: the committed table has every figure with its interval, of the default's seeds."""

import csv

import pytest

from bench import seeds
from tests.conftest import REPO

SCORECARD = REPO / "reports/score_responses/scorecard.csv"


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
