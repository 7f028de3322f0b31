"""Surface features against texts counted by eye, and the embedded pairs' known shortcuts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.analysis import text_features as tf


@pytest.mark.parametrize(
    ("text", "emoji"),
    [
        ("", 0),
        ("plain text, 3 * 4 = 12 # © ® ™ → ok", 0),
        ("coffee ☕ and 🎉🎉", 3),
        ("heart ❤️", 1),
        ("waving 👋🏽", 1),
        ("family 👨‍👩‍👧‍👦 and flag 🇫🇷🇯🇵", 3),
        ("shrug 🤷‍♀️", 1),
        ("keycap 1️⃣, and an arrow as a picture ↔️", 2),
        ("without a selector ❤", 1),
        ("tick ✓ and star ★ of plain text", 0),
        ("no such emoji, so two pictures: 🏠‍🌳", 2),
    ],
)
def test_count_emoji_counts_pictures_on_the_screen(text, emoji):
    assert tf.count_emoji(text) == emoji


def test_counts_of_punctuation_and_words():
    text = "Don't you think it’s odd?! Really? Yes - I do!"
    assert tf.count_questions(text) == 2
    assert tf.count_exclamations(text) == 2
    assert tf.count_apostrophes(text) == 2
    assert tf.count_words(text) == 9  # Don't you think it's odd Really Yes I do


@pytest.mark.parametrize(
    "text",
    [
        "As an AI, I do not sleep.",
        "as an artificial intelligence, I have no home",
        "I'm just a language model.",
        "I’m an AI",
        "As a large language model trained by someone, no.",
        "that, being an automated assistant, it cannot",
        "I must clarify that, as a professional artificial intelligence program, I do not",
        "I am a digital assistant and do not have children.",
    ],
)
def test_ai_phrases_are_found(text):
    assert tf.has_ai_phrase(text)


@pytest.mark.parametrize(
    "text",
    ["", "AI is a field of research.", "As a rule I said no.", "as an aid to memory", "I am a gardener."],
)
def test_ordinary_texts_have_no_ai_phrase(text):
    assert not tf.has_ai_phrase(text)


def test_distinct_2_worked_example():
    # bigrams: (a b) (b a) (a b) | (a b): two distinct of four; none crosses the texts
    assert tf.distinct_n(["a b A b", "a b"]) == 0.5
    assert tf.distinct_n(["one two three"]) == 1.0
    assert tf.distinct_n(["word", ""]) == 0.0
    assert tf.distinct_n(["a a a a"], n=1) == 0.25


@given(st.lists(st.text()), st.integers(1, 4))
def test_distinct_n_is_a_share(texts, n):
    assert 0.0 <= tf.distinct_n(texts, n) <= 1.0


def test_rankers_find_the_shortcuts_of_the_embedded_pairs(embedded_pairs):
    """Emoji and apostrophes rank every pair; '?' 83 % and AI phrases 63 %, ties counted half."""

    def accuracy(name):
        ranker = tf.RANKERS[name]
        margins = [ranker(row["chosen"]) - ranker(row["rejected"]) for row in embedded_pairs]
        return sum((margin > 0) + (margin == 0) / 2 for margin in margins) / len(margins)

    assert accuracy("emoji") == 1.0
    assert accuracy("apostrophes") == 1.0
    assert accuracy("question_marks") == pytest.approx(0.83, abs=0.005)
    assert accuracy("no_ai_phrase") == pytest.approx(0.63, abs=0.01)
