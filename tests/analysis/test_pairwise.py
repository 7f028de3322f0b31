"""Verdicts read from replies, and tallies worked by hand and on judges whose taste is known."""

import numpy as np
import pytest
from scipy.stats import binomtest

from stages.lib.analysis.pairwise import outcome, question, tally

NAN = float("nan")


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("B repeats itself. [[A]]", 1.0),
        ("[[B]]", 0.0),
        ("They are alike.\n\n**[[C]]**", 0.5),
        ("[[A]], so my verdict is [[A]]", 1.0),
        ("[[A]] if A is better, [[B]] if B is better", None),  # the question said again
        ("[[A]] ... no, [[C]]", None),
        ("A is better", None),
        ("[A]", None),
        ("[[D]]", None),
        ("[[a]]", None),
        ("", None),
    ],
)
def test_only_one_plain_verdict_counts(reply, expected):
    assert outcome(reply) == expected


def test_the_question_holds_all_three_texts_and_the_order_is_all_that_differs():
    system, user = question("How are you?", "Fine, you?", "As an AI, no.")
    assert (system["role"], user["role"]) == ("system", "user")
    places = [
        user["content"].index(t) for t in ("How are you?", "assistant A]", "Fine", "assistant B]", "As an AI")
    ]
    assert places == sorted(places)
    other = question("How are you?", "As an AI, no.", "Fine, you?")
    assert other[0] == system
    assert other[1]["content"].replace("Fine, you?", "X").replace("As an AI, no.", "Fine, you?") == user[
        "content"
    ].replace("As an AI, no.", "X")


def test_a_tally_by_hand():
    # five prompts; the model's answer first, then second:
    # won both; won first and tied; lost both; first answer preferred both times; a reply without verdict
    found = tally([1, 1, 0, 1, NAN], [1, 0.5, 0, 0, 1], [3, -2, 5, 1, 9], 0.95)
    assert found["win_rate"].mean == pytest.approx((1 + 0.75 + 0 + 0.5) / 4)
    assert found["consistent"].mean == 0.5  # the first and the third
    # for the first answer: 1 and 0; 1 and 1/2; 0 and 1; 1 and 1
    assert found["prefers_first"].mean == pytest.approx((0.5 + 0.75 + 0.5 + 1) / 4)


def test_the_interval_is_that_of_prompts_not_of_replies():
    found = tally([1] * 30 + [0] * 20, [1] * 30 + [0] * 20, [0] * 50, 0.9)["win_rate"]
    expected = binomtest(30, 50).proportion_ci(0.9, method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_a_judge_of_position_alone_prefers_no_model():
    found = tally(np.ones(200), np.zeros(200), np.arange(200), 0.95)
    assert found["win_rate"].mean == found["win_rate_lc"].mean == 0.5
    assert found["prefers_first"].mean == 1 and found["prefers_first"].low > 0.95
    assert found["consistent"].mean == 0


def test_a_judge_of_length_alone_prefers_nothing_at_equal_length():
    longer = np.random.default_rng(0).normal(15, 25, 1000)
    won = (np.random.default_rng(1).random(1000) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))).astype(
        float
    )
    found = tally(won, won, longer, 0.95)
    assert found["win_rate"].low > 0.55 and found["win_rate_lc"].covers(0.5)


def test_without_a_prompt_of_two_verdicts_there_is_no_rate():
    with pytest.raises(ValueError, match="needs comparisons"):
        tally([NAN, 1], [1, NAN], [0, 0], 0.95)
