"""Each rule of the verdict at a worked case, the old default's recorded answers, and models that are the base."""

import json

import numpy as np
import pandas as pd
import pytest

from stages.lib.analysis.scorecard import preferred_ranges, scorecard
from stages.lib.analysis.stats import Resampling
from stages.lib.analysis.verdict import verdict
from stages.lib.analysis.wording import NO_FINDING
from stages.lib.data.repetition import words_of
from tests.conftest import REPO

RANGES = {"tokens": (88.0, 102.0), "emoji": (1.5, 2.1)}
BASE = {"rep_4": 0.2, "entropy": 1.5, "distinct_2": 0.6, "tokens": 95.0, "emoji": 0.03, "score": 0.0, "kl": 0.0}
FINE = BASE | {"kl": 5.0, "tokens": 92.0, "emoji": 1.7}


def card(now: dict[str, float], win_rate=(0.6, 0.55, 0.65), win_rate_lc=(0.6, 0.55, 0.65), base=BASE, half=0.02):
    """A scorecard whose changes have intervals of `half` of 1, or of the change where that is more, either way."""
    rows = []
    for decoding in ("greedy", "sampled"):
        for name, value in now.items():
            for model, mean in (("base", base[name]), ("dpo", value)):
                row = {"model": model, "decoding": decoding, "measure": name, "mean": mean}
                row |= {"low": mean - half, "high": mean + half}
                change = mean - base[name]
                spread = half * max(1, abs(change))
                ends = {"change": change, "change_low": change - spread, "change_high": change + spread}
                rows.append(row | (ends if model == "dpo" else dict.fromkeys(ends)))
    for name, (mean, low, high) in {"win_rate": win_rate, "win_rate_lc": win_rate_lc}.items():
        row = {"model": "dpo", "decoding": "sampled", "measure": name, "mean": mean, "low": low, "high": high}
        rows.append(row)
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("plain", "at_equal_length", "word"),
    [
        ((0.6, 0.55, 0.65), (0.58, 0.52, 0.64), "better"),
        ((0.6, 0.55, 0.65), (0.55, 0.49, 0.61), "no difference found"),  # longer answers explain it
        ((0.52, 0.46, 0.58), (0.6, 0.55, 0.65), "no difference found"),
        ((0.4, 0.35, 0.45), (0.4, 0.35, 0.45), "worse"),
        ((0.4, 0.35, 0.45), (0.45, 0.39, 0.51), "no difference found"),
    ],
)
def test_the_judge_decides_where_nothing_is_broken(plain, at_equal_length, word):
    found = verdict(card(FINE, plain, at_equal_length), "dpo", RANGES)
    assert found.word == word
    assert f"{100 * plain[0]:.0f} % [{100 * plain[1]:.0f}, {100 * plain[2]:.0f}]" in found.text
    assert "KL to the base 5.0 nats" in found.text


def test_what_the_judge_prefers_among_answers_of_the_same_end_is_said_and_decides_nothing():
    table = card(FINE)
    sentence = "in 60 % [55, 65], in 60 % [55, 65] at equal length"
    assert verdict(table, "dpo", RANGES).reasons[0].endswith(sentence)  # where no prompt is such
    row = {"model": "dpo", "decoding": "sampled", "measure": "win_rate_same_end"}
    row |= {"mean": 0.45, "low": 0.4, "high": 0.49}
    found = verdict(pd.concat([table, pd.DataFrame([row])], ignore_index=True), "dpo", RANGES)
    assert found.word == "better"
    assert found.reasons[0].endswith(f"{sentence}, in 45 % [40, 49] where both ended or both were cut")


def test_without_intervals_there_is_no_finding():
    lone = card(FINE | {"rep_4": 0.9, "tokens": 20.0, "score": 4.0}, (1.0, 0.025, 1.0), (0.8, None, None))
    lone[["change_low", "change_high"]] = None
    found = verdict(lone, "dpo", RANGES)
    assert found.word == NO_FINDING
    assert found.reasons[0].endswith("in 100 % [2, 100], in 80 % at equal length")


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        ({"rep_4": 0.36}, "loop (rep-4 0.36, the base's 0.20)"),
        ({"entropy": 0.4}, "entropy collapsed (0.40, the base's 1.50)"),
        ({"distinct_2": 0.1}, "distinct-2 collapsed"),
        ({"tokens": 25.0}, "25 tokens an answer (the preferred answers' 88 to 102, the base's 95)"),
        ({"tokens": 127.0}, "127 tokens"),
        ({"emoji": 6.3}, "6.30 emoji an answer (the preferred answers' 1.50 to 2.10, the base's 0.03)"),
    ],
)
def test_what_breaks_a_model_whatever_the_judge_says(now, reason):
    found = verdict(card(FINE | now), "dpo", RANGES)
    assert found.word == "broken" and len(found.reasons) == 1
    assert reason in found.text


@pytest.mark.parametrize(
    "now",
    [
        {"rep_4": 0.34},
        {"entropy": 0.6},
        {"distinct_2": 0.25},
        {"tokens": 66.0},  # below the range by 22, a quarter of whose middle is 23.75
        {"tokens": 124.0},
        {"emoji": 2.5},
        {"emoji": 0.0},  # too few break nothing
    ],
)
def test_what_does_not(now):
    assert verdict(card(FINE | now), "dpo", RANGES).word == "better"


def test_a_base_outside_the_range_excuses_what_is_hardly_further_out():
    base = BASE | {"tokens": 60.0}  # 28 below the range
    assert verdict(card(FINE | {"tokens": 37.0}, base=base), "dpo", RANGES).word == "better"
    assert verdict(card(FINE | {"tokens": 36.0}, base=base), "dpo", RANGES).word == "broken"
    assert verdict(card(FINE | {"tokens": 127.0}, base=base), "dpo", RANGES).word == "broken"  # the other side


def test_a_change_that_may_be_chance_breaks_nothing():
    unsure = card(FINE | {"rep_4": 0.5, "entropy": 0.3, "distinct_2": 0.1, "tokens": 25.0, "emoji": 6.0}, half=1.5)
    assert verdict(unsure, "dpo", RANGES).word == "better"


def test_score_up_and_judge_down_is_overoptimised():
    now = FINE | {"score": 4.0}
    assert verdict(card(now), "dpo", RANGES).word == "better"
    found = verdict(card(now, (0.4, 0.35, 0.45), (0.55, 0.5, 0.6)), "dpo", RANGES)
    assert found.word == "broken" and "overoptimised (the reward model's score up by 4.00" in found.text
    falling = card(FINE | {"score": -4.0}, (0.4, 0.35, 0.45), (0.4, 0.35, 0.45))
    assert verdict(falling, "dpo", RANGES).word == "worse"


def recorded(judge: dict[str, float]) -> pd.DataFrame:
    """Greedy and sampled answers of the base and of DPO at beta 1.0 and learning rate 5e-5, as once committed."""
    entries = json.loads((REPO / "tests/support/answers_of_dpo_beta_1.json").read_text(encoding="utf-8"))
    pairs = [json.loads(line) for line in (REPO / "data/pairs_embedded.jsonl").read_text("utf-8").splitlines()]
    chosen = {row["prompt"]: row["chosen"] for row in pairs}
    rows = []
    for entry in entries:
        for model in ("base", "dpo"):
            for decoding in ("greedy", "sampled"):
                rows.append({"model": model, "decoding": decoding, "prompt_id": entry["prompt_id"]})
                rows[-1] |= entry[model][decoding]
        rows.append({"model": "chosen", "decoding": "data", "prompt_id": entry["prompt_id"], "ended": True})
        rows[-1]["text"] = chosen[entry["prompt"]]
    table = pd.DataFrame(rows).assign(
        split="heldout", logp=-90.0, base_logp=-90.0, entropy=1.5, score=0.0, objective=0.0
    )
    table["response_ids"] = table["text"].map(words_of)  # words for tokens
    return table.assign(judge=table["model"].map(judge))


@pytest.mark.parametrize("judge", [{"base": 0, "dpo": 1, "chosen": 2}, {"base": 1, "dpo": 0, "chosen": 2}])
def test_the_old_default_is_broken_whatever_the_judge_says(judge):
    how = Resampling(samples=1000, confidence=0.95, seed=42)
    answers = recorded(judge)
    found = verdict(pd.DataFrame(scorecard(answers, answers[:0], how)), "dpo", preferred_ranges(answers, how))
    assert found.word == "broken"
    assert "greedy answers loop" in found.reasons[0]


@pytest.mark.parametrize(
    ("repeats", "errors"),
    # by chance one in twenty may differ: of 100 repeats more than 11 do so once in two hundred times
    [(100, 11), pytest.param(600, 30, marks=pytest.mark.slow)],
)
def test_a_model_that_is_the_base_shows_no_difference_in_95_percent(repeats, errors):
    """Answers drawn for both from the same recorded ones, with scores of the same distribution."""
    rng = np.random.default_rng(0)
    answers = recorded({"base": 0, "dpo": 0, "chosen": 0})
    pools = {d: answers[(answers["model"] == "base") & (answers["decoding"] == d)] for d in ("greedy", "sampled")}
    chosen = answers[answers["model"] == "chosen"]
    how = Resampling(samples=150, confidence=0.95, seed=1)
    ranges = preferred_ranges(chosen, how)
    words = []
    for _ in range(repeats):
        parts = []
        for model in ("base", "dpo"):
            for pool in pools.values():
                drawn = pool.sample(64, replace=True, random_state=int(rng.integers(2**32)))
                noise = {name: rng.normal(size=64) for name in ("score", "judge")}
                noise |= {"logp": rng.normal(-90, 2, 64), "entropy": rng.normal(1.5, 0.3, 64)}
                parts.append(drawn.assign(model=model, prompt_id=range(64), **noise))
        words.append(verdict(pd.DataFrame(scorecard(pd.concat(parts), answers[:0], how)), "dpo", ranges).word)
    assert repeats - words.count("no difference found") <= errors, words
