"""The one tie rule: whether a pair is ranked right, where a tie is worth a coin."""

from typing import Any


def ranked_right(better: Any, worse: Any) -> Any:
    """1 where `better` has the higher value, 1/2 where both have the same, 0 elsewhere, and where one is not a number.

    Args:
        better, worse: what ranks the two sides of each pair; tensors or arrays, alike in shape.

    Returns:
        Floats of that shape; of tensors float32.
    """
    return (better > worse) + 0.5 * (better == worse)
