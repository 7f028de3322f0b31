"""What a set of pairs is like, before any training: scripts, repeated prompts, and what one feature says of it."""

import unicodedata
from collections import Counter
from collections.abc import Sequence

import pandas as pd

from stages.lib.analysis.names import RANKER_LABELS
from stages.lib.analysis.rankings import accuracy
from stages.lib.analysis.stats import Interval
from stages.lib.analysis.text_features import RANKERS
from stages.lib.analysis.wording import percent

TELLING = 0.8  # share of pairs that one feature ranks right from which on the preference may be a matter of style
LONGEST = 2000  # characters of a text that its script is read from
NO_LETTERS = "none"


def one_feature_rankers(pairs: pd.DataFrame, confidence: float) -> dict[str, Interval]:
    """Of each of text_features.RANKERS the share of pairs that it ranks right, the most telling first.

    Below 1/2 it is telling too: the preferred answer then has less of it.

    Args:
        pairs: prompt_id, chosen, rejected.
    """
    table = {"prompt_id": pairs["prompt_id"]}
    for name, feature in RANKERS.items():
        for side in ("chosen", "rejected"):
            table[f"{side}_{name}"] = pairs[side].map(feature).astype(float)
    found = {name: accuracy(pd.DataFrame(table), name, confidence) for name in RANKERS}
    return dict(sorted(found.items(), key=lambda item: -abs(item[1].mean - 0.5)))


def in_words(rankers: dict[str, Interval]) -> str:
    """What the most telling ranker says of the preference."""
    name, share = next(iter(rankers.items()))
    feature, less = RANKER_LABELS[name], share.mean < 0.5
    if less:
        low, high = (None if end is None else 1 - end for end in (share.high, share.low))
        share = Interval(1 - share.mean, low, high)
    how = f"Counting {feature} alone" if name != "no_ai_phrase" else f"Looking for {feature} alone"
    sentence = f"{how}{', fewer being better,' if less else ''} ranks {percent(share)} of the pairs right"
    if share.low is None:
        return f"{sentence}."
    if share.low >= TELLING:
        return f"{sentence}: your preference may be a matter of style, and a high accuracy proves little."
    if share.low > 0.5:
        return f"{sentence}: an accuracy means something as far as it lies above that."
    return f"{sentence}, which is not clearly more than guessing."


def script_of(text: str) -> str:
    """The script of most of its letters, by the names of Unicode: Latin, Cyrillic, Cjk, Arabic, ...; 'none' without."""
    letters = (unicodedata.name(character, "") for character in text[:LONGEST] if character.isalpha())
    counts = Counter(name.split()[0].split("-")[0].capitalize() for name in letters if name)
    return counts.most_common(1)[0][0] if counts else NO_LETTERS


def scripts(pairs: pd.DataFrame) -> dict[str, int]:
    """How many pairs have their chosen answer in each script, the most frequent first."""
    counts = Counter(map(script_of, pairs["chosen"]))
    return dict(counts.most_common())


def repeated_prompts(prompt_ids: Sequence[int]) -> dict[str, int]:
    """How many prompts there are, how many of them have several pairs, and the most that one has."""
    counts = Counter(prompt_ids)
    return {
        "prompts": len(counts),
        "with_several_pairs": sum(count > 1 for count in counts.values()),
        "most_pairs": max(counts.values()),
    }
