"""Drawing by seed."""

import pytest

from stages.lib.run.draws import draw


def test_a_draw_keeps_the_order_and_follows_the_seed():
    drawn = draw(100, 10, 1)
    assert drawn == sorted(set(drawn)) and len(drawn) == 10 and 0 <= drawn[0] and drawn[-1] < 100
    assert draw(100, 10, 1) == drawn
    assert len({tuple(draw(100, 10, seed)) for seed in (1, 2, [1, 1], [2, 1])}) == 4


def test_every_item_is_drawn_equally_often():
    """10,000 draws of 3 of 10: each item's share within five standard errors of 0.3."""
    counts = [0] * 10
    for seed in range(10_000):
        for i in draw(10, 3, seed):
            counts[i] += 1
    assert all(abs(count / 10_000 - 0.3) < 5 * (0.3 * 0.7 / 10_000) ** 0.5 for count in counts)


@pytest.mark.parametrize("count", [None, 4, 99])
def test_no_more_are_drawn_than_there_are(count):
    assert draw(4, count, 1) == [0, 1, 2, 3]
