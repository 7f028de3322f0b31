"""Repetition counted by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data.repetition import rep_n, words_of


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three four five", 0.0),  # two 4-grams, both new
        ("a b a b a b a b", 1 - 2 / 5),  # abab baba abab baba abab
        ("I'm a tree, and I'm a tree, and I'm a tree", 1 - 4 / 8),  # period of 4 words
        ("too short here", 0.0),
        ("", 0.0),
    ],
)
def test_rep_4_by_hand(text, expected):
    assert rep_n(text) == pytest.approx(expected)


def test_case_and_punctuation_do_not_hide_a_loop():
    assert words_of("Don't STOP, don’t") == ["don't", "stop", "don’t"]
    assert rep_n("Stop now! stop NOW? Stop, now") == pytest.approx(1 - 2 / 3)


@given(st.lists(st.sampled_from("abcdefgh"), min_size=4, max_size=30))
def test_looping_a_text_never_repeats_less(words):
    text = " ".join(words)
    assert 0 <= rep_n(text) <= rep_n(f"{text} {text}") < 1
