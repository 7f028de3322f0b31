"""Measures of answers read by eye, and changes worked by hand."""

import numpy as np
import pandas as pd
import pytest

from stages.lib.analysis.measures import DISTINCT, MEANS, SHARES, change, level, values_of
from stages.lib.analysis.stats import Resampling
from stages.lib.analysis.text_features import distinct_n

HOW = Resampling(samples=300, confidence=0.95, seed=0)


def answers(texts: list[str], **columns) -> pd.DataFrame:
    count = len(texts)
    table = {
        "model": "dpo",
        "decoding": "sampled",
        "prompt_id": range(count),
        "split": "heldout",
        "response_ids": [[5, 6, 7, 2]] * count,
        "text": texts,
        "ended": True,
        "logp": -4.0,
        "base_logp": -8.0,
        "entropy": 1.0,
        "score": 0.0,
        "judge": 0.0,
        "objective": 0.5,
    }
    return pd.DataFrame(table | columns)


def test_measures_of_two_answers():
    table = answers(
        ["So good! So good! And you? 🎉 So good, so good!", "As an AI, I cannot"],
        response_ids=[[5, 6, 7, 2], [5, 6]],
        ended=[True, False],
        logp=[-6.0, -1.5],
        base_logp=[-8.0, -1.0],
        entropy=[1.5, 0.5],
        score=[2.0, -1.0],
        objective=[0.7, -0.3],
    )
    assert {name: values_of(table, name).tolist() for name in (*MEANS, *SHARES)} == {
        "score": [2, -1],
        "objective": [0.7, -0.3],
        "kl": [2.0, -0.5],
        # 10 words, 7 4-grams: so-good-so-good twice, the others once
        "rep_4": [pytest.approx(1 / 7), 0],
        "tokens": [4, 2],
        "entropy": [1.5, 0.5],
        "base_logp_per_token": [-2.0, -0.5],
        "emoji": [1, 0],
        "exclamations": [3, 0],
        "ended": [1, 0],
        "asks_back": [1, 0],
        "has_emoji": [1, 0],
        "disclaimer": [0, 1],
    }


def test_a_string_of_emoji_in_one_answer_is_a_high_mean_and_a_small_share():
    table = answers(["🎉" * 40, "none", "none", "none"])
    assert level(table, "emoji", HOW).mean == 10 and level(table, "has_emoji", HOW).mean == 0.25


def test_the_kl_of_greedy_answers_is_not_defined_and_so_is_what_data_does_not_have():
    greedy = answers(["One two"], decoding="greedy")
    assert values_of(greedy, "kl") is None and values_of(greedy, "entropy") is None
    preferred = answers(["One two"], logp=np.nan, base_logp=np.nan, entropy=np.nan)
    assert level(preferred, "base_logp_per_token", HOW) is None
    assert change(preferred, answers(["One two"]), "base_logp_per_token", HOW) is None


def test_changes_are_paired_by_prompt():
    """Prompts differ widely, the change is 1 for each: the level is uncertain, the change is not."""
    base = answers([""] * 20, response_ids=[[5] * (10 * i + 1) for i in range(20)], ended=[True, False] * 10)
    model = answers([""] * 20, response_ids=[[5] * (10 * i + 2) for i in range(20)])
    tokens = level(model, "tokens", HOW)
    assert tokens.mean == 97 and tokens.high - tokens.low > 30
    assert vars(change(model, base, "tokens", HOW)) == {"mean": 1, "low": 1, "high": 1}
    ended = level(model, "ended", HOW)
    assert ended.mean == 1 and ended.low == pytest.approx(0.839, abs=1e-3)  # Wilson for 20 of 20
    changed = change(model, base, "ended", HOW)
    assert changed.mean == 0.5 and 0 < changed.low < 0.5 < changed.high
    with pytest.raises(ValueError, match="same prompts"):
        change(model, base.iloc[::-1], "tokens", HOW)


def test_distinct_2_leaves_out_one_answer_at_a_time_and_prompts_that_are_not_held_out():
    texts = ["a b a b c", "b c d", "", "a b c d e", "x y"]
    table = answers(texts, split=["heldout"] * 4 + ["eval"])
    heldout = texts[:4]
    without = np.array([distinct_n(heldout[:i] + heldout[i + 1 :], 2) for i in range(4)])
    error = np.sqrt(3 / 4 * ((without - without.mean()) ** 2).sum())
    found = level(table, DISTINCT, HOW)
    assert found.mean == distinct_n(heldout, 2) == 5 / 10  # ab ba ab bc | bc cd | ab bc cd de
    assert found.high - found.mean == pytest.approx(3.182446 * error)  # Student's quantile, 3 degrees of freedom
    same = change(table, table, DISTINCT, HOW)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
