"""How well something ranks held-out pairs: implicit rewards, scores, and counting one feature, side by side.

A ranker X is two columns of one table of pairs, chosen_X and rejected_X: it takes the higher value for the chosen.
"""

import numpy as np
import pandas as pd

from stages.lib.analysis.stats import Interval, Resampling, rank_correlation_interval, share_interval
from stages.lib.analysis.text_features import RANKERS
from stages.lib.model.ranked_right import ranked_right


def heldout_table(texts: pd.DataFrame, words: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """All rankers of the held-out pairs.

    Args:
        texts: a row per text: group, row, prompt_id, tokens, per-token log-probs under base, dpo and ppo.
        words: the pairs as text: row, chosen, rejected.
        scores: the reward model's: row, chosen_score, rejected_score; pairs it left out stay without.

    Returns:
        A row per pair: row, prompt_id, and chosen_X, rejected_X for X in tokens, base_log_prob (per token), dpo
        and ppo (implicit reward, up to the factor beta: change of the summed log-prob), reward_model, and each
        of text_features.RANKERS.
    """
    sides = []
    for side in ("chosen", "rejected"):
        part = texts[texts["group"] == f"heldout_{side}"].set_index("row")
        columns = {"tokens": part["tokens"], "base_log_prob": part["base"]}
        columns |= {model: (part[model] - part["base"]) * part["tokens"] for model in ("dpo", "ppo")}
        columns["reward_model"] = scores.set_index("row")[f"{side}_score"].reindex(part.index)
        text = words.set_index("row")[side].reindex(part.index)
        columns |= {name: text.map(feature).astype(float) for name, feature in RANKERS.items()}
        sides.append(pd.DataFrame(columns).add_prefix(f"{side}_"))
    prompt_ids = texts[texts["group"] == "heldout_chosen"].set_index("row")["prompt_id"].astype(np.int64)
    return pd.concat([prompt_ids, *sides], axis=1).reset_index()


def estimates(pairs: pd.DataFrame, how: Resampling) -> dict[str, dict[str, Interval]]:
    """What metrics.json says about rankings: of dpo, ppo and reward_model, and of each feature under rankers."""
    found = {}
    for name in ("dpo", "ppo"):
        found[name] = {
            "rewards/accuracies": accuracy(pairs, name, how.confidence),
            "score_agreement": agreement(pairs, name, "reward_model", how.confidence),
            "score_correlation": margin_correlation(pairs, name, "reward_model", how),
            "length_correlation": length_correlation(pairs, name, how),
        }
    found["reward_model"] = {
        "accuracy": accuracy(pairs, "reward_model", how.confidence),
        "length_correlation": length_correlation(pairs, "reward_model", how),
    }
    found["rankers"] = {name: accuracy(pairs, name, how.confidence) for name in (*RANKERS, "base_log_prob")}
    return found


def accuracy(pairs: pd.DataFrame, ranker: str, confidence: float) -> Interval:
    """Share of pairs ranked right, ties half."""
    pairs = _with(pairs, ranker)
    right = ranked_right(pairs[f"chosen_{ranker}"].to_numpy(), pairs[f"rejected_{ranker}"].to_numpy())
    return share_interval(right, pairs["prompt_id"], confidence)


def agreement(pairs: pd.DataFrame, first: str, second: str, confidence: float) -> Interval:
    """Share of pairs that two rankers order alike; a tie in either counts half."""
    pairs = _with(pairs, first, second)
    alike = np.sign(_margin(pairs, first)) * np.sign(_margin(pairs, second))
    return share_interval((alike + 1) / 2, pairs["prompt_id"], confidence)


def margin_correlation(pairs: pd.DataFrame, first: str, second: str, how: Resampling) -> Interval:
    """Rank correlation of two rankers' margins over the pairs."""
    pairs = _with(pairs, first, second)
    margins = _margin(pairs, first), _margin(pairs, second)
    return rank_correlation_interval(*margins, pairs["prompt_id"], **vars(how))


def length_correlation(pairs: pd.DataFrame, ranker: str, how: Resampling) -> Interval:
    """Rank correlation of a ranker with length in tokens, over all chosen and rejected answers."""
    pairs = _with(pairs, ranker)
    values, tokens = (
        np.concatenate([pairs[f"chosen_{name}"], pairs[f"rejected_{name}"]]) for name in (ranker, "tokens")
    )
    return rank_correlation_interval(values, tokens, np.tile(pairs["prompt_id"], 2), **vars(how))


def _margin(pairs: pd.DataFrame, ranker: str) -> np.ndarray:
    return (pairs[f"chosen_{ranker}"] - pairs[f"rejected_{ranker}"]).to_numpy()


def _with(pairs: pd.DataFrame, *rankers: str) -> pd.DataFrame:
    """The pairs that every one of the rankers has a value for."""
    return pairs.dropna(subset=[f"{side}_{name}" for name in rankers for side in ("chosen", "rejected")])
