"""The generated answer says what the intervals say, and no more."""

import pytest

from stages.lib.analysis.answer import answer
from stages.lib.analysis.stats import Interval
from stages.lib.analysis.text_features import RANKERS
from stages.lib.analysis.wording import NO_DIFFERENCE, NO_FINDING
from tests.support.without_intervals import CLAIMS

COUNTS = {"train_pairs": 150, "met_pairs": 180, "heldout_pairs": 34, "unseen_texts": 160}


def estimates(**changed):
    """Nothing found anywhere, except for what is `changed` of DPO's."""
    level = {f"auc_{name}": Interval(0.52, 0.41, 0.63) for name in ("heldout", "unseen")}
    none = level | {
        name: Interval(0.001, -0.02, 0.02)
        for name in ("change_train_chosen", "change_heldout_chosen", "change_unseen", "did", "length_correlation")
    }
    none |= {
        "auc_change": Interval(0.5, 0.4, 0.6),
        "displaced_train": Interval(0.9, 0.84, 0.94),
        "displaced_heldout": Interval(0.85, 0.7, 0.94),
        "rewards/accuracies": Interval(0.97, 0.85, 0.99),
        "score_agreement": Interval(0.91, 0.77, 0.97),
    }
    return {
        "base": level,
        "dpo": none | changed,
        "ppo": none,
        "reward_model": {"accuracy": Interval(0.94, 0.81, 0.98)},
        "rankers": {name: Interval(0.6, 0.4, 0.7) for name in RANKERS} | {"emoji": Interval(1.0, 0.9, 1.0)},
    }


def dpo_paragraph(**changed):
    text = answer(estimates(**changed), COUNTS, 0.95)
    return next(part for part in text.split("\n\n") if part.startswith("**DPO.**"))


def test_intervals_that_cover_zero_find_no_difference():
    paragraph = dpo_paragraph()
    assert paragraph.count(NO_DIFFERENCE) == 4
    for claim in ("more likely than under", "less likely than under", "raised its own", "gained"):
        assert claim not in paragraph


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        (
            {"change_train_chosen": Interval(-0.5, -0.6, -0.4)},
            "less likely than under the base (−0.500 [−0.600, −0.400])",
        ),
        (
            {"change_train_chosen": Interval(0.5, 0.4, 0.6)},
            "more likely than under the base (+0.500 [+0.400, +0.600])",
        ),
        ({"did": Interval(0.1, 0.05, 0.15)}, "+0.100 [+0.050, +0.150]: training raised its own texts above"),
        ({"did": Interval(-0.1, -0.15, -0.05)}, "training's own texts gained less"),
        (
            {"auc_heldout": Interval(0.7, 0.6, 0.8)},
            "0.70 [0.60, 0.80], 0.52 [0.41, 0.63] under the base: training",
        ),
        (
            {"auc_change": Interval(0.3, 0.2, 0.4)},
            "by the change alone 0.30 [0.20, 0.40]: training texts gained less",
        ),
    ],
)
def test_intervals_that_exclude_zero_are_told_with_their_direction(changed, sentence):
    paragraph = dpo_paragraph(**changed)
    assert sentence in paragraph
    assert paragraph.count(NO_DIFFERENCE) == 3


@pytest.mark.parametrize(
    ("emoji", "sentence"),
    [
        (Interval(1.0, 0.9, 1.0), "emoji, reaches 100 % [90, 100]: at least as good"),
        (Interval(0.9, 0.8, 0.96), "emoji, reaches 90 % [80, 96]: so close"),
        (Interval(0.7, 0.5, 0.8), "emoji, reaches 70 % [50, 80]: clearly less"),
    ],
)
def test_accuracies_are_held_against_the_best_single_feature(emoji, sentence):
    found = estimates()
    found["rankers"]["emoji"] = emoji
    assert sentence in answer(found, COUNTS, 0.95)


def test_one_prompt_gives_numbers_without_intervals_and_no_claims():
    lone = {key: {k: Interval(v.mean, None, None) for k, v in part.items()} for key, part in estimates().items()}
    text = answer(lone, COUNTS, 0.95)
    assert "[" not in text.split("brackets hold")[1]
    # four estimates of either model, DPO's correlation with length, and its accuracy beside the best feature's
    assert text.count(NO_FINDING) == 10
    assert not [claim for claim in CLAIMS if claim in text]


def test_bold_is_the_only_markup():
    text = answer(estimates(), COUNTS, 0.9)
    assert text.count("**") == 8
    assert not set("_`<>|#*\\") & set(text.replace("**", ""))
    assert "90 % intervals" in text
