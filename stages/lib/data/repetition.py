"""How much a text repeats itself."""

import re

_WORD = re.compile(r"\w+(?:['’]\w+)*")


def words_of(text: str) -> list[str]:
    """Words in lower case; "don't" is one."""
    return _WORD.findall(text.lower())


def rep_n(text: str, n: int = 4) -> float:
    """Share of the text's word n-grams that it has already said: 1 - distinct / all.

    Returns:
        0 (no n-gram twice, or fewer than n words) to nearly 1 (one again and again).
    """
    words = words_of(text)
    ngrams = list(zip(*(words[i:] for i in range(n)), strict=False))
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
