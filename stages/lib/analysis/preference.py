"""How often a judge prefers a model's answers to the base's, as they are and at equal length."""

import math
from statistics import NormalDist

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy.stats import beta, t

from stages.lib.analysis.stats import Interval

STEPS = 50  # of Newton's method; it settles in under ten


def wins(scores: ArrayLike, base_scores: ArrayLike) -> np.ndarray:
    """(N,) 1 where the judge scores the answer above the base's to the same prompt, 0 below, 1/2 at a tie."""
    return (np.sign(np.asarray(scores, float) - np.asarray(base_scores, float)) + 1) / 2


def comparisons(answers: pd.DataFrame, base: pd.DataFrame) -> pd.DataFrame:
    """Every answer beside each of the base's to the same prompt: their columns, the base's as *_base, and `won`.

    Args:
        answers: prompt_id, judge and others; one answer to each prompt.
        base: the same columns; one or more to each of these prompts.
    """
    both = answers.merge(base, on="prompt_id", suffixes=("", "_base"), validate="one_to_many")
    return both.assign(won=wins(both["judge"], both["judge_base"]))


def effective_comparisons(won: np.ndarray, prompts: ArrayLike | None, confidence: float) -> float:
    """How many independent comparisons say as much as these, of which some share a prompt.

    Korn and Graubard 1998 (Survey Methodology 24, 193): p (1 - p) over the variance of the mean by prompt, corrected
    for the degrees of freedom of that variance. Never more than were made; their number where no prompt has two.

    Args:
        won: (N,) of `wins`.
        prompts: (N,) label of each one's prompt; None: each has its own.
    """
    count, rate = len(won), float(won.mean())
    if prompts is None:
        return count
    codes = np.unique(np.asarray(prompts), return_inverse=True)[1]
    number = int(codes.max()) + 1
    if number == count:
        return count
    if rate in (0, 1) or number == 1:
        return number
    variance = float((np.bincount(codes, won - rate) ** 2).sum()) / count**2
    tail = (1 + confidence) / 2
    freedom = (float(t.ppf(tail, count - 1)) / float(t.ppf(tail, number - 1))) ** 2
    return min(count, rate * (1 - rate) / variance * freedom) if variance > 0 else count


def win_rate(won: ArrayLike, prompts: ArrayLike | None, confidence: float) -> Interval:
    """Mean of `wins` with Clopper and Pearson's interval, at the number of `effective_comparisons`.

    Not Wilson's, as for other shares: Wilson's excludes the truth 5.7 % of the time at 256 comparisons between
    equals, and a verdict hangs on this one. With one comparison a prompt theirs never does more often than it says;
    ties make it wider still.

    Raises:
        ValueError: no comparison, or a value outside 0 to 1.
    """
    won = np.asarray(won, float)
    if len(won) == 0 or not (0 <= won.min() and won.max() <= 1):
        raise ValueError("a win rate needs comparisons between 0 and 1")
    count, rate = effective_comparisons(won, prompts, confidence), float(won.mean())
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, rate * count, (1 - rate) * count + 1)) if rate > 0 else 0.0
    high = float(beta.ppf(1 - tail, rate * count + 1, (1 - rate) * count)) if rate < 1 else 1.0
    return Interval(rate, low, high)


def length_controlled_win_rate(
    won: ArrayLike, length_difference: ArrayLike, prompts: ArrayLike | None, confidence: float
) -> Interval:
    """Win rate were both answers equally long (arXiv:2404.04475): sigmoid(theta) of

    logit P(win) = theta + phi tanh(length difference / its standard deviation).

    Two ties are added, one with the longer and one with the shorter answer, so that comparisons which one side
    always wins, or always wins when longer, have a finite answer that leans towards 1/2. The interval is the
    logit's, by the delta method: theta plus or minus its standard error from the inverse information, to which the
    comparisons count as many as the `effective_comparisons`.

    Args:
        won: (N,) of `wins`.
        length_difference: (N,) tokens of the model's answer less those of the base's.
        prompts: (N,) label of each comparison's prompt; None: each has its own.

    Raises:
        ValueError: no comparison, or another number of lengths.
    """
    won, difference = np.asarray(won, float), np.asarray(length_difference, float)
    if len(won) == 0 or won.shape != difference.shape:
        raise ValueError(f"{won.shape} comparisons against {difference.shape} length differences")
    spread = difference.std()
    x = np.tanh(difference / spread) if spread > 0 else np.zeros_like(difference)
    inputs = np.stack([np.ones(len(x) + 2), np.append(x, [1.0, -1.0])], axis=1)
    outcomes = np.append(won, [0.5, 0.5])
    count = effective_comparisons(won, prompts, confidence)
    count_as = np.append(np.full(len(won), count / len(won)), [1.0, 1.0])
    weights = np.zeros(2)  # theta, phi
    for _ in range(STEPS):
        shares = _sigmoid(inputs @ weights)
        information = (inputs * (count_as * shares * (1 - shares))[:, None]).T @ inputs
        step = np.linalg.solve(information, inputs.T @ (count_as * (outcomes - shares)))
        weights += step * min(1.0, 2.0 / np.abs(step).max(initial=1e-300))  # no step of more than 2 nats
        if np.abs(step).max() < 1e-10:
            break
    shares = _sigmoid(inputs @ weights)
    information = (inputs * (count_as * shares * (1 - shares))[:, None]).T @ inputs
    theta, error = weights[0], math.sqrt(np.linalg.inv(information)[0, 0])
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    mean, low, high = _sigmoid(np.array([theta, theta - z * error, theta + z * error])).tolist()
    return Interval(mean, low, high) if count > 1 else Interval(mean, None, None)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
