"""The frontier: what a model gains, and how far from the base it went for it.

Score gained over the base, and the judge's win rate over it, against KL: for DPO's and PPO's courses, for the best of
n answers of the base, and for the base itself at 0 (arXiv:2210.10760, arXiv:2305.18290 figure 2).

The series are on prompts of their own, some of a few, and a mean score hangs on the prompts more than on the model.
So what is compared is the gain, prompt by prompt, over the base's answers to the very same prompts.
"""

import math
from typing import cast

import numpy as np
import pandas as pd

from stages.lib.analysis.measures import values_of
from stages.lib.analysis.names import MODELS
from stages.lib.analysis.preference import comparisons, win_rate, wins
from stages.lib.analysis.stats import Interval, Resampling, mean_interval

BEST_OF = (1, 2, 4, 8, 16)


def row(
    series: str, step: float, prompts: int, kl: float, score: Interval, score_gain: Interval, won: Interval
) -> dict:
    """One point: series, step (optimizer step, update or n), prompts (how many), kl, sqrt_kl; score, score_gain
    and win_rate with their ends.

    An estimate of KL below 0 is noise around 0 and stands at 0 on the axis.
    """
    point = {"series": series, "step": step, "prompts": prompts, "kl": kl, "sqrt_kl": math.sqrt(max(0.0, kl))}
    return point | score.as_metrics("score") | score_gain.as_metrics("score_gain") | won.as_metrics("win_rate")


def final(
    series: str, answers: pd.DataFrame, base: pd.DataFrame, opponents: pd.DataFrame, how: Resampling
) -> dict:
    """A finished model's sampled answers, beside the base's to the same prompts; the base itself wins half, gains 0.

    Args:
        base: one answer to each prompt, of the same random numbers: over it the score is gained.
        opponents: the base's further answers: against these and that one the judge compares.
    """
    both = answers.merge(base, on="prompt_id", suffixes=("", "_base"), validate="one_to_one")
    met = comparisons(answers, pd.concat([base, opponents]))
    won = win_rate(met["won"], met["prompt_id"], how.confidence)
    kl = float(cast(np.ndarray, values_of(answers, "kl")).mean())
    score = mean_interval(answers["score"], None, **vars(how))
    gain = mean_interval(both["score"] - both["score_base"], None, **vars(how))
    if series == MODELS["base"]:
        gain, won = Interval(0.0, None, None), Interval(0.5, None, None)
    return row(series, math.nan, len(both), kl, score, gain, won)


def course(
    series: str, looks: pd.DataFrame, opponents: pd.DataFrame, from_base: bool, how: Resampling
) -> list[dict]:
    """A training's looks, a point each.

    Where training starts at the base, its first look must win half, but for luck: what its answers won above that is
    taken off the later looks, prompt by prompt. They were drawn with the same random numbers and met the same
    opponents, so that luck is theirs too (a control variate). The score is gained over that look; where training
    starts elsewhere, over the mean of the prompt's opponents.

    Args:
        looks: step, prompt_id, logp, ref_logp, score, judge; one answer per step and prompt, of every prompt at every
            step.
        opponents: prompt_id, score, judge; of the base's answers to the same prompts, of which all count alike.
    """
    of_prompt = {prompt_id: own.to_numpy() for prompt_id, own in opponents.groupby("prompt_id")["judge"]}
    won = [wins(judge, of_prompt[i]).mean() for judge, i in zip(looks["judge"], looks["prompt_id"], strict=True)]
    looks = looks.assign(won=won)
    of_base = {prompt_id: own.mean() for prompt_id, own in opponents.groupby("prompt_id")["score"]}
    if from_base:
        start = looks[looks["step"] == looks["step"].min()]
        won_at_start = dict(zip(start["prompt_id"], start["won"], strict=True))
        looks["won"] += [0.5 - won_at_start[prompt_id] for prompt_id in looks["prompt_id"]]
        of_base = dict(zip(start["prompt_id"], start["score"], strict=True))
    looks["gain"] = looks["score"] - [of_base[prompt_id] for prompt_id in looks["prompt_id"]]
    points = []
    for step, look in looks.groupby("step"):
        kl = float(np.mean(look["logp"] - look["ref_logp"]))
        score, gain, rate = (mean_interval(look[name], None, **vars(how)) for name in ("score", "gain", "won"))
        points.append(row(series, cast(int, step), len(look), kl, score, gain, rate))
    return points


def best_of_n(scores: np.ndarray, judged: np.ndarray, how: Resampling) -> list[dict]:
    """The answer that the reward model scores highest among n of the base's, for n in BEST_OF.

    Unbiased, by order statistics: all ways to draw n of a prompt's M answers count alike, and for the win rate all
    ways to draw its opponent from the others. The score is gained over the mean of the prompt's M answers. KL is its
    upper bound, log n - (n - 1) / n.

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
        best = chance_of_being_best(n, num_answers)
        chance = chance_of_being_best(n, num_answers - 1)
        won = np.zeros(len(scores))
        for opponent in range(num_answers):
            others = np.delete(judged, opponent, axis=1)
            won += wins(others, judged[:, opponent : opponent + 1]) @ chance / num_answers
        kl = math.log(n) - (n - 1) / n
        found = (scores @ best, scores @ (best - 1 / num_answers), won)
        intervals = (mean_interval(values, None, **vars(how)) for values in found)
        points.append(row("best of n", n, len(scores), kl, *intervals))
    return points


def chance_of_being_best(n: int, total: int) -> np.ndarray:
    """(total,) of each rank, lowest first: the chance to be the highest of n drawn without replacement."""
    return np.array([math.comb(rank, n - 1) for rank in range(total)]) / math.comb(total, n)
