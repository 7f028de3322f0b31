"""Style and fluency of answers, and how they changed from one model to another on the same prompts."""

import numpy as np

from stages.lib.analysis.stats import mean_interval, share_change_interval, share_interval
from stages.lib.analysis.text_features import (
    count_emoji,
    count_exclamations,
    count_questions,
    distinct_n,
    has_ai_phrase,
)
from stages.lib.model.generate import Answer

CONFIDENCE = 0.95
SAMPLES = 1000  # bootstrap resamples of prompts
SHARES = ("asks_back", "disclaimer", "ended")  # each 0 or 1 per answer


def measures(answers: list[Answer], base_logps: np.ndarray) -> dict[str, np.ndarray]:
    """Each measure of each answer.

    Args:
        base_logps: (N,) summed log-prob of each answer under the base, nats.

    Returns:
        (N,) per measure: emoji, exclamations (counts), asks_back (has a question mark), disclaimer (an "as an
        AI" phrase), tokens, ended (by EOS), distinct_2 (within the answer), base_logp_per_token (nats).
    """
    texts = [answer.text for answer in answers]
    tokens = np.array([len(answer.ids) for answer in answers], float)
    return {
        "emoji": np.array([count_emoji(text) for text in texts], float),
        "exclamations": np.array([count_exclamations(text) for text in texts], float),
        "asks_back": np.array([count_questions(text) > 0 for text in texts], float),
        "disclaimer": np.array([has_ai_phrase(text) for text in texts], float),
        "tokens": tokens,
        "ended": np.array([answer.ended for answer in answers], float),
        "distinct_2": np.array([distinct_n([text], 2) for text in texts]),
        "base_logp_per_token": np.asarray(base_logps, float) / tokens,
    }


def comparison(measured: dict[tuple[str, str], dict[str, np.ndarray]], seed: int) -> list[dict]:
    """Every measure of every model's answers with its interval, and its change from the base's, prompt by prompt.

    Args:
        measured: `measures` by model and decoding; the base among the models, all on the same prompts.

    Returns:
        Rows of model, decoding, measure, mean, low, high, change, change_low, change_high (None for the base
        itself, and where a single prompt allows no interval).
    """
    rows = []
    for (model, decoding), table in measured.items():
        for measure, values in table.items():
            before = measured["base", decoding][measure]
            if measure in SHARES:
                level = share_interval(values, None, CONFIDENCE)
                change = share_change_interval(before, values, CONFIDENCE)
            else:
                level = mean_interval(values, None, SAMPLES, CONFIDENCE, seed)
                change = mean_interval(values - before, None, SAMPLES, CONFIDENCE, seed)
            row = {"model": model, "decoding": decoding, "measure": measure}
            row |= {"mean": level.mean, "low": level.low, "high": level.high}
            changes = change.as_metrics("change")
            rows.append(row | (dict.fromkeys(changes) if model == "base" else changes))
    return rows
