"""The one tie rule: whether a pair is ranked right, where a tie is worth a coin."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np


def ranked_right(better: Any, worse: Any) -> Any:
    """1 where `better` has the higher value, 1/2 where both have the same, 0 elsewhere, and where one is not a number.

    Args:
        better, worse: what ranks the two sides of each pair; tensors or arrays, alike in shape.

    Returns:
        Floats of that shape; of tensors float32.
    """
    return (better > worse) + 0.5 * (better == worse)


def shares_by_kind(better: Any, worse: Any, kinds: Sequence[str]) -> dict[str, float]:
    """The share of pairs ranked right by kind of corruption, in the order in which the kinds come first.

    Args:
        better, worse: (N,) as of `ranked_right`.
        kinds: N names.
    """
    right, of_kind = np.asarray(ranked_right(better, worse), float), np.asarray(kinds)
    return {kind: float(right[of_kind == kind].mean()) for kind in dict.fromkeys(kinds)}


def told_by_kind(ranker: str, shares: dict[str, float]) -> Iterator[str]:
    """Lines for the terminal: the shares, and a warning for every kind that the ranker prefers to the better side."""
    if shares:
        listed = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
        yield f"the {ranker} prefers the better side of the held-out pairs made by each kind of corruption: {listed}"
    for kind, share in shares.items():
        if share < 0.5:
            yield (
                f"warning: the {ranker} prefers the worse side of the held-out pairs made by '{kind}' in "
                f"{1 - share:.0%} of cases"
            )
