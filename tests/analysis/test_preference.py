"""Win rates by hand, against an independent optimiser, and on simulated judges whose taste is known."""

from statistics import NormalDist

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binomtest

from stages.lib.analysis.preference import (
    effective_comparisons,
    length_controlled_win_rate,
    win_rate,
    wins,
)


def test_a_tie_is_half_a_win():
    assert wins([2, 1, 0], [1, 1, 1]).tolist() == [1, 0.5, 0]
    found = win_rate(wins([2, 1, 0, 3], [1, 1, 1, 1]), None, 0.95)
    assert found.mean == 0.625 and found.low < 0.5 < found.high


@pytest.mark.parametrize("won", [0, 1, 150, 255, 256])
def test_the_interval_is_scipys_exact_one(won):
    found = win_rate([1.0] * won + [0.0] * (256 - won), None, 0.9)
    expected = binomtest(won, 256).proportion_ci(0.9, method="exact")
    assert (found.low, found.high) == pytest.approx(expected)


def test_theta_is_that_of_an_independent_optimiser():
    rng = np.random.default_rng(1)
    longer = rng.normal(5, 30, 60).round()
    won = rng.integers(0, 3, 60) / 2
    x = np.append(np.tanh(longer / longer.std()), [1, -1])  # with one tie of a longer and one of a shorter answer
    y = np.append(won, [0.5, 0.5])

    def loss(weights):
        logits = weights[0] + weights[1] * x
        return (np.logaddexp(0, logits) - y * logits).sum()

    best = minimize(loss, [0.0, 0.0], tol=1e-12)
    found = length_controlled_win_rate(won, longer, None, 0.95)
    assert found.mean == pytest.approx(1 / (1 + np.exp(-best.x[0])), abs=1e-5)
    h = 1e-4  # the curvature by differences
    steps = np.eye(2) * h
    curvature = [
        [(loss(best.x + u + v) - loss(best.x + u) - loss(best.x + v) + best.fun) / h**2 for u in steps]
        for v in steps
    ]
    half = 1.959964 * np.sqrt(np.linalg.inv(curvature)[0, 0])
    assert np.log(found.high / (1 - found.high)) - best.x[0] == pytest.approx(half, rel=1e-3)


def test_a_judge_of_length_alone_prefers_nothing_at_equal_length():
    rng = np.random.default_rng(0)
    longer = rng.normal(20, 25, 2000)
    won = (rng.random(2000) < 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))).astype(float)
    assert win_rate(won, None, 0.95).low > 0.6
    assert length_controlled_win_rate(won, longer, None, 0.95).covers(0.5)


def test_swapping_the_sides_swaps_the_rate():
    rng = np.random.default_rng(3)
    won, longer = rng.integers(0, 3, 40) / 2, rng.normal(3, 9, 40)
    there, back = (length_controlled_win_rate(w, d, None, 0.9) for w, d in ((won, longer), (1 - won, -longer)))
    assert (back.mean, back.low, back.high) == pytest.approx((1 - there.mean, 1 - there.high, 1 - there.low))


@pytest.mark.parametrize("longer", [np.zeros(34), np.linspace(-9, 9, 34), np.full(34, 40.0)])
def test_always_winning_has_a_finite_answer(longer):
    found = length_controlled_win_rate(np.ones(34), longer, None, 0.95)
    assert 0.5 < found.low < found.mean < found.high < 1


def test_winning_exactly_when_longer_has_a_finite_answer():
    longer = np.linspace(-9, 9, 34)
    found = length_controlled_win_rate((longer > 0).astype(float), longer, None, 0.95)
    assert found.mean == pytest.approx(0.5, abs=1e-6) and found.low > 0.1


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    longer = rng.normal(10, 30, 100)
    truth = 0.6
    logits = np.log(truth / (1 - truth)) + 0.8 * np.tanh(longer / longer.std())
    held = 0
    for _ in range(400):
        won = (rng.random(100) < 1 / (1 + np.exp(-logits))).astype(float)
        found = length_controlled_win_rate(won, longer, None, 0.9)
        held += found.low <= truth <= found.high
    assert 0.86 <= held / 400 <= 0.95


def test_one_comparison_has_no_interval_and_none_is_an_error():
    assert length_controlled_win_rate([1.0], [3.0], None, 0.95).low is None
    assert length_controlled_win_rate([1.0, 0.0], [3.0, 1.0], [7, 7], 0.95).low is None  # of one prompt
    for call in (lambda: length_controlled_win_rate([], [], None, 0.95), lambda: win_rate([], None, 0.95)):
        with pytest.raises(ValueError):
            call()


def test_comparisons_that_share_a_prompt_count_as_few_as_they_spread():
    """By hand: four prompts of two comparisons, means 1, 1, 1/2, 0; p = 5/8, variance (2 * 9 + 1 + 25) / 16 / 64."""
    won, prompts = np.array([1, 1, 1, 1, 1, 0, 0, 0.0]), np.repeat([7, 3, 5, 9], 2)
    by_prompt = np.array([0.75, 0.75, -0.25, -1.25])  # sums of won - p
    variance = (by_prompt**2).sum() / 64
    freedom = (2.364624 / 3.182446) ** 2  # t of 7 and of 3 degrees of freedom
    assert effective_comparisons(won, prompts, 0.95) == pytest.approx(15 / 64 / variance * freedom, rel=1e-6)
    assert effective_comparisons(won[:2], np.array([1, 1]), 0.95) == 1
    assert effective_comparisons(np.ones(8), prompts, 0.95) == 4  # what always wins says nothing of its spread
    assert effective_comparisons(np.full(8, 0.5), prompts, 0.95) == 8
    assert effective_comparisons(won, np.arange(8), 0.95) == 8
    assert win_rate(won, np.arange(8), 0.95) == win_rate(won, None, 0.95)


def test_a_copy_of_every_comparison_adds_nothing():
    rng = np.random.default_rng(4)
    won, longer = rng.integers(0, 2, 60).astype(float), rng.normal(3, 9, 60)
    once, prompts = np.arange(60), np.repeat(np.arange(60), 4)
    for found, copied in (
        (win_rate(won, once, 0.95), win_rate(won.repeat(4), prompts, 0.95)),
        (
            length_controlled_win_rate(won, longer, once, 0.95),
            length_controlled_win_rate(won.repeat(4), longer.repeat(4), prompts, 0.95),
        ),
    ):
        assert copied.mean == pytest.approx(found.mean, rel=1e-3)
        assert found.high - found.low <= copied.high - copied.low < 1.05 * (found.high - found.low)


@pytest.mark.parametrize("taste", [0.0, 0.4])
def test_more_opponents_tell_more_and_hold_the_truth_as_often(taste):
    """Scores of 64 prompts' answers, of their own and of the prompt's spread, against one and four of the base's."""
    rng = np.random.default_rng(6)
    truth = NormalDist().cdf(taste / 2**0.5)
    held, widths = {1: 0, 4: 0}, {1: 0.0, 4: 0.0}
    for _ in range(1500):
        mine = rng.normal(taste, 1, (64, 1))
        base = rng.normal(0, 1, (64, 4))
        for count in held:
            won = wins(np.broadcast_to(mine, (64, count)), base[:, :count]).ravel()
            found = win_rate(won, np.repeat(np.arange(64), count), 0.95)
            held[count] += found.low <= truth <= found.high
            widths[count] += found.high - found.low
    assert widths[4] < 0.78 * widths[1]  # as by theory: sqrt(1/12 + 1/24) of sqrt(1/4) at taste 0
    assert all(0.94 <= count / 1500 <= 0.985 for count in held.values()), held
