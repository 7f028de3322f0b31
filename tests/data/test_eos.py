"""Where an answer ends. 2 is the EOS."""

import pytest

from stages.lib.data.eos import up_to_eos


@pytest.mark.parametrize(
    ("ids", "first", "last"),
    [
        ([7, 8, 2, 198], [7, 8, 2], [7, 8, 2]),  # a template's line break goes
        ([7, 2, 198, 9, 2, 198], [7, 2], [7, 2, 198, 9, 2]),  # two turns
        ([2, 2], [2], [2, 2]),
        ([2], [2], [2]),
        ([7, 8, 198], [7, 8, 198], [7, 8, 198]),  # cut before its EOS
        ([], [], []),
    ],
)
def test_what_follows_the_eos_is_no_part_of_the_answer(ids, first, last):
    assert up_to_eos(ids, 2) == first
    assert up_to_eos(ids, 2, last=True) == last
