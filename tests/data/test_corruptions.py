"""Corruptions: properties over any text, and each kind on a sentence whose outcome can be said beforehand."""

from collections import Counter
from random import Random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from stages.lib.data.corruptions import CORRUPTIONS, EMOJI, Answer, corrupt, pieces_of, sentences_of, shortened

TEXT = "Oh, I love that! First you boil the water, then the egg goes in. Seven minutes, no more. And you?"
ANSWER = Answer(TEXT, "How do I boil an egg?", "Try the old bridge at dusk. It is quiet there, and free.")

visible = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=60)
texts = visible.filter(str.strip)
words = st.lists(st.text("abcdefgh", min_size=1, max_size=6), min_size=8, max_size=60, unique=True)
kinds = st.sampled_from(list(CORRUPTIONS))


def rep_4(text: str) -> float:
    """Share of word 4-grams that are repetitions of another."""
    split = text.split()
    grams = list(zip(*(split[i:] for i in range(4)), strict=False))
    return 1 - len(set(grams)) / len(grams)


@given(kind=kinds, text=texts, prompt=texts, other=st.none() | texts, seed=st.text(max_size=3))
def test_any_text_any_kind_seeded_and_never_the_answer_itself(kind, text, prompt, other, seed):
    answer = Answer(text, prompt, other)
    corrupted = corrupt(kind, answer, seed)
    assert corrupted == corrupt(kind, answer, seed)
    if corrupted is not None:
        assert corrupted.split() and corrupted.split() != text.split()


def test_other_seeds_give_other_copies():
    for kind in set(CORRUPTIONS) - {"other_prompt", "spliced", "echo", "reversed", "brief"}:
        assert len({corrupt(kind, ANSWER, str(seed)) for seed in range(20)}) > 5, kind


@given(words, st.integers(0, 99))
def test_a_loop_repeats_4_grams(words, seed):
    text = " ".join(words)
    looped = corrupt("loop", Answer(text, "p", None), str(seed))
    assert rep_4(text) == 0 and rep_4(looped) > 0.1


@given(words, st.sampled_from(["emoji", "exclaim"]), st.integers(0, 99))
def test_emoji_and_marks_come_on_top_of_the_words(words, kind, seed):
    text = " ".join(words)
    spoilt = corrupt(kind, Answer(text, "p", None), str(seed))
    marks = EMOJI if kind == "emoji" else "!?"
    count = sum(character in marks for character in spoilt)
    assert 1 <= count <= 3 * len(words)
    assert "".join(character for character in spoilt if character not in marks).split() == words


@given(texts, st.integers(0, 99))
def test_shuffling_keeps_every_word(text, seed):
    shuffled = corrupt("shuffle", Answer(text, "p", None), str(seed))
    if shuffled is not None and any(pieces_of(text)[1]):
        assert Counter(shuffled.split()) == Counter(text.split())


@given(texts, st.integers(0, 99))
def test_a_cut_answer_is_a_proper_beginning(text, seed):
    beginning = corrupt("cut", Answer(text, "p", None), str(seed))
    assert beginning is None or (text.strip().startswith(beginning) and len(beginning) < len(text.strip()))


def test_a_cut_never_ends_with_a_sentence():
    ends = {corrupt("cut", ANSWER, str(seed))[-1] for seed in range(100)}
    assert not ends & set(".!?") and len(ends) > 3


@given(texts, texts, st.integers(0, 99))
def test_an_answer_to_another_prompt_is_that_answer(text, other, seed):
    assert corrupt("other_prompt", Answer(text, "p", None), str(seed)) is None
    expected = other if other.split() != text.split() else None
    assert corrupt("other_prompt", Answer(text, "p", other), str(seed)) == expected


@given(words, st.integers(0, 99))
def test_doubled_words_stand_beside_themselves(words, seed):
    spoilt = corrupt("doubled", Answer(" ".join(words), "p", None), str(seed)).split()
    counts = Counter(spoilt)
    assert set(counts) == set(words) and set(counts.values()) <= {1, 2} and len(spoilt) > len(words)
    assert [word for i, word in enumerate(spoilt) if i == 0 or spoilt[i - 1] != word] == words


@given(words, st.integers(0, 99))
def test_lost_letters_leave_the_words_in_place(words, seed):
    spoilt = corrupt("letters", Answer(" ".join(words), "p", None), str(seed))
    assume(spoilt is not None)  # words of one or two letters keep theirs
    pairs = list(zip(words, spoilt.split(), strict=True))
    assert all(len(after) in (len(before) - 1, len(before)) for before, after in pairs)
    assert any(len(after) < len(before) for before, after in pairs)


def test_the_other_kinds_worked_by_hand():
    short = Answer("One two. Three four.", "Why?", "A b c d.")
    assert {corrupt("reversed", short, str(seed)) for seed in range(20)} == {
        "Three four. Three four. One two.",
        "Three four. One two. One two.",
    }
    assert {corrupt("echo", short, str(seed)) for seed in range(20)} == {"Why?", "Why? Three four."}
    assert corrupt("spliced", short, "") == "One two. c d."
    repeated = {corrupt("repeat", short, str(seed)) for seed in range(40)}
    assert repeated == {
        *("One two. " * times + "Three four." for times in (3, 4, 5)),
        *("One two. " + "Three four. " * (times - 1) + "Three four." for times in (3, 4, 5)),
    }
    assert {corrupt("brief", short, str(seed)) for seed in range(20)} == {"One two."}
    # after each group of five to eight words the first two to four again: here the text is one group
    assert {corrupt("refrain", short, str(seed)) for seed in range(40)} == {
        "One two. Three four. One two.",
        "One two. Three four. One two. Three",
        "One two. Three four. One two. Three four.",
    }


def test_a_text_without_spaces_is_spoilt_by_characters():
    answer = Answer("我昨天在公园里看到一只很大的狗,它在追自己的尾巴。", "你好吗?", "今天下雨了,我在家里看书。")
    made = {kind: corrupt(kind, answer, "1") for kind in CORRUPTIONS}
    # one sentence, and no word that could lack a letter
    assert {kind for kind, text in made.items() if text is None} == {"letters", "reversed", "brief"}
    assert Counter(made["shuffle"]) == Counter(answer.text)
    assert answer.text.startswith(made["cut"])


@pytest.mark.parametrize("text", ["Yes", "!", "👍", "a b"])
def test_the_shortest_texts_are_spoilt_or_left_out(text):
    made = {kind: corrupt(kind, Answer(text, "Really?", "No way."), "1") for kind in CORRUPTIONS}
    assert made["loop"] and made["emoji"] and made["other_prompt"] == "No way."
    assert made["reversed"] is None


@given(texts)
def test_sentences_joined_are_the_text(text):
    assert "".join(sentences_of(text)) == text.strip()


def test_sentences_and_short_whole_answers():
    assert [sentence.strip() for sentence in sentences_of("Hi! 🎉 It's 3.5 m, e.g. here. Ok?\nYes")] == [
        "Hi!",
        "🎉 It's 3.5 m, e.g.",
        "here.",
        "Ok?",
        "Yes",
    ]
    assert {shortened("A b. C d! E?", Random(seed)) for seed in range(20)} == {"A b.", "A b. C d!"}
    assert shortened("Only one.", Random(0)) is None
