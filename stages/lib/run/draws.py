"""Drawing some of many by seed."""

from collections.abc import Sequence

import numpy as np


def draw(total: int, count: int | None, seed: int | Sequence[int]) -> list[int]:
    """Which `count` of `total` items to take: indices in ascending order, the same for the same seed.

    All of them where there are no more than `count`, or `count` is None.
    """
    if count is None or count >= total:
        return list(range(total))
    return sorted(np.random.default_rng(seed).choice(total, count, replace=False).tolist())
