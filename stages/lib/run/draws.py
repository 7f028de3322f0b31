"""Random choices by seed, each purpose from a stream of its own."""

import hashlib

import numpy as np

# The committed split and all that was trained on it hang on this stream, which is older than the names; a name
# added here could meet another's stream, one left to its hash cannot.
HELDOUT_PROMPTS = "heldout_prompts"


def generator(seed: int, purpose: str) -> np.random.Generator:
    """The random numbers of `purpose` under `seed` (0 to 2^32 - 1): no two pairs of both share a stream.

    The stream follows from the SHA-256 of the purpose, as NumPy's spawn key; only that of the held-out prompts is
    NumPy's `[seed, 1]`. Beware of NumPy's own lists: there `seed` and `[seed, 0]` are one stream.
    """
    if purpose == HELDOUT_PROMPTS:
        return np.random.default_rng([seed, 1])
    words = np.frombuffer(hashlib.sha256(purpose.encode()).digest(), dtype="<u4")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=words.tolist()))


def seed_of(seed: int, purpose: str) -> int:
    """A seed for another library's generator, which `purpose` under `seed` shares with no other but by chance."""
    return int(generator(seed, purpose).integers(2**32))


def draw(total: int, count: int | None, seed: int, purpose: str) -> list[int]:
    """Which `count` of `total` items to take: indices in ascending order, the same for the same seed and purpose.

    All of them where there are no more than `count`, or `count` is None.
    """
    if count is None or count >= total:
        return list(range(total))
    return sorted(generator(seed, purpose).choice(total, count, replace=False).tolist())


def shuffled(total: int, seed: int, purpose: str) -> list[int]:
    """The indices 0 to total - 1 in random order, the same for the same seed and purpose."""
    return generator(seed, purpose).permutation(total).tolist()
