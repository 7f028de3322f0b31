"""Style measures of answers read by eye, and changes worked by hand."""

import numpy as np
import pytest

from stages.lib.analysis.style import comparison, measures
from stages.lib.model.generate import Answer


def test_measures_of_two_answers():
    answers = [
        Answer([5, 6, 7, 2], "So good! So good! And you? 🎉", True),
        Answer([5, 6], "As an AI, I cannot", False),
    ]
    found = measures(answers, np.array([-8.0, -1.0]))
    assert {name: values.tolist() for name, values in found.items()} == {
        "emoji": [1, 0],
        "exclamations": [2, 0],
        "asks_back": [1, 0],
        "disclaimer": [0, 1],
        "tokens": [4, 2],
        "ended": [1, 0],
        "distinct_2": [4 / 5, 1],  # so good, good so, so good, good and, and you: four of five differ
        "base_logp_per_token": [-2.0, -0.5],
    }


def test_changes_are_paired_by_prompt():
    """Prompts differ widely, the change is 1 for each: the level is uncertain, the change is not."""
    base = np.arange(20.0) * 10
    shares = np.array([1.0, 0.0] * 10)
    measured = {
        ("base", "greedy"): {"tokens": base, "ended": shares},
        ("dpo", "greedy"): {"tokens": base + 1, "ended": np.ones(20)},
    }
    rows = {(row["model"], row["measure"]): row for row in comparison(measured, seed=0)}
    tokens = rows["dpo", "tokens"]
    assert (tokens["mean"], tokens["change"]) == (96.0, 1.0)
    assert tokens["high"] - tokens["low"] > 30
    assert (tokens["change_low"], tokens["change_high"]) == (1.0, 1.0)
    ended = rows["dpo", "ended"]
    assert (ended["mean"], ended["change"]) == (1.0, 0.5)
    assert ended["low"] == pytest.approx(0.839, abs=1e-3)  # Wilson for 20 of 20
    assert 0 < ended["change_low"] < 0.5 < ended["change_high"]
    assert rows["base", "tokens"]["change"] is None
    assert all(row.keys() == tokens.keys() for row in rows.values())
