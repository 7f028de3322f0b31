"""The scorecard: every measure of every model's answers, beside the base's and the data's preferred answers."""

from typing import cast

import numpy as np
import pandas as pd

from stages.lib.analysis.measures import DISTINCT, MEANS, SHARES, change, level, values_of
from stages.lib.analysis.preference import comparisons, length_controlled_win_rate, win_rate
from stages.lib.analysis.stats import Interval, Resampling, percentiles_of_mean

CHOSEN = "chosen"  # the data's preferred answers, as a model among the others
DECODING_OF = {CHOSEN: "data"}
RANGE = (5.0, 95.0)  # percentiles of the preferred answers' mean over resampled prompts: the range to aim for
RANGED = ("tokens", "emoji", "ended")


def scorecard(answers: pd.DataFrame, opponents: pd.DataFrame, how: Resampling) -> list[dict]:
    """Rows of model, decoding, measure, mean, low, high, change, change_low, change_high.

    The measures of measures.py, and how often the judge prefers the answer to the base's of the same decoding (of
    the preferred answers: to its sampled ones): win_rate as it is, win_rate_lc at equal length, win_rate_same_end
    over the comparisons where both ended by themselves or both were cut; without a row where none is such. Empty
    are the changes of the base and of the preferred answers, and the ends of an interval where one prompt allows none.

    Args:
        answers: a row per answer as in measures.py, at most one per model, decoding and prompt; the base's among
            them for every prompt that another model answered in that decoding.
        opponents: further sampled answers of the base to these prompts, any number of rows; each sampled answer is
            compared with them too.
    """
    groups = {
        cast(tuple[str, str], key): group.sort_values("prompt_id", ignore_index=True)
        for key, group in answers.groupby(["model", "decoding"], sort=False)
    }
    rows = []
    for (model, decoding), group in groups.items():
        base = groups["base", "sampled" if model == CHOSEN else decoding]
        against = base if decoding == "greedy" else pd.concat([base, opponents], ignore_index=True)
        for measure in (*MEANS, *SHARES, DISTINCT):
            if (found := level(group, measure, how)) is None:
                continue
            changed = None if model in ("base", CHOSEN) else change(group, base, measure, how)
            rows.append(_row(model, decoding, measure, found, changed))
        if model != "base":
            rows += [
                _row(model, decoding, measure, found)
                for measure, found in preferences(group, against, how.confidence).items()
                if found is not None
            ]
    return rows


def preferences(answers: pd.DataFrame, base: pd.DataFrame, confidence: float) -> dict[str, Interval | None]:
    """win_rate, win_rate_lc and win_rate_same_end of answers over the base's, one or more, to the same prompts.

    The judge prefers an answer that ended to one that was cut; the last of the three leaves that out. It is None
    where no prompt has two answers of the same end.
    """
    both = comparisons(answers, base)
    prompts, won = both["prompt_id"].to_numpy(), both["won"].to_numpy()
    longer = both["response_ids"].map(len) - both["response_ids_base"].map(len)
    same_end = (both["ended"] == both["ended_base"]).to_numpy()
    return {
        "win_rate": win_rate(won, prompts, confidence),
        "win_rate_lc": length_controlled_win_rate(won, longer, prompts, confidence),
        "win_rate_same_end": win_rate(won[same_end], prompts[same_end], confidence) if same_end.any() else None,
    }


def preferred_ranges(answers: pd.DataFrame, how: Resampling) -> dict[str, tuple[float, float]]:
    """Of each measure in RANGED: the percentiles RANGE of the preferred answers' mean over resampled prompts."""
    chosen = answers.loc[answers["model"] == CHOSEN]
    values = {measure: cast(np.ndarray, values_of(chosen, measure)) for measure in RANGED}
    return {
        measure: percentiles_of_mean(found, chosen["prompt_id"], RANGE, how.samples, how.seed)
        for measure, found in values.items()
    }


def _row(model: str, decoding: str, measure: str, found: Interval, changed: Interval | None = None) -> dict:
    row = {"model": model, "decoding": decoding, "measure": measure}
    row |= {"mean": found.mean, "low": found.low, "high": found.high}
    no_change = dict.fromkeys(("change", "change_low", "change_high"))
    return row | (changed.as_metrics("change") if changed else no_change)
