"""Corrupted copies of a good answer, for preference models to learn that style alone is not quality.

Each kind is a function of its own: an answer and a random number generator in, a worse text out, or None where
this answer cannot be spoilt in that way (one word cannot be shuffled). They know no language: words lie between
spaces, and where there are none to speak of (Chinese, one long word) characters take their place.
"""

import re
from collections.abc import Callable, Iterable
from random import Random
from typing import NamedTuple

EMOJI = "😍🌻🍀💫🔥🐶🍕⭐🌟😊🎉✨🙌💜🚀"
DENSITIES = (0.1, 0.25, 0.5)  # of the words, where a kind strikes some of them
LONGEST_WORDS = 15  # characters a word on average, above which a text has no spaces to speak of
SENTENCE = re.compile(r".+?(?:[.!?…。！？।؟]+[^\w\s]*(?=\s|$)|[。！？]+|\n+|$)\s*", re.DOTALL)
OPEN_END = re.compile(r"[\w,;:'’、，-]$")


class Answer(NamedTuple):
    """A chosen answer and what else a corruption may draw on."""

    text: str
    prompt: str
    other: str | None  # the chosen answer to another prompt; None: there is no other


Corruption = Callable[[Answer, Random], str | None]


def pieces_of(text: str) -> tuple[list[str], list[str]]:
    """Words and the gap after each (the last one's is empty); characters without gaps where words are too long."""
    words = re.findall(r"\S+", text)
    if len(words) < 2 or sum(map(len, words)) > LONGEST_WORDS * len(words):
        characters = list(text.strip())
        return characters, [""] * len(characters)
    return words, [*re.findall(r"\s+", text.strip()), ""]


def sentences_of(text: str) -> list[str]:
    """Its sentences, each with the space after it; joined they are the text."""
    return SENTENCE.findall(text.strip())


def _join(pieces: Iterable[str], gaps: Iterable[str]) -> str:
    return "".join(piece + gap for piece, gap in zip(pieces, gaps, strict=True)).strip()


def _some(count: int, random: Random) -> set[int]:
    """Places among `count`, each with one of the densities' chance, but at least one."""
    density = random.choice(DENSITIES)
    return {place for place in range(count) if random.random() < density} or {random.randrange(count)}


def loop(answer: Answer, random: Random) -> str | None:
    """From some place on a span of 3 to 10 words comes again and again, at least four times."""
    words, gaps = pieces_of(answer.text)
    size = min(len(words), random.randint(3, 10))
    start = random.randint(0, len(words) - size)
    gaps[-1] = " " if any(gaps) else ""
    looped = [word + gap for word, gap in zip(words, gaps, strict=True)][start : start + size]
    head = _join(words[:start], gaps[:start]) + (gaps[start - 1] if start else "")
    times = max(4, (len(words) - start) // size + 1)
    return (head + "".join(looped * times)).strip()


def emoji(answer: Answer, random: Random) -> str | None:
    """One to three emoji after a tenth, a quarter or half of the words."""
    words, gaps = pieces_of(answer.text)
    for place in _some(len(words), random):
        words[place] += " " + "".join(random.choices(EMOJI, k=random.randint(1, 3)))
    return _join(words, gaps)


def exclaim(answer: Answer, random: Random) -> str | None:
    """Exclamation and question marks after a tenth, a quarter or half of the words."""
    words, gaps = pieces_of(answer.text)
    for place in _some(len(words), random):
        words[place] += random.choice(("!", "!!", "!!!", "?", "???", "?!"))
    return _join(words, gaps)


def cut(answer: Answer, random: Random) -> str | None:
    """Its beginning, at most two thirds of it, never up to the end of a sentence."""
    words, gaps = pieces_of(answer.text)
    open_ends = [n for n in range(1, 2 * len(words) // 3 + 1) if OPEN_END.search(words[n - 1])]
    return _join(words[: (n := random.choice(open_ends))], gaps[:n]) if open_ends else None


def brief(answer: Answer, random: Random) -> str | None:
    """Its first sentences, not all of them: whole, but it says less."""
    return shortened(answer.text, random)


def shuffle(answer: Answer, random: Random) -> str | None:
    """All its words in another order."""
    words, gaps = pieces_of(answer.text)
    random.shuffle(words)
    return _join(words, gaps)


def repeat(answer: Answer, random: Random) -> str | None:
    """One of its sentences three to five times in a row."""
    sentences = sentences_of(answer.text)
    place = random.randrange(len(sentences))
    again = " ".join([sentences[place].strip()] * random.randint(3, 5))
    end = sentences[place][len(sentences[place].rstrip()) :]
    return "".join([*sentences[:place], again + end, *sentences[place + 1 :]]).strip()


def echo(answer: Answer, random: Random) -> str | None:
    """The prompt given back: alone, or in place of the first sentence."""
    rest = sentences_of(answer.text)[1:] if random.random() < 0.5 else []
    return " ".join([answer.prompt.strip(), "".join(rest)]).strip()


def other_prompt(answer: Answer, random: Random) -> str | None:
    """A good answer, to another prompt."""
    return answer.other


def doubled(answer: Answer, random: Random) -> str | None:
    """A tenth, a quarter or half of the words twice twice."""
    words, gaps = pieces_of(answer.text)
    between = " " if any(gaps) else ""
    for place in _some(len(words), random):
        words[place] += between + words[place]
    return _join(words, gaps)


def reversed_order(answer: Answer, random: Random) -> str | None:
    """Its sentences from the last to the first, one of them twice."""
    sentences = [sentence.strip() for sentence in sentences_of(answer.text)]
    if len(sentences) < 2:
        return None
    place = random.randrange(len(sentences))
    return " ".join([*sentences[: place + 1], *sentences[place:]][::-1])


def letters(answer: Answer, random: Random) -> str | None:
    """A letter lacks in a tenth, a quarter or half of the words."""
    words, gaps = pieces_of(answer.text)
    long = [place for place, word in enumerate(words) if len(word) > 2]
    for place in (long[i] for i in _some(len(long), random)) if long else ():
        lost = random.randrange(len(words[place]))
        words[place] = words[place][:lost] + words[place][lost + 1 :]
    return _join(words, gaps)


def refrain(answer: Answer, random: Random) -> str | None:
    """Its first two to four words again after every five to eight."""
    words, gaps = pieces_of(answer.text)
    between = " " if any(gaps) else ""
    gaps[-1] = between
    first = _join(words[: (n := random.randint(2, 4))], gaps[:n]) + between
    step = random.randint(5, 8)
    parts = [_join(words[i : i + step], gaps[i : i + step]) + between for i in range(0, len(words), step)]
    return "".join(part + first for part in parts).strip()


def spliced(answer: Answer, random: Random) -> str | None:
    """Its first half with the second half of another prompt's answer."""
    if answer.other is None:
        return None
    (words, gaps), (others, other_gaps) = pieces_of(answer.text), pieces_of(answer.other)
    first, second = (len(words) + 1) // 2, len(others) // 2
    return f"{_join(words[:first], gaps[:first])} {_join(others[second:], other_gaps[second:])}".strip()


CORRUPTIONS: dict[str, Corruption] = {
    "loop": loop,
    "emoji": emoji,
    "exclaim": exclaim,
    "cut": cut,
    "brief": brief,
    "shuffle": shuffle,
    "repeat": repeat,
    "echo": echo,
    "other_prompt": other_prompt,
    "doubled": doubled,
    "reversed": reversed_order,
    "letters": letters,
    "refrain": refrain,
    "spliced": spliced,
}


def corrupt(kind: str, answer: Answer, seed: str) -> str | None:
    """A copy of the answer, corrupted in one of the ways above.

    Args:
        kind: a key of CORRUPTIONS.
        answer: its text has at least one visible character.
        seed: the same seed gives the same copy, whatever else is corrupted.

    Returns:
        A text that differs from the answer in more than spacing; None where the draw left it as it was, or the
        kind cannot spoil it.
    """
    text = CORRUPTIONS[kind](answer, Random(f"{kind} {seed}"))
    return text if text and text.split() != answer.text.split() else None


def shortened(text: str, random: Random) -> str | None:
    """A whole but short answer: its first sentences, not all of them; None where it has but one."""
    sentences = sentences_of(text)
    return "".join(sentences[: random.randint(1, len(sentences) - 1)]).strip() if len(sentences) > 1 else None
