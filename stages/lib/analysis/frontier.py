"""The frontier: what a model gains, and how far from the base it went for it.

Score and the judge's win rate over the base against KL, for DPO's and PPO's courses, for the best of n answers of
the base, and for the base itself at 0 (arXiv:2210.10760, arXiv:2305.18290 figure 2).
"""

import math
from typing import cast

import numpy as np
import pandas as pd

from stages.lib.analysis.measures import values_of
from stages.lib.analysis.names import MODELS
from stages.lib.analysis.preference import win_rate, wins
from stages.lib.analysis.stats import Interval, Resampling, mean_interval

BEST_OF = (1, 2, 4, 8, 16)


def row(series: str, step: float, kl: float, score: Interval, won: Interval) -> dict:
    """One point: series, step (optimizer step, update or n), kl, sqrt_kl, score and win_rate with their ends.

    An estimate of KL below 0 is noise around 0 and stands at 0 on the axis.
    """
    point = {"series": series, "step": step, "kl": kl, "sqrt_kl": math.sqrt(max(0.0, kl))}
    return point | score.as_metrics("score") | won.as_metrics("win_rate")


def final(series: str, answers: pd.DataFrame, base: pd.DataFrame, how: Resampling) -> dict:
    """A finished model's sampled answers, beside the base's to the same prompts; the base itself wins half."""
    both = answers.merge(base, on="prompt_id", suffixes=("", "_base"), validate="one_to_one")
    won = win_rate(wins(both["judge"], both["judge_base"]), how.confidence)
    kl = float(cast(np.ndarray, values_of(answers, "kl")).mean())
    score = mean_interval(answers["score"], None, **vars(how))
    return row(series, math.nan, kl, score, Interval(0.5, None, None) if series == MODELS["base"] else won)


def course(
    series: str, looks: pd.DataFrame, opponents: pd.DataFrame, from_base: bool, how: Resampling
) -> list[dict]:
    """A training's looks, a point each.

    Where training starts at the base, its first look must win half, but for luck: what its answers won above that is
    taken off the later looks, prompt by prompt. They were drawn with the same random numbers and met the same
    opponents, so that luck is theirs too (a control variate).

    Args:
        looks: step, prompt_id, logp, ref_logp, score, judge; one answer per step and prompt.
        opponents: prompt_id, judge; of the base's answers to the same prompts, of which all count alike.
    """
    of_prompt = {prompt_id: own.to_numpy() for prompt_id, own in opponents.groupby("prompt_id")["judge"]}
    won = [wins(judge, of_prompt[i]).mean() for judge, i in zip(looks["judge"], looks["prompt_id"], strict=True)]
    looks = looks.assign(won=won)
    if from_base:
        start = looks[looks["step"] == looks["step"].min()]
        of_start = dict(zip(start["prompt_id"], start["won"], strict=True))
        looks["won"] += [0.5 - of_start[prompt_id] for prompt_id in looks["prompt_id"]]
    points = []
    for step, look in looks.groupby("step"):
        kl = float(np.mean(look["logp"] - look["ref_logp"]))
        score, rate = (mean_interval(look[name], None, **vars(how)) for name in ("score", "won"))
        points.append(row(series, cast(int, step), kl, score, rate))
    return points


def best_of_n(scores: np.ndarray, judged: np.ndarray, how: Resampling) -> list[dict]:
    """The answer that the reward model scores highest among n of the base's, for n in BEST_OF.

    Unbiased, by order statistics: all ways to draw n of a prompt's M answers count alike, and for the win rate all
    ways to draw its opponent from the others. KL is its upper bound, log n - (n - 1) / n.

    Args:
        scores, judged: (P, M) of the reward model and of the judge, M independent answers to each of P prompts.

    Raises:
        ValueError: M is not larger than the largest n.
    """
    num_answers = scores.shape[1]
    if scores.shape != judged.shape or num_answers <= max(BEST_OF):
        raise ValueError(f"best of {max(BEST_OF)} needs more answers than that a prompt, not {scores.shape}")
    order = np.argsort(scores, axis=1, kind="stable")
    scores, judged = (np.take_along_axis(values, order, axis=1) for values in (scores, judged))
    points = []
    for n in BEST_OF:
        score = scores @ chance_of_being_best(n, num_answers)
        chance = chance_of_being_best(n, num_answers - 1)
        won = np.zeros(len(scores))
        for opponent in range(num_answers):
            others = np.delete(judged, opponent, axis=1)
            won += wins(others, judged[:, opponent : opponent + 1]) @ chance / num_answers
        kl = math.log(n) - (n - 1) / n
        points.append(
            row("best of n", n, kl, mean_interval(score, None, **vars(how)), mean_interval(won, None, **vars(how)))
        )
    return points


def chance_of_being_best(n: int, total: int) -> np.ndarray:
    """(total,) of each rank, lowest first: the chance to be the highest of n drawn without replacement."""
    return np.array([math.comb(rank, n - 1) for rank in range(total)]) / math.comb(total, n)
