"""The scorecard's rows: what is compared with what, and the preferred answers' range."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binomtest

from stages.lib.analysis.scorecard import preferences, preferred_ranges, scorecard
from stages.lib.analysis.stats import Resampling
from tests.analysis.test_measures import answers

HOW = Resampling(samples=300, confidence=0.95, seed=0)
WORDS = "the cat sat on a mat while two dogs ran by the old red barn".split()


def one_of_each(count: int = 6) -> pd.DataFrame:
    """Answers of base, dpo and the data, DPO's one word longer and one better by the judge."""
    parts = []
    for model, longer in (("base", 0), ("dpo", 1)):
        for decoding in ("greedy", "sampled"):
            texts = [" ".join(WORDS[: i + 4 + longer]) for i in range(count)]
            ids = [[9] * len(text.split()) for text in texts]
            table = answers(texts, model=model, decoding=decoding, response_ids=ids, judge=1.0 + longer)
            table["objective"] = 0.5 if decoding == "sampled" else np.nan
            parts.append(table.sample(frac=1, random_state=longer))  # in no order
    preferred = answers(["Yes 🎉"] * 2 + ["No"] * 2, model="chosen", decoding="data", judge=[0.0, 1.0, 2.0, 3.0])
    missing = dict.fromkeys(("logp", "base_logp", "entropy", "objective"), np.nan)
    return pd.concat([*parts, preferred.assign(**missing)], ignore_index=True)


def test_every_model_and_decoding_has_its_measures():
    rows = pd.DataFrame(scorecard(one_of_each(), answers([])[:0], HOW))
    table = rows.set_index(["model", "decoding", "measure"]).sort_index()
    assert table.index.is_unique
    count = rows.groupby(["model", "decoding"]).size()
    assert (
        count["base", "sampled"] == 14 and count["base", "greedy"] == 11
    )  # greedy: no KL, no entropy, no objective
    assert count["dpo", "sampled"] == 17 and count["dpo", "greedy"] == 14  # and three win rates
    assert count["chosen", "data"] == 13  # nor log-probs under the base
    dpo = table.loc[("dpo", "sampled")]
    assert dpo.loc["tokens", ["mean", "change", "change_low", "change_high"]].tolist() == [7.5, 1, 1, 1]
    assert dpo.loc["win_rate", "mean"] == 1 and dpo.loc["win_rate", "low"] == pytest.approx(
        0.025 ** (1 / 6)
    )  # six of six
    assert 0.5 < dpo.loc["win_rate_lc", "mean"] < 1
    assert dpo.loc["kl", "mean"] == 4
    # the preferred answers against the base's sampled ones, scored 1: a loss, a tie, two wins
    assert table.loc[("chosen", "data", "win_rate"), "mean"] == 2.5 / 4
    assert table.loc[["base", "chosen"], ["change", "change_low", "change_high"]].isna().all(axis=None)


def test_the_range_is_of_the_mean_over_prompts():
    found = preferred_ranges(one_of_each(), HOW)
    assert found["tokens"] == (4, 4) and found["ended"] == (1, 1)
    assert found["emoji"] == (0, 1)  # of four answers two have one: 1/16 of resamples have none


def test_the_win_rate_among_answers_of_the_same_end():
    """Of eight prompts the model wins all three where it alone ended, and of five others two."""
    columns = {"prompt_id": range(8), "response_ids": [[9]] * 8}
    base = pd.DataFrame(columns).assign(judge=1.0, ended=[True] + [False] * 7)
    model = base.assign(ended=[True] * 4 + [False] * 4, judge=[2.0, 2, 2, 2, 2, 0, 0, 0])
    found = preferences(model, base, 0.95)
    assert found["win_rate"].mean == 5 / 8 and found["win_rate_same_end"].mean == 2 / 5
    exact = binomtest(2, 5).proportion_ci(0.95, method="exact")
    assert (found["win_rate_same_end"].low, found["win_rate_same_end"].high) == pytest.approx(
        (exact.low, exact.high)
    )
    assert preferences(model.assign(ended=True), base.assign(ended=False), 0.95)["win_rate_same_end"] is None


def test_every_sampled_answer_meets_all_of_the_bases():
    """Six prompts, three more answers of the base to each, of which the judge likes one better than all others."""
    found = one_of_each()
    base = found[(found["model"] == "base") & (found["decoding"] == "sampled")]
    further = pd.concat([base.assign(judge=judge) for judge in (9.0, 0.0, 0.0)])
    table = pd.DataFrame(scorecard(found, further, HOW)).set_index(["model", "decoding", "measure"])["mean"]
    assert table["dpo", "sampled", "win_rate"] == 3 / 4
    assert table["dpo", "greedy", "win_rate"] == 1  # against the one greedy answer
    assert table["chosen", "data", "win_rate"] == (2.5 + 0 + 3.5 + 3.5) / 16  # scored 0 to 3: a tie with 0 twice
    assert table["base", "sampled", "score"] == base["score"].mean()  # only opponents
