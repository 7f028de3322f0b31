"""Does a model find its training texts more likely? Levels, changes, AUC and the difference in differences.

Everything is computed from one table with a row per text: group, row, prompt_id (missing for unseen texts),
tokens, and a column of per-token log-probs (nats) for each of base, dpo and ppo.
"""

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import ArrayLike

from stages.lib.analysis.stats import (
    Interval,
    Resampling,
    auc_interval,
    difference_interval,
    mean_interval,
    share_interval,
)

GROUPS = ("train_chosen", "train_rejected", "heldout_chosen", "heldout_rejected", "unseen")


def clusters(texts: pd.DataFrame) -> np.ndarray:
    """What is resampled together: texts of one prompt; an unseen text, which has no prompt_id, is its own."""
    return texts["prompt_id"].fillna(-1 - texts["row"]).to_numpy(np.int64)


def levels(texts: pd.DataFrame, model: str, how: Resampling) -> dict[str, Interval]:
    """Mean per-token log-prob of each group (nats), and AUC of training's chosen texts by it.

    Returns:
        logp_<group>; auc_heldout and auc_unseen: the probability that a training text is likelier than a text
        of the other kind. Far from 1/2 before any training says only that the kinds differ.
    """
    found = {f"logp_{group}": _mean(part[model], part, how) for group, part in _groups(texts)}
    train = texts.loc[texts["group"] == "train_chosen"]
    for name, group in (("heldout", "heldout_chosen"), ("unseen", "unseen")):
        other = texts.loc[texts["group"] == group]
        found[f"auc_{name}"] = auc_interval(
            train[model], other[model], clusters(train), clusters(other), **vars(how)
        )
    return found


def changes(texts: pd.DataFrame, model: str, how: Resampling) -> dict[str, Interval]:
    """How the per-token log-probs moved from base to `model`.

    Returns:
        change_<group>: mean (nats per token). did, did_unseen: the change of training's chosen texts less that of
        the held-out chosen (the unseen) ones; since each text is compared with itself, what the kinds differ in
        from the start drops out, and what training adds to its own texts remains. auc_change: the probability
        that a training text gained more than a held-out one.
    """
    change = texts[model] - texts["base"]
    found = {f"change_{group}": _mean(change[part.index], part, how) for group, part in _groups(texts)}
    train = texts.loc[texts["group"] == "train_chosen"]
    for name, group in (("did", "heldout_chosen"), ("did_unseen", "unseen")):
        other = texts.loc[texts["group"] == group]
        both = (change[train.index], change[other.index], clusters(train), clusters(other))
        found[name] = difference_interval(*both, **vars(how))
        if group == "heldout_chosen":
            found["auc_change"] = auc_interval(*both, **vars(how))
    return found


def displacement(texts: pd.DataFrame, model: str, confidence: float) -> dict[str, Interval]:
    """Share of training and held-out pairs whose chosen text lost log-prob (arXiv:2410.08847)."""
    found = {}
    for split in ("train", "heldout"):
        chosen = texts.loc[texts["group"] == f"{split}_chosen"]
        fell = chosen[model] < chosen["base"]
        found[f"displaced_{split}"] = share_interval(fell, clusters(chosen), confidence)
    return found


def pair_changes(texts: pd.DataFrame) -> pd.DataFrame:
    """The changes of both answers' summed log-prob from base (nats), a row per pair.

    Returns:
        split (train, heldout), row, and dpo/chosen, dpo/rejected, ppo/chosen, ppo/rejected.
    """
    tables = []
    for split in ("train", "heldout"):
        columns = {}
        for model in ("dpo", "ppo"):
            for side in ("chosen", "rejected"):
                part = texts.loc[texts["group"] == f"{split}_{side}"].set_index("row")
                columns[f"{model}/{side}"] = (part[model] - part["base"]) * part["tokens"]
        table = pd.DataFrame(columns).reset_index()
        table.insert(0, "split", split)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def change_quantiles(texts: pd.DataFrame) -> pd.DataFrame:
    """Quantiles of the change of per-token log-prob from base.

    Returns:
        share (0.01 to 0.99), and a column <model>/<group> for each trained model and group.
    """
    shares = np.arange(1, 100) / 100
    columns = {"share": shares}
    for model in ("dpo", "ppo"):
        for group, part in _groups(texts):
            columns[f"{model}/{group}"] = np.quantile(part[model] - part["base"], shares)
    return pd.DataFrame(columns)


def tidy(texts: pd.DataFrame) -> dict[str, pa.Array]:
    """A row per model and text: model, group, row, prompt_id, tokens, logp (summed, nats), logp_per_token."""
    keys = ["group", "row", "prompt_id", "tokens"]
    table = texts.melt(keys, ["base", "dpo", "ppo"], "model", "logp_per_token")
    logps = table["logp_per_token"].to_numpy(float)
    return {
        "model": pa.array(table["model"].tolist()),
        "group": pa.array(table["group"].tolist()),
        "row": pa.array(table["row"].tolist(), pa.int64()),
        "prompt_id": pa.array([None if pd.isna(i) else int(i) for i in table["prompt_id"]], pa.int64()),
        "tokens": pa.array(table["tokens"].tolist(), pa.int64()),
        "logp": pa.array(logps * table["tokens"].to_numpy(float), pa.float32()),
        "logp_per_token": pa.array(logps, pa.float32()),
    }


def _groups(texts: pd.DataFrame):
    for group in GROUPS:
        yield group, texts.loc[texts["group"] == group]


def _mean(values: ArrayLike, part: pd.DataFrame, how: Resampling) -> Interval:
    return mean_interval(values, clusters(part), **vars(how))
