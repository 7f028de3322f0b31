"""Best of n against all subsets counted one by one, and points worked by hand."""

import itertools
import math

import numpy as np
import pandas as pd
import pytest

from stages.lib.analysis import frontier
from stages.lib.analysis.stats import Resampling

HOW = Resampling(samples=100, confidence=0.95, seed=0)
FEW = Resampling(samples=2, confidence=0.5, seed=0)


def test_chance_of_being_best_counts_subsets():
    for n, total in ((1, 5), (2, 5), (3, 5), (5, 5)):
        counted = np.zeros(total)
        for subset in itertools.combinations(range(total), n):
            counted[max(subset)] += 1
        assert frontier.chance_of_being_best(n, total) == pytest.approx(counted / counted.sum())


def test_best_of_n_counts_all_draws(monkeypatch):
    monkeypatch.setattr(frontier, "BEST_OF", (1, 2, 4))
    rng = np.random.default_rng(2)
    scores, judged = rng.normal(size=(3, 5)), rng.integers(0, 4, size=(3, 5)).astype(float)
    for point in frontier.best_of_n(scores, judged, HOW):
        n = point["step"]
        found, won = [], []
        for row, opinions in zip(scores, judged, strict=True):
            for subset in itertools.combinations(range(5), n):
                best = max(subset, key=row.__getitem__)
                found.append(row[best])
                won += [(np.sign(opinions[best] - opinions[j]) + 1) / 2 for j in range(5) if j not in subset]
        assert point["score"] == pytest.approx(np.mean(found))
        assert point["win_rate"] == pytest.approx(np.mean(won))
        assert point["score_gain"] == pytest.approx(np.mean(found) - scores.mean()) and point["prompts"] == 3
    with pytest.raises(ValueError, match="more answers"):
        frontier.best_of_n(scores[:, :4], judged[:, :4], HOW)


def test_the_best_of_one_wins_half_and_more_win_more():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(50, 17))
    points = frontier.best_of_n(scores, scores + rng.normal(size=scores.shape), HOW)
    assert [point["step"] for point in points] == [1, 2, 4, 8, 16]
    assert [points[0][f"score_gain{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]  # of one: the base itself
    assert points[0]["win_rate"] == pytest.approx(0.5)
    rates = [point["win_rate"] for point in points]
    assert rates == sorted(rates)
    assert [point["kl"] for point in points] == pytest.approx(
        [0, 0.193147, 0.636294, 1.204442, 1.835089], abs=1e-6
    )
    # expected maximum of 2 standard normals: 1 / sqrt(pi)
    assert points[1]["score"] - points[0]["score"] == pytest.approx(1 / math.sqrt(math.pi), abs=0.08)


def test_a_course_has_a_point_a_look():
    looks = pd.DataFrame(
        {
            "step": [0, 0, 5, 5],
            "prompt_id": [7, 8, 7, 8],
            "logp": [-10.0, -20.0, -10.0, -11.0],
            "ref_logp": [-10.0, -19.0, -12.0, -15.0],
            "score": [1.0, 2.0, 3.0, 5.0],
            "judge": [0.0, 0.0, 1.0, 2.0],
        }
    )
    opponents = pd.DataFrame({"prompt_id": [8, 7, 8, 7], "judge": [2.0, 0.0, 2.0, -1.0]})
    opponents["score"] = [6.0, 0.0, 4.0, 1.0]  # mean 5 of prompt 8, 0.5 of prompt 7
    first, second = frontier.course("DPO", looks, opponents, False, HOW)
    assert (first["series"], first["step"], first["kl"], first["sqrt_kl"]) == ("DPO", 0, -0.5, 0.0)
    assert (first["score"], first["win_rate"]) == (1.5, 0.375)  # a tie and a win, and two losses
    assert (second["kl"], second["sqrt_kl"]) == (3.0, math.sqrt(3))
    assert (second["score"], second["win_rate"]) == (4.0, 0.75)  # two wins, and two ties
    assert second["win_rate_low"] < 0.75 < second["win_rate_high"]
    # over the opponents: 0.5 and -3, then 2.5 and 0
    assert (first["score_gain"], second["score_gain"]) == (-1.25, 1.25)
    first, second = frontier.course("DPO", looks, opponents, True, HOW)
    assert [first[f"win_rate{end}"] for end in ("", "_low", "_high")] == [0.5, 0.5, 0.5]  # the base itself
    assert second["win_rate"] == 0.875  # 1 - (0.75 - 0.5) and 0.5 - (0 - 0.5)
    assert [first[f"score_gain{end}"] for end in ("", "_low", "_high")] == [0, 0, 0]
    assert (second["score_gain"], second["score"], second["prompts"]) == (2.5, 4.0, 2)  # over the start: 2 and 3
    assert second["score_gain_low"] >= 2 and second["score_gain_high"] <= 3  # prompt by prompt


def test_a_start_that_was_lucky_does_not_show_in_the_course():
    """200 courses that never leave the base: half won in the mean, and less scattered than without the start."""
    generator = np.random.default_rng(0)
    ends = {True: [], False: []}
    for _ in range(200):
        own = generator.normal(size=30)
        later = own + 0.3 * generator.normal(size=30)  # the same random numbers, another policy by a little
        judge = np.concatenate((own, later / np.sqrt(1.09)))
        looks = pd.DataFrame({"step": [0] * 30 + [4] * 30, "prompt_id": [*range(30)] * 2, "judge": judge})
        looks[["logp", "ref_logp", "score"]] = 0.0
        opponents = pd.DataFrame({"prompt_id": [*range(30)] * 2, "judge": generator.normal(size=60), "score": 0.0})
        for from_base, rates in ends.items():
            rates.append(frontier.course("DPO", looks, opponents, from_base, FEW)[1]["win_rate"])
    assert np.mean(ends[True]) == pytest.approx(0.5, abs=0.01)
    assert np.std(ends[True]) < 0.6 * np.std(ends[False])


def test_a_finished_model_gains_over_the_base_on_the_same_prompts():
    columns = {"prompt_id": [1, 2, 3], "score": [1.0, 5.0, 9.0], "judge": 0.0, "decoding": "sampled"}
    base = pd.DataFrame(columns).assign(logp=-5.0, base_logp=-5.0)
    other = base.iloc[::-1].assign(score=[10.0, 6.0, 5.0], judge=1.0, logp=-3.0)  # of prompts 3, 2, 1
    found = frontier.final("DPO", other, base, base[:0], HOW)
    assert (found["score"], found["score_gain"], found["prompts"], found["kl"]) == (7.0, 2.0, 3, 2.0)
    assert 1 <= found["score_gain_low"] <= 2 <= found["score_gain_high"] <= 4  # gains of 1, 1 and 4
    assert found["win_rate"] == 1
    stronger = frontier.final("DPO", other, base, base.assign(judge=9.0), HOW)  # a second answer to each prompt
    assert (stronger["win_rate"], stronger["score_gain"]) == (0.5, 2.0)
    itself = frontier.final("Base", base, base, base[:0], HOW)
    assert (itself["score_gain"], itself["score_gain_low"], itself["score"]) == (0, None, 5.0)
