"""Drawing by seed."""

import numpy as np
import pytest

from stages.lib.run.draws import HELDOUT_PROMPTS, draw, generator, shuffled


def test_a_draw_keeps_the_order_and_follows_the_seed():
    drawn = draw(100, 10, 1, "a")
    assert drawn == sorted(set(drawn)) and len(drawn) == 10 and 0 <= drawn[0] and drawn[-1] < 100
    assert draw(100, 10, 1, "a") == drawn
    assert len({tuple(draw(100, 10, seed, purpose)) for seed in (1, 2) for purpose in ("a", "b")}) == 4


def test_a_shuffle_holds_everything_once():
    order = shuffled(100, 1, "a")
    assert order != sorted(order) == list(range(100)) and order == shuffled(100, 1, "a")


def test_no_two_purposes_share_a_stream_with_each_other_or_with_numpys_plain_seeds():
    purposes = ["", "a", "b", "0", "1", "max_pairs", "judge_prompts", HELDOUT_PROMPTS, *map(str, range(100))]
    seeds = (0, 1, 42, 2**32 - 1)
    streams = [generator(seed, purpose) for purpose in set(purposes) for seed in seeds]
    streams += [np.random.default_rng(plain) for seed in seeds for plain in (seed, [seed, 2], [seed, 0, 1])]
    assert len({stream.integers(2**63) for stream in streams}) == len(streams)


def test_the_held_out_prompts_are_those_of_every_committed_result():
    # prompt_id of the embedded pairs' heldout.parquet, as it was when the purposes got names
    committed = [55, 72, 87, 88, 90, 96, 113, 116, 119, 142, 143, 145, 177, 206, 207, 218, 253, 260, 264, 283]
    committed += [284, 286, 289, 297, 299, 301, 303, 307, 311, 313, 318, 322, 323, 326]
    assert sorted(shuffled(336, 42, HELDOUT_PROMPTS)[:34]) == committed


def test_every_item_is_drawn_equally_often():
    """10,000 draws of 3 of 10: each item's share within five standard errors of 0.3."""
    counts = [0] * 10
    for seed in range(10_000):
        for i in draw(10, 3, seed, "a"):
            counts[i] += 1
    assert all(abs(count / 10_000 - 0.3) < 5 * (0.3 * 0.7 / 10_000) ** 0.5 for count in counts)


@pytest.mark.parametrize("count", [None, 4, 99])
def test_no_more_are_drawn_than_there_are(count):
    assert draw(4, count, 1, "a") == [0, 1, 2, 3]
