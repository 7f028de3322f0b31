"""What is measured on answers: every definition, once.

An answer is one row of a table: model, decoding ('greedy', 'sampled', or 'data' for the data's preferred answers),
prompt_id, split, response_ids, text, ended, and in nats at the temperature of sampling logp (summed log-prob under
the model that gave it), base_logp (the same under the base) and entropy (mean per token); score and judge are the
raw outputs of the reward model and of the judge; objective is what PPO maximises. What a row does not have is NaN.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from stages.lib.analysis.stats import (
    Interval,
    Resampling,
    jackknife_interval,
    mean_interval,
    share_change_interval,
    share_interval,
)
from stages.lib.analysis.text_features import (
    bigram_counts,
    count_emoji,
    count_exclamations,
    count_questions,
    distinct_n,
    has_ai_phrase,
)
from stages.lib.data.repetition import rep_n

Measure = Callable[[pd.DataFrame], Any]  # a Series, one value an answer; pandas types it as one of several
MEANS: dict[str, Measure] = {
    # raw output of the reward model at the end of the turn; a cut answer is read as if it ended there
    "score": lambda answers: answers["score"],
    # what PPO maximises: the score in the unit of its training, less its penalty for not ending and its price of KL
    "objective": lambda answers: answers["objective"],
    # KL to the base by its k1 estimator, nats per answer: log pi(y|x) - log base(y|x), y sampled from pi
    "kl": lambda answers: (answers["logp"] - answers["base_logp"]).where(answers["decoding"] == "sampled"),
    # share of repeated word 4-grams within an answer: 1 - distinct / all
    "rep_4": lambda answers: answers["text"].map(rep_n),
    # length in tokens, the end of turn included
    "tokens": lambda answers: answers["response_ids"].map(len),
    # entropy of the next token, nats per token, mean over an answer
    "entropy": lambda answers: answers["entropy"].where(answers["decoding"] == "sampled"),
    # log-prob under the base, nats per token
    "base_logp_per_token": lambda answers: answers["base_logp"] / answers["response_ids"].map(len),
    # per answer, as seen on the screen
    "emoji": lambda answers: answers["text"].map(count_emoji),
    "exclamations": lambda answers: answers["text"].map(count_exclamations),
}
SHARES: dict[str, Measure] = {
    # ended by itself rather than at the token limit
    "ended": lambda answers: answers["ended"],
    # has a question mark
    "asks_back": lambda answers: answers["text"].map(count_questions) > 0,
    # has an emoji: the mean number is high, too, where a few answers hold dozens
    "has_emoji": lambda answers: answers["text"].map(count_emoji) > 0,
    # has an "as an AI" phrase
    "disclaimer": lambda answers: answers["text"].map(has_ai_phrase),
}
DISTINCT = "distinct_2"  # distinct over all word 2-grams of the answers to the held-out prompts, taken together


def level(answers: pd.DataFrame, measure: str, how: Resampling) -> Interval | None:
    """One measure of one model's answers, one per prompt; None where it is not defined for them."""
    if measure == DISTINCT:
        return _distinct_2(answers, None, how.confidence)
    values = values_of(answers, measure)
    if values is None:
        return None
    if measure in SHARES:
        return share_interval(values, None, how.confidence)
    return mean_interval(values, None, **vars(how))


def change(answers: pd.DataFrame, base: pd.DataFrame, measure: str, how: Resampling) -> Interval | None:
    """Change of one measure from the base's answers, prompt by prompt; None where it is not defined for both.

    Args:
        answers, base: answers to the same prompts in the same order.
    """
    if answers["prompt_id"].tolist() != base["prompt_id"].tolist():
        raise ValueError("a change needs answers to the same prompts in the same order")
    if measure == DISTINCT:
        return _distinct_2(answers, base, how.confidence)
    values, before = values_of(answers, measure), values_of(base, measure)
    if values is None or before is None:
        return None
    if measure in SHARES:
        return share_change_interval(before, values, how.confidence)
    return mean_interval(values - before, None, **vars(how))


def values_of(answers: pd.DataFrame, measure: str) -> np.ndarray | None:
    """(N,) one measure of each answer, float64; None where it is not defined for these answers."""
    values = (SHARES | MEANS)[measure](answers).to_numpy(float)
    return None if np.isnan(values).all() else values


def _distinct_2(answers: pd.DataFrame, base: pd.DataFrame | None, confidence: float) -> Interval:
    """Of the held-out prompts alone: it falls with the number of texts, so that has to be the same everywhere."""
    ratios = _distinct_without_each(answers)
    if base is not None:
        ratios = ratios - _distinct_without_each(base)
    return jackknife_interval(ratios[0], ratios[1:], confidence)


def _distinct_without_each(answers: pd.DataFrame) -> np.ndarray:
    """(1 + N,) the ratio over all answers, then over all but each."""
    texts = answers.loc[answers["split"] == "heldout", "text"].tolist()
    counts = list(map(bigram_counts, texts))
    together: Counter = Counter()
    for own in counts:
        together.update(own)  # sum() would copy all of it for every text
    ratios = [distinct_n(texts, 2)]
    for own in counts:
        lost = sum(number == together[bigram] for bigram, number in own.items())
        total = together.total() - own.total()
        ratios.append((len(together) - lost) / total if total else 0.0)
    return np.array(ratios)
