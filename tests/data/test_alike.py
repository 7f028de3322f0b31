"""Pairs that say the same or the opposite once they are cut."""

from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data.alike import contradictions, repetitions
from stages.lib.data.chat import closed_by_eos, truncate

EOS = 2


def pair(row, prompt, chosen, rejected, prompt_id=None):
    ids = {"prompt_input_ids": prompt, "chosen_input_ids": chosen, "rejected_input_ids": rejected}
    return {"row": row, "prompt_id": row if prompt_id is None else prompt_id}, ids


def test_pairs_that_stand_the_other_way_round_once_cut():
    # 1 and 3 are the same prompt by what is left of it; 4 and 5 by their number; 2 has another; 6 and 7 are opposite
    # to the reward model alone, whose last id of a cut answer is the EOS
    pairs = [
        pair(1, [7], [5, 2], [6, 2]), pair(2, [8], [6, 2], [5, 2]), pair(3, [7], [6, 2], [5, 2]),
        pair(4, [9], [5, 2], [6, 2], 50), pair(5, [9, 9], [6, 2], [5, 2], 50),
        pair(6, [4], [5, 5, 5], [6, 6, 6]), pair(7, [4], [6, 6, 7], [5, 5, 8]),
    ]  # fmt: skip
    assert contradictions(pairs, EOS) == {1: 3, 3: 1, 4: 5, 5: 4, 6: 7, 7: 6}
    assert contradictions(pairs[:2], EOS) == {}


def test_pairs_that_are_the_same_once_cut():
    pairs = [pair(1, [7], [5], [6]), pair(2, [7], [5], [6]), pair(3, [7], [6], [5]), pair(4, [8], [5], [6])]
    assert repetitions(pairs) == {2}


answers = st.lists(st.sampled_from([3, 4, EOS]), min_size=1, max_size=4)


@given(texts=st.lists(st.tuples(answers, answers, answers), max_size=10), limit=st.integers(1, 4))
def test_what_is_left_contradicts_and_repeats_nothing_that_the_models_see(texts, limit):
    whole = [pair(i, *each) for i, each in enumerate(texts)]
    pairs = [(row, truncate(ids, limit, limit, 2 * limit)) for row, ids in whole]
    opposite, same = contradictions(pairs, EOS), repetitions(pairs)
    left = [ids for row, ids in pairs if row["row"] not in opposite.keys() | same]
    assert len(pairs) == len(left) + len(opposite.keys() | same)
    dpo = [tuple(map(tuple, ids.values())) for ids in left]
    reward = [
        tuple(tuple(closed_by_eos(prompt, answer, EOS)) for answer in (chosen, rejected))
        for prompt, chosen, rejected in (map(list, each) for each in dpo)
    ]
    assert len(set(dpo)) == len(dpo)
    assert not any((prompt, rejected, chosen) in dpo for prompt, chosen, rejected in dpo)
    assert not any((rejected, chosen) in reward for chosen, rejected in reward)
    by_number = {row["row"]: tuple(map(tuple, ids.values())) for row, ids in pairs}
    for number in same:  # one before it says the same
        assert by_number[number] in [by_number[other] for other in range(number)]
    for (
        number,
        other,
    ) in opposite.items():  # the other's answers are its own the other way round, but for the last id
        (_, *one), (_, *back) = by_number[number], by_number[other]
        swapped = [closed_by_eos([], list(answer), EOS) for answer in reversed(back)]
        assert [closed_by_eos([], list(answer), EOS) for answer in one] == swapped
