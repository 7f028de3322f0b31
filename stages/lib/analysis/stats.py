"""Estimates with intervals that respect the data's grain: prompts are drawn anew, not texts.

Texts that answer the same prompt resemble each other, so an interval that treats them as independent is too
narrow. Every interval here resamples whole clusters (prompts). Percentiles of a plain bootstrap are also too
narrow when clusters are few, by the factor sqrt((n - 1) / n) and by taking normal for Student quantiles; the
expanded percentile interval corrects both (Hesterberg 2015, doi:10.1080/00031305.2015.1089789, section 3.2).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import rankdata
from scipy.stats import t as student

MAX_CHUNK = 2**22  # elements of one (resamples, texts) array: 32 MB


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval; low and high are None where a single cluster allows none."""

    mean: float
    low: float | None
    high: float | None

    @property
    def has_ends(self) -> bool:
        """Whether anything can be concluded from it: an estimate without ends is a number, no finding."""
        return self.low is not None and self.high is not None

    def covers(self, value: float = 0.0) -> bool:
        """Whether `value` cannot be excluded."""
        return self.low is None or self.high is None or self.low <= value <= self.high

    def as_metrics(self, name: str) -> dict[str, float | None]:
        """{name, name_low, name_high}, ready for metrics.json."""
        return {name: self.mean, f"{name}_low": self.low, f"{name}_high": self.high}


@dataclass(frozen=True)
class Resampling:
    """The last three arguments of an interval, to be passed on together: `mean_interval(x, ids, **vars(how))`."""

    samples: int  # resamples of prompts
    confidence: float
    seed: int


def mean_interval(
    values: ArrayLike, clusters: ArrayLike | None, samples: int, confidence: float, seed: int
) -> Interval:
    """Mean of `values` (N,), over texts, with an interval clustered by `clusters` (N,); None: each its own.

    For a change, pass the paired differences. For shares of yes and no see `share_interval`, whose interval
    does not shrink to nothing when all answers agree.

    Raises:
        ValueError: no values, a value that is not finite, or not one cluster label per value.
    """
    values, codes, n = _check(values, clusters)
    sums = np.bincount(codes, values, minlength=n)
    counts = np.bincount(codes, minlength=n)

    def statistic(weights: np.ndarray) -> np.ndarray:
        return (weights @ sums) / (weights @ counts)

    return _interval(float(values.mean()), statistic, [n], len(values), samples, confidence, seed)


def difference_interval(
    first: ArrayLike,
    second: ArrayLike,
    first_clusters: ArrayLike | None,
    second_clusters: ArrayLike | None,
    samples: int,
    confidence: float,
    seed: int,
) -> Interval:
    """mean(first) - mean(second) of two groups that share no prompt, each resampled by its own prompts.

    With changes (after - before) as values this is the difference in differences.
    """
    _refuse_shared(first_clusters, second_clusters)
    first, first_codes, n_first = _check(first, first_clusters)
    second, second_codes, n_second = _check(second, second_clusters)
    sums = np.bincount(first_codes, first), np.bincount(second_codes, second)
    counts = np.bincount(first_codes), np.bincount(second_codes)

    def statistic(w_first: np.ndarray, w_second: np.ndarray) -> np.ndarray:
        return (w_first @ sums[0]) / (w_first @ counts[0]) - (w_second @ sums[1]) / (w_second @ counts[1])

    mean = float(first.mean() - second.mean())
    texts = max(len(first), len(second))
    return _interval(mean, statistic, [n_first, n_second], texts, samples, confidence, seed)


def auc(positives: ArrayLike, negatives: ArrayLike) -> float:
    """Probability that a random positive exceeds a random negative, ties counted half (Mann-Whitney)."""
    positives, negatives = np.asarray(positives, float), np.asarray(negatives, float)
    ranks = rankdata(np.concatenate([positives, negatives]))[: len(positives)]
    u = ranks.sum() - len(positives) * (len(positives) + 1) / 2
    return float(u / (len(positives) * len(negatives)))


def auc_interval(
    positives: ArrayLike,
    negatives: ArrayLike,
    positive_clusters: ArrayLike | None,
    negative_clusters: ArrayLike | None,
    samples: int,
    confidence: float,
    seed: int,
) -> Interval:
    """AUC of two groups that share no prompt, each resampled by its own prompts.

    When one group lies wholly above the other every resample repeats the same 0 or 1. The interval then comes
    from the largest variance an AUC can have, A(1 - A) / min(n, m) (van Dantzig 1951): Wilson's, on the
    smaller number of prompts.
    """
    _refuse_shared(positive_clusters, negative_clusters)
    positives, positive_codes, n_positive = _check(positives, positive_clusters)
    negatives, negative_codes, n_negative = _check(negatives, negative_clusters)
    estimate = auc(positives, negatives)
    if estimate in (0.0, 1.0):
        return _wilson(estimate, min(n_positive, n_negative), confidence)
    values = np.concatenate([positives, negatives])
    order = np.argsort(values, kind="stable")
    is_positive = (np.arange(len(values)) < len(positives))[order]
    codes = np.concatenate([positive_codes, negative_codes])[order]
    levels = np.flatnonzero(np.diff(values[order], prepend=-np.inf))  # where each distinct value starts

    def statistic(w_positive: np.ndarray, w_negative: np.ndarray) -> np.ndarray:
        weights = np.zeros((len(w_positive), len(values)))
        weights[:, is_positive] = w_positive[:, codes[is_positive]]
        positive = np.add.reduceat(weights, levels, axis=1)
        weights[:] = 0
        weights[:, ~is_positive] = w_negative[:, codes[~is_positive]]
        negative = np.add.reduceat(weights, levels, axis=1)
        below = np.cumsum(negative, axis=1) - negative / 2  # ties count half
        return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))

    return _interval(estimate, statistic, [n_positive, n_negative], len(values), samples, confidence, seed)


def share_interval(values: ArrayLike, clusters: ArrayLike | None, confidence: float) -> Interval:
    """Mean of values between 0 and 1 (a share, an accuracy with ties at 1/2) with Wilson's interval.

    No resampling: with 34 of 34 right a bootstrap would claim [1, 1], Wilson says [0.90, 1]. The number of
    trials is divided by the design effect of the clusters (Kish), never below one.

    Raises:
        ValueError: a value is outside 0 to 1.
    """
    values, codes, n = _check(values, clusters)
    if values.min() < 0 or values.max() > 1:
        raise ValueError("a share takes values between 0 and 1")
    mean = float(values.mean())
    sums, counts = np.bincount(codes, values, minlength=n), np.bincount(codes, minlength=n)
    effect = 1.0
    if 0 < mean < 1 and n > 1:
        clustered_variance = n / (n - 1) * ((sums - mean * counts) ** 2).sum() / len(values) ** 2
        effect = max(1.0, clustered_variance / (mean * (1 - mean) / (len(values) - 1)))
    elif n < len(values):
        effect = len(values) / n  # all agree: no more trials than prompts
    return _wilson(mean, len(values) / effect, confidence)


def share_change_interval(before: ArrayLike, after: ArrayLike, confidence: float) -> Interval:
    """Change of a share from `before` to `after`, both (N,) of 0 and 1, answer by answer, one per prompt.

    Half an answer is added to each of the four outcomes (Agresti and Min 2005, doi:10.1002/sim.1781): the
    interval does not shrink to nothing when every answer changed, or none did.
    """
    before, after = np.asarray(before, float), np.asarray(after, float)
    if before.shape != after.shape or len(before) == 0 or not np.isin([before, after], (0, 1)).all():
        raise ValueError("expected two equally long vectors of 0 and 1")
    gained, lost = ((after > before).sum() + 0.5), ((after < before).sum() + 0.5)
    n = len(before) + 2
    centre = (gained - lost) / n
    half = NormalDist().inv_cdf((1 + confidence) / 2) * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    mean = float((after - before).mean())
    return Interval(mean, max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def jackknife_interval(estimate: float, without_each: ArrayLike, confidence: float) -> Interval:
    """For a statistic of a set of texts that duplicates would distort, as a share of distinct n-grams.

    A bootstrap draws texts twice, which themselves repeat every n-gram. The jackknife leaves texts out instead;
    its variance is too large rather than too small on average (Efron and Stein 1981, doi:10.1214/aos/1176345462).

    Args:
        estimate: of all N texts.
        without_each: (N,) the statistic without each text in turn.
    """
    without_each = np.asarray(without_each, float)
    n = len(without_each)
    if n < 2:
        return Interval(float(estimate), None, None)
    error = math.sqrt((n - 1) / n * ((without_each - without_each.mean()) ** 2).sum())
    half = float(student.ppf((1 + confidence) / 2, n - 1)) * error
    return Interval(float(estimate), float(estimate) - half, float(estimate) + half)


def percentiles_of_mean(
    values: ArrayLike, clusters: ArrayLike | None, ends: tuple[float, float], samples: int, seed: int
) -> tuple[float, float]:
    """Where the mean of `values` (N,) falls when prompts are drawn anew: the percentiles `ends` (0 to 100)."""
    values, codes, n = _check(values, clusters)
    weights = _resample(np.random.default_rng(seed), samples, n)
    means = (weights @ np.bincount(codes, values, minlength=n)) / (weights @ np.bincount(codes, minlength=n))
    low, high = np.percentile(means, ends)
    return float(low), float(high)


def rank_correlation_interval(
    x: ArrayLike, y: ArrayLike, clusters: ArrayLike | None, samples: int, confidence: float, seed: int
) -> Interval:
    """Spearman's rank correlation of `x` and `y` (N,); ranks are taken once, resamples reweight them.

    A constant has no correlation: 0, without an interval.
    """
    first, codes, n = _check(x, clusters)
    second = np.asarray(y, float)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}")
    u, v = (rankdata(values) - (len(first) + 1) / 2 for values in (first, second))  # centred, against cancellation
    if not u.any() or not v.any():
        return Interval(0.0, None, None)
    moments = [np.bincount(codes, values, minlength=n) for values in (np.ones_like(u), u, v, u * u, v * v, u * v)]

    def statistic(weights: np.ndarray) -> np.ndarray:
        total, sx, sy, sxx, syy, sxy = (weights @ moment for moment in moments)
        variances = (sxx - sx**2 / total) * (syy - sy**2 / total)
        covariance = sxy - sx * sy / total
        safe = variances > 1e-9 * (u @ u) * (v @ v) / len(u)
        return np.where(safe, covariance / np.sqrt(np.where(safe, variances, 1.0)), 0.0)

    estimate = float(u @ v / math.sqrt((u @ u) * (v @ v)))
    return _interval(estimate, statistic, [n], len(u), samples, confidence, seed)


def _check(values: ArrayLike, clusters: ArrayLike | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Values as float64, cluster codes 0 to n - 1, and n."""
    values = np.asarray(values, float)
    if values.ndim != 1 or len(values) == 0 or not np.isfinite(values).all():
        raise ValueError("expected a non-empty vector of finite values")
    if clusters is None:
        return values, np.arange(len(values)), len(values)
    names, codes = np.unique(np.asarray(clusters), return_inverse=True)
    if len(codes) != len(values):
        raise ValueError(f"{len(values)} values, but {len(codes)} cluster labels")
    return values, codes, len(names)


def _refuse_shared(first: ArrayLike | None, second: ArrayLike | None) -> None:
    if first is not None and second is not None and np.intersect1d(first, second).size:
        raise ValueError("the groups share prompts; compare them pair by pair instead")


def _interval(
    estimate: float,
    statistic: Callable[..., np.ndarray],
    groups: list[int],
    texts: int,
    samples: int,
    confidence: float,
    seed: int,
) -> Interval:
    """The expanded percentile interval of `statistic`.

    Args:
        statistic: takes one (chunk, n) array of cluster counts per group, returns (chunk,).
        groups: number of clusters in each group.
        texts: texts of the largest group, for the size of a chunk.
    """
    if min(groups) < 2:
        return Interval(estimate, None, None)
    rng = np.random.default_rng(seed)
    chunk = max(1, MAX_CHUNK // max(texts, *groups))
    drawn = []
    for start in range(0, samples, chunk):
        size = min(chunk, samples - start)
        drawn.append(statistic(*(_resample(rng, size, n) for n in groups)))
    n = min(groups)
    # Student's quantile and the lost degree of freedom, spelt as a normal tail
    z = math.sqrt(n / (n - 1)) * float(student.ppf((1 + confidence) / 2, n - 1))
    tail = NormalDist().cdf(-z)
    low, high = np.quantile(np.concatenate(drawn), [tail, 1 - tail])
    return Interval(estimate, float(low), float(high))


def _resample(rng: np.random.Generator, size: int, n: int) -> np.ndarray:
    """(size, n) how often each of n clusters was drawn in n draws with replacement."""
    picks = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(picks.ravel(), minlength=size * n).reshape(size, n).astype(float)


def _wilson(mean: float, trials: float, confidence: float) -> Interval:
    """Wilson's score interval (1927) of a share out of `trials`."""
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    centre = (mean + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(mean * (1 - mean) / trials + z * z / (4 * trials**2))
    return Interval(mean, max(0.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))
