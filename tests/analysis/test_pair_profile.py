"""What a set of pairs is like, against counts by hand."""

import pandas as pd
import pytest

from stages.lib.analysis.pair_profile import in_words, one_feature_rankers, repeated_prompts, script_of, scripts
from stages.lib.analysis.stats import Interval


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("Hello, 42!", "Latin"), ("Привет, world", "Cyrillic"), ("日本語のテキスト", "Cjk"), ("한국어", "Hangul"),
        ("שלום", "Hebrew"), ("你好 hi", "Cjk"), ("Ελλάδα", "Greek"), ("42 🙂 ?!", "none"), ("", "none"),
    ],
)  # fmt: skip
def test_scripts_are_those_of_most_letters(text, script):
    # of the Japanese text 3 letters are Han, 1 Hiragana, 4 Katakana; 日本語のテキスト
    assert script_of(text) == ("Katakana" if script == "Cjk" and "テ" in text else script)


def test_scripts_and_repeated_prompts_are_counted():
    assert scripts(pd.DataFrame({"chosen": ["a", "b", "я"]})) == {"Latin": 2, "Cyrillic": 1}
    assert repeated_prompts([0, 1, 1, 2, 2, 2]) == {"prompts": 3, "with_several_pairs": 2, "most_pairs": 3}


def test_rankers_by_hand():
    pairs = pd.DataFrame(
        {"prompt_id": range(4), "chosen": ["a?", "b?", "c?", "d"], "rejected": ["a!", "b!", "c!", "d!"]}
    )
    found = one_feature_rankers(pairs, 0.95)
    assert found["exclamation_marks"].mean == 0.0  # always more of it in the rejected one
    assert found["question_marks"].mean == 0.875  # three right, a tie counts half
    assert found["length_in_words"].mean == 0.5
    assert list(found)[:2] == ["exclamation_marks", "question_marks"]


@pytest.mark.parametrize(
    ("share", "words"),
    [
        (Interval(0.99, 0.98, 0.99), "question marks alone ranks 99 % [98, 99] of the pairs right: your pref"),
        (Interval(0.03, 0.02, 0.05), "alone, fewer being better, ranks 97 % [95, 98] of the pairs right: your pref"),
        (Interval(0.66, 0.6, 0.7), "66 % [60, 70] of the pairs right: an accuracy means something as far as it lies"),
        (Interval(0.55, 0.45, 0.65), "not clearly more than guessing"),
        (Interval(1.0, None, None), "ranks 100 % of the pairs right."),
    ],
)  # fmt: skip
def test_the_sentence_follows_the_number(share, words):
    assert words in in_words({"question_marks": share, "emoji": Interval(0.5, 0.4, 0.6)})
