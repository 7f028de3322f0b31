"""Better, no difference found, worse, or broken: a scorecard in one word, by stated rules.

Broken, if any of these holds:
1. loops: its greedy answers repeat more than the base's, rep-4 by more than 0.15, interval above 0;
2. collapse: entropy or distinct-2 has fallen below a third of the base's, interval below 0;
3. off the data: the mean length lies outside the range of the preferred answers' mean, or the mean number of emoji
   above it, further out than the base's by more than a quarter of the range's middle, the change's interval clear
   of 0;
4. overoptimised: the reward model's score is up and the judge's win rate down, intervals clear of 0 and 1/2.
Else better, if the judge's win rate over the base has its interval above 1/2, as it is and at equal length; worse,
if both lie below; no difference found otherwise. Where one prompt allows no interval at equal length, the word is that
there is none, and no finding.

A reason adds the win rate where both answers ended by themselves or both were cut, which the word does not hang on:
that an answer ends is part of what makes it better, and the few prompts left tell less.

Rule 3 compares with the base because the base itself may lie outside: a model that is no further out is not broken
by training. Rules 2 to 4 look at sampled answers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import pandas as pd

from stages.lib.analysis.stats import Interval
from stages.lib.analysis.wording import NO_DIFFERENCE, NO_FINDING, number, percent

BETTER, WORSE, BROKEN = "better", "worse", "broken"
MAX_REP_4_GAIN = 0.15
COLLAPSED = 1 / 3  # of the base's
SLACK = 1 / 4  # of the middle of the preferred answers' range


@dataclass(frozen=True)
class Verdict:
    """A word, and the figures that it rests on, each a part of a sentence."""

    word: str
    reasons: list[str]

    @property
    def text(self) -> str:
        """'broken: ...; ...', without a full stop."""
        return f"{self.word}: {'; '.join(self.reasons)}"


@dataclass(frozen=True)
class Finding:
    """One measure of one model beside the base's."""

    now: Interval
    base: Interval
    change: Interval


def verdict(scorecard: pd.DataFrame, model: str, ranges: Mapping[str, tuple[float, float]]) -> Verdict:
    """The verdict on `model`.

    Args:
        scorecard: the rows of scorecard.scorecard.
        ranges: of tokens and emoji, as scorecard.preferred_ranges gives them.
    """
    rows = scorecard.set_index(["model", "decoding", "measure"])

    def interval(model: str, decoding: str, measure: str, *columns: str) -> Interval:
        values = rows.loc[(model, decoding, measure), list(columns)]
        mean, low, high = (None if pd.isna(value) else float(value) for value in values)
        return Interval(cast(float, mean), low, high)

    def finding(measure: str, decoding: str = "sampled") -> Finding:
        now, base = (interval(each, decoding, measure, "mean", "low", "high") for each in (model, "base"))
        return Finding(now, base, interval(model, decoding, measure, "change", "change_low", "change_high"))

    plain, at_equal_length = (
        interval(model, "sampled", name, "mean", "low", "high") for name in ("win_rate", "win_rate_lc")
    )
    faults = [
        _loops(finding("rep_4", "greedy")),
        _collapse(finding("entropy"), "entropy"),
        _collapse(finding("distinct_2"), "distinct-2"),
        _too_many(finding("tokens"), ranges["tokens"], "tokens", 0),
        _too_few(finding("tokens"), ranges["tokens"], "tokens", 0),
        _too_many(finding("emoji"), ranges["emoji"], "emoji", 2),
        _overoptimised(finding("score"), plain),
    ]
    if found := [fault for fault in faults if fault]:
        return Verdict(BROKEN, found)
    if not (plain.has_ends and at_equal_length.has_ends):
        word = NO_FINDING
    elif _above(plain, 0.5) and _above(at_equal_length, 0.5):
        word = BETTER
    elif _below(plain, 0.5) and _below(at_equal_length, 0.5):
        word = WORSE
    else:
        word = NO_DIFFERENCE
    preferred = (
        f"the judge prefers its answers to the base's in {percent(plain)}, in {percent(at_equal_length)} at "
        "equal length"
    )
    if (model, "sampled", "win_rate_same_end") in rows.index:  # else no prompt's two answers ended alike
        same_end = interval(model, "sampled", "win_rate_same_end", "mean", "low", "high")
        preferred += f", in {percent(same_end)} where both ended or both were cut"
    kl = interval(model, "sampled", "kl", "mean", "low", "high")
    return Verdict(word, [preferred, f"KL to the base {number(kl.mean, 1)} nats an answer"])


def _loops(rep_4: Finding) -> str | None:
    if rep_4.change.mean > MAX_REP_4_GAIN and _above(rep_4.change, 0):
        return f"greedy answers loop (rep-4 {number(rep_4.now.mean)}, the base's {number(rep_4.base.mean)})"
    return None


def _collapse(found: Finding, name: str) -> str | None:
    if found.now.mean < COLLAPSED * found.base.mean and _below(found.change, 0):
        return f"{name} collapsed ({number(found.now.mean)}, the base's {number(found.base.mean)})"
    return None


def _too_many(found: Finding, ends: tuple[float, float], unit: str, digits: int) -> str | None:
    base_outside = max(0.0, found.base.mean - ends[1])
    if found.now.mean - ends[1] > base_outside + SLACK * sum(ends) / 2 and _above(found.change, 0):
        return _off_the_data(found, ends, unit, digits)
    return None


def _too_few(found: Finding, ends: tuple[float, float], unit: str, digits: int) -> str | None:
    base_outside = max(0.0, ends[0] - found.base.mean)
    if ends[0] - found.now.mean > base_outside + SLACK * sum(ends) / 2 and _below(found.change, 0):
        return _off_the_data(found, ends, unit, digits)
    return None


def _off_the_data(found: Finding, ends: tuple[float, float], unit: str, digits: int) -> str:
    now, base, low, high = (number(value, digits) for value in (found.now.mean, found.base.mean, *ends))
    return f"{now} {unit} an answer (the preferred answers' {low} to {high}, the base's {base})"


def _overoptimised(score: Finding, won: Interval) -> str | None:
    if _above(score.change, 0) and _below(won, 0.5):
        return (
            f"overoptimised (the reward model's score up by {number(score.change.mean)}, the judge's win rate "
            f"over the base down to {percent(won)})"
        )
    return None


def _above(interval: Interval, value: float) -> bool:
    return not interval.covers(value) and interval.mean > value


def _below(interval: Interval, value: float) -> bool:
    return not interval.covers(value) and interval.mean < value
