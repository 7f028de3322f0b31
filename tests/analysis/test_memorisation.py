"""Planted effects in synthetic log-probs, and their absence."""

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from stages.lib.analysis.memorisation import (
    GROUPS,
    change_quantiles,
    changes,
    clusters,
    displacement,
    levels,
    pair_changes,
    tidy,
)
from stages.lib.analysis.stats import Resampling

HOW = Resampling(samples=1000, confidence=0.95, seed=0)


def synthetic(seed, memorised=0.0, style=-0.4):
    """Per-token log-probs from random logits over ten tokens: the model raises the realised tokens' logits.

    `style` is added to the mean log-prob of every pair's text alike, `memorised` to training's chosen ones alone.
    """
    rng = np.random.default_rng(seed)
    rows = []
    prompts = {"train": range(0, 150), "heldout": range(1000, 1034), "unseen": range(160)}
    for group in GROUPS:
        split = group.split("_")[0]
        for number, prompt in enumerate(prompts[split]):
            length = int(rng.integers(20, 60))
            logits = rng.normal(0, 1.5, (length, 10))
            base = log_softmax(logits, axis=1)[:, 0].mean()
            change = rng.normal(0, 0.15) + (style if split != "unseen" else 0.0)
            change += memorised if group == "train_chosen" else 0.0
            prompt_id = None if split == "unseen" else prompt
            rows.append((group, number, prompt_id, length, base, base + change, base))
    texts = pd.DataFrame(rows, columns=["group", "row", "prompt_id", "tokens", "base", "dpo", "ppo"])
    return texts.astype({"prompt_id": "Int64"})


def test_a_planted_effect_is_recovered():
    """What was planted lies in the interval in 95 % of repeats (of 100: 90 to 99), and zero never does."""
    planted = {
        "did": 0.2,
        "auc_change": norm.cdf(0.2 / (0.15 * np.sqrt(2))),
        "change_heldout_chosen": -0.4,
        "change_train_chosen": -0.2,
        "change_unseen": 0.0,
        "did_unseen": -0.2,
    }
    how = Resampling(samples=500, confidence=0.95, seed=0)
    found = [changes(synthetic(repeat, memorised=0.2), "dpo", how) for repeat in range(100)]
    for name, truth in planted.items():
        assert 90 <= sum(each[name].covers(truth) for each in found) <= 99, name
    assert not any(each["did"].covers(0.0) or each["auc_change"].covers(0.5) for each in found)


def test_a_shift_of_all_texts_is_not_memorising():
    """The level moved by 0.4 nats, yet neither the difference in differences nor the AUC sees a difference."""
    found = changes(synthetic(1), "dpo", HOW)
    assert not found["change_train_chosen"].covers(0.0)
    assert found["did"].covers(0.0)
    assert found["auc_change"].covers(0.5)


def test_without_an_effect_the_interval_covers_zero_in_95_percent_of_repeats():
    how = Resampling(samples=500, confidence=0.95, seed=0)
    found = [changes(synthetic(repeat), "dpo", how) for repeat in range(200)]
    assert 182 <= sum(each["did"].covers(0.0) for each in found) <= 198
    assert 182 <= sum(each["auc_change"].covers(0.5) for each in found) <= 198


def test_a_model_that_did_not_move_changed_nothing():
    found = changes(synthetic(2), "ppo", HOW)
    assert (found["did"].mean, found["did"].low, found["did"].high) == (0.0, 0.0, 0.0)
    assert found["auc_change"].mean == 0.5


def test_levels_are_group_means_and_scikit_learns_auc():
    texts = synthetic(3, memorised=0.3)
    found = levels(texts, "dpo", HOW)
    train, heldout, unseen = (
        texts.loc[texts["group"] == group, "dpo"] for group in ("train_chosen", "heldout_chosen", "unseen")
    )
    assert found["logp_train_chosen"].mean == pytest.approx(train.mean())
    for name, other in (("auc_heldout", heldout), ("auc_unseen", unseen)):
        labels = np.repeat([1, 0], [len(train), len(other)])
        expected = roc_auc_score(labels, np.concatenate([train, other]))
        assert found[name].mean == pytest.approx(expected)
        assert found[name].low < expected < found[name].high


def test_unseen_texts_are_clusters_of_their_own():
    texts = synthetic(4)
    labels = clusters(texts)
    unseen = texts["group"] == "unseen"
    assert len(set(labels[unseen])) == 160
    assert not set(labels[unseen]) & set(labels[~unseen])


def test_displacement_worked_example():
    texts = pd.DataFrame(
        {
            "group": ["train_chosen"] * 4 + ["heldout_chosen"] * 2,
            "row": [1, 2, 3, 4, 5, 6],
            "prompt_id": pd.array([1, 2, 3, 4, 5, 6], "Int64"),
            "base": [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0],
            "dpo": [-2.0, -1.5, -1.1, -0.5, -2.0, -0.9],
        }
    )
    found = displacement(texts, "dpo", 0.95)
    assert found["displaced_train"].mean == 0.75
    assert found["displaced_heldout"].mean == 0.5
    assert found["displaced_train"].low < 0.75 < found["displaced_train"].high


def test_pair_changes_are_summed_over_tokens():
    texts = pd.DataFrame(
        {
            "group": ["train_rejected", "train_chosen", "heldout_chosen", "heldout_rejected"],
            "row": [7, 7, 9, 9],
            "tokens": [10, 20, 5, 5],
            "base": [-1.0, -1.0, -2.0, -2.0],
            "dpo": [-3.0, -0.5, -2.0, -4.0],
            "ppo": [-1.0, -1.0, -2.0, -1.0],
        }
    )
    assert pair_changes(texts).to_dict("records") == [
        {"split": "train", "row": 7, "dpo/chosen": 10, "dpo/rejected": -20, "ppo/chosen": 0, "ppo/rejected": 0},
        {"split": "heldout", "row": 9, "dpo/chosen": 0, "dpo/rejected": -10, "ppo/chosen": 0, "ppo/rejected": 5},
    ]


def test_quantiles_rise_and_hold_the_median():
    texts = synthetic(5)
    table = change_quantiles(texts)
    assert table["share"].iloc[[0, 49, 98]].tolist() == pytest.approx([0.01, 0.5, 0.99])
    assert (table.diff().dropna() >= 0).all(axis=None)
    part = texts[texts["group"] == "unseen"]
    assert table["dpo/unseen"].iloc[49] == pytest.approx((part["dpo"] - part["base"]).median())


def test_tidy_has_a_row_per_model_and_text():
    texts = synthetic(6)
    table = pd.DataFrame({name: column.to_pylist() for name, column in tidy(texts).items()})
    assert len(table) == 3 * len(texts)
    assert table["prompt_id"].isna().sum() == 3 * 160
    assert np.allclose(table["logp"], table["logp_per_token"] * table["tokens"], rtol=1e-5)
