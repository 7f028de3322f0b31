"""Surface features of a text: what a reward can be chased with instead of being earned."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import emoji

from stages.lib.data.repetition import words_of

# "as an AI", "I am a language model", "being an artificial intelligence", "as a virtual assistant", ...
_MACHINE = (
    r"(?:AI\b|(?:large\s+)?language\s+model|artificial\s+(?:intelligence|agent|system)|chat\s*bot"
    r"|software\s+(?:system|program)|computer\s+program|machine\s+learning\s+model"
    r"|(?:digital|virtual|automated|online|AI|text-based)\s+assistant)"
)
_AI_PHRASE = re.compile(
    rf"\b(?:as|being|I\s+am|I['’]m|I\s+am\s+(?:just|only)|I['’]m\s+(?:just|only))"
    rf"\s+(?:an?|just\s+an?|only\s+an?)\s+(?:[\w-]+\s+){{0,2}}?{_MACHINE}",
    re.IGNORECASE,
)


def count_questions(text: str) -> int:
    """Question marks, full-width ones included."""
    return text.count("?") + text.count("？")


def count_exclamations(text: str) -> int:
    """Exclamation marks, full-width ones included."""
    return text.count("!") + text.count("！")


def count_emoji(text: str) -> int:
    """Emoji as seen on the screen: a flag, a hand in a skin tone or a family counts once.

    Signs of plain text that Unicode lets be pictures too (c, R and TM in their circles, arrows) count only where
    a variation selector asks for the picture. Emoji that Unicode does not join are seen, and counted, one by one.
    """
    return sum(map(_is_picture, emoji.emoji_list(text)))


def _is_picture(found: Mapping[str, Any]) -> bool:
    known = emoji.EMOJI_DATA.get(found["emoji"], {})  # a sequence of emoji that Unicode does not list has no entry
    return known.get("status") != emoji.STATUS["unqualified"] or found["emoji"] >= "\u2600"


def count_apostrophes(text: str) -> int:
    """Straight and curly apostrophes (contractions, mostly)."""
    return text.count("'") + text.count("’")


def count_words(text: str) -> int:
    """Words; "don't" is one."""
    return len(words_of(text))


def has_ai_phrase(text: str) -> bool:
    """Whether the text disclaims being human: "as an AI", "I'm just a language model", and the like."""
    return _AI_PHRASE.search(text) is not None


def bigram_counts(text: str) -> Counter[tuple[str, str]]:
    """How often each pair of neighbouring words occurs; case is ignored."""
    words = words_of(text)
    return Counter(zip(words, words[1:], strict=False))


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct word n-grams over all word n-grams of the texts together (arXiv:1510.03055, section 5.2).

    Case is ignored; n-grams do not cross from one text into the next. Longer texts score lower by nature.

    Returns:
        0 (one n-gram again and again) to 1 (none twice); 0 where no text has n words.
    """
    ngrams = []
    for text in texts:
        words = words_of(text)
        ngrams += zip(*(words[i:] for i in range(n)), strict=False)
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


# the one-feature rankers: higher is predicted to be the chosen completion
RANKERS: dict[str, Callable[[str], float]] = {
    "question_marks": count_questions,
    "exclamation_marks": count_exclamations,
    "emoji": count_emoji,
    "apostrophes": count_apostrophes,
    "length_in_words": count_words,
    "no_ai_phrase": lambda text: -float(has_ai_phrase(text)),
}
