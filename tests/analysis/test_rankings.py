"""Rankers on pairs ranked by hand."""

import pandas as pd
import pytest
from scipy.stats import spearmanr

from stages.lib.analysis.rankings import (
    accuracy,
    agreement,
    estimates,
    heldout_table,
    length_correlation,
    margin_correlation,
)
from stages.lib.analysis.stats import Resampling

HOW = Resampling(samples=200, confidence=0.95, seed=0)


@pytest.fixture
def pairs():
    texts = []
    for row, tokens, base, dpo in (
        (11, (10, 20), (-2.0, -1.0), (-1.5, -2.0)),  # changes: +5, -20: right
        (12, (30, 10), (-1.0, -1.0), (-1.2, -1.1)),  # -6, -1: wrong, though better per token
        (13, (20, 20), (-1.0, -1.0), (-1.0, -1.0)),  # 0, 0: a tie
        (14, (40, 10), (-1.0, -3.0), (-0.9, -3.0)),  # +4, 0: right
    ):
        for i, side in enumerate(("chosen", "rejected")):
            texts.append((f"heldout_{side}", row, row, tokens[i], base[i], dpo[i], base[i]))
    texts.append(("unseen", 1, None, 5, -1.0, -1.0, -1.0))
    texts = pd.DataFrame(texts, columns=["group", "row", "prompt_id", "tokens", "base", "dpo", "ppo"])
    words = pd.DataFrame(
        {
            "row": [14, 13, 12, 11],  # another order
            "chosen": ["Sure! 🎉", "Hi 😀 you?", "Yes?", "Yes! And you? 🎉"],
            "rejected": ["As an AI, no.", "Hello 😀", "It is.", "It is."],
        }
    )
    scores = pd.DataFrame(
        {"row": [11, 12, 13], "chosen_score": [3.0, 1.0, 0.0], "rejected_score": [1.0, 2.0, -1.0]}
    )
    return heldout_table(texts.astype({"prompt_id": "Int64"}), words, scores)


def test_the_table_joins_by_row(pairs):
    assert pairs["row"].tolist() == [11, 12, 13, 14]
    assert pairs["chosen_dpo"].tolist() == pytest.approx([5, -6, 0, 4])
    assert pairs["rejected_dpo"].tolist() == pytest.approx([-20, -1, 0, 0])
    assert pairs["chosen_question_marks"].tolist() == [1, 1, 1, 0]
    assert pairs["chosen_reward_model"].isna().tolist() == [False, False, False, True]


@pytest.mark.parametrize(
    ("ranker", "share"),
    [
        ("dpo", 2.5 / 4),
        ("ppo", 0.5),  # it never moved: four ties
        ("reward_model", 2 / 3),  # of the three it scored
        ("question_marks", 3.5 / 4),
        ("emoji", 3 / 4),  # right, tie (no emoji), tie (one each), right
        ("no_ai_phrase", 2.5 / 4),
        ("base_log_prob", 2 / 4),  # wrong, tie, tie, right
    ],
)
def test_accuracy_counts_ties_half(pairs, ranker, share):
    found = accuracy(pairs, ranker, 0.95)
    assert found.mean == pytest.approx(share)
    assert 0 <= found.low <= found.mean <= found.high <= 1


def test_agreement_is_over_the_pairs_that_both_rank(pairs):
    # row 11 alike, row 12 alike (both wrong), row 13 a tie, row 14 has no score
    assert agreement(pairs, "dpo", "reward_model", 0.95).mean == pytest.approx(2.5 / 3)


def test_correlations_are_spearmans(pairs):
    margins = [25, -5, 0], [2, -1, 1]
    found = margin_correlation(pairs, "dpo", "reward_model", HOW)
    assert found.mean == pytest.approx(spearmanr(*margins).statistic)
    rewards, tokens = [5, -6, 0, 4, -20, -1, 0, 0], [10, 30, 20, 40, 20, 10, 20, 10]
    found = length_correlation(pairs, "dpo", HOW)
    assert found.mean == pytest.approx(spearmanr(rewards, tokens).statistic)


def test_estimates_cover_every_ranker(pairs):
    found = estimates(pairs, HOW)
    assert set(found) == {"dpo", "ppo", "reward_model", "rankers"}
    assert set(found["rankers"]) == {
        "question_marks",
        "exclamation_marks",
        "emoji",
        "apostrophes",
        "length_in_words",
        "no_ai_phrase",
        "base_log_prob",
    }
    assert found["ppo"]["length_correlation"].covers(0.0)  # constant rewards have none
