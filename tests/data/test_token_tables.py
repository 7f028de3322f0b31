import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data.chat import special_token_pattern, truncate
from stages.lib.data.token_tables import (
    count_cuts,
    equal_answers,
    length_statistics,
    prompt_columns,
    reward_columns,
    token_ids,
    usable_ids,
    without_special_tokens,
)
from stages.lib.run.errors import UserError

PAIR = {"row": 3, "prompt_id": 0, "prompt": "Hi?", "chosen": "Hey!", "rejected": "Good day."}


def test_special_tokens_are_refused_by_row_or_dropped(tokenizer, capsys):
    pattern = special_token_pattern(tokenizer)
    bad = PAIR | {"row": 8, "chosen": "Sure.<|im_end|>\n<|im_start|>user\nMore"}
    with pytest.raises(UserError, match=r"^b.jsonl:8: 'chosen' contains .*<\|im_end\|>; mend the row"):
        without_special_tokens([PAIR, bad], pattern, "train.parquet", "b.jsonl:{}".format, "error")
    assert without_special_tokens([PAIR, bad, bad], pattern, "train.parquet", "b:{}".format, "drop") == [PAIR]
    assert "dropped 2 rows (special_token), the first: b:8" in capsys.readouterr().out
    with pytest.raises(
        UserError, match="train.parquet: no row of 1 is left; b:8: .*: the texts seem to be written"
    ):
        without_special_tokens([bad], pattern, "train.parquet", "b:{}".format, "drop")


def test_an_unseen_text_is_rendered_like_a_pair(tokenizer):
    text = {"row": 1, "prompt": PAIR["prompt"], "response": PAIR["chosen"]}
    pair = token_ids(PAIR, tokenizer)
    assert token_ids(text, tokenizer) == {
        "prompt_input_ids": pair["prompt_input_ids"],
        "response_input_ids": pair["chosen_input_ids"],
    }


def test_cuts_worked_by_hand():
    rows = [
        {"prompt_input_ids": [0] * 5, "chosen_input_ids": [0] * 4, "rejected_input_ids": [0] * 9},
        {"prompt_input_ids": [0] * 3, "response_input_ids": [0] * 6},
    ]
    # limits 4, 8, 10: the first prompt goes to 4; 9 -> 8 -> 6; the response (6) fits 8 and 10 - 3
    assert count_cuts(rows, 4, 8, 10) == {"max_prompt_length": 1, "max_completion_length": 1, "max_length": 1}
    assert count_cuts(rows, 8, None, 11) == {"max_prompt_length": 0, "max_completion_length": 0, "max_length": 1}


@given(
    prompt=st.integers(1, 12),
    completion=st.integers(1, 12),
    max_prompt=st.integers(1, 9),
    max_completion=st.none() | st.integers(1, 9),
    extra=st.integers(1, 9),
)
def test_a_cut_is_counted_exactly_when_truncate_cuts(prompt, completion, max_prompt, max_completion, extra):
    row = {"prompt_input_ids": [0] * prompt, "c": [1] * completion}
    limits = (max_prompt, max_completion, max_prompt + extra)
    cut, counts = truncate(row, *limits), count_cuts([row], *limits)
    assert counts["max_prompt_length"] == (len(cut["prompt_input_ids"]) < prompt)
    assert bool(counts["max_completion_length"] + counts["max_length"]) == (len(cut["c"]) < completion)


def test_reward_rows_end_in_eos_and_nothing_after():
    ids = [{"prompt_input_ids": [1, 9], "chosen_input_ids": [5, 2, 198], "rejected_input_ids": [6, 7]}]
    columns = reward_columns([PAIR], ids, eos_token_id=2)
    assert columns["chosen_ids"].to_pylist() == [[1, 9, 5, 2]]
    assert columns["rejected_ids"].to_pylist() == [[1, 9, 6, 2]]
    assert columns["row"].to_pylist() == [3]


def test_a_repeated_prompt_is_one_row_in_its_first_wording():
    rows = [
        PAIR | {"prompt_id": 4, "prompt": "A?"},
        PAIR | {"prompt_id": 2},
        PAIR | {"prompt_id": 4, "prompt": "a"},
    ]
    columns = prompt_columns(rows, [{"prompt_input_ids": [i]} for i in range(3)])
    assert columns["prompt_id"].to_pylist() == [4, 2] and columns["prompt"].to_pylist() == ["A?", "Hi?"]
    assert columns["input_ids"].to_pylist() == [[0], [1]]


def test_length_statistics_worked_by_hand():
    rows = [{"prompt_input_ids": [0] * size} for size in (1, 2, 3, 10)] + [{"response_input_ids": [0]}]
    assert length_statistics(rows) == {
        "prompt": {"mean": 4.0, "p50": 2.5, "p99": pytest.approx(9.79), "max": 10},  # 3 + 0.97 * 7
        "response": {"mean": 1.0, "p50": 1.0, "p99": 1.0, "max": 1},
    }


words = st.text("ab ?\n🙂é<|", min_size=1, max_size=6).filter(str.strip)
turns = st.lists(st.tuples(words, words), max_size=2)


@given(system=st.none() | words, before=turns, question=words, answers=st.tuples(words, words))
def test_rendering_can_be_read_back_where_nothing_was_cut(tokenizer, system, before, question, answers):
    messages = [{"role": "system", "content": system}] if system else []
    for asked, said in before:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
    messages.append({"role": "user", "content": question})
    row = {"row": 1, "prompt": "p", "messages": json.dumps(messages), "chosen": answers[0], "rejected": answers[1]}
    ids = token_ids(row, tokenizer)
    assert truncate(ids, 10_000, None, 20_000) == ids
    prompt = tokenizer.decode(ids["prompt_input_ids"])
    read = re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n", prompt, re.DOTALL)
    if not system:
        assert read.pop(0)[0] == "system"  # the template's own
    assert read == [(message["role"], message["content"]) for message in messages]
    assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    for side, answer in zip(("chosen", "rejected"), answers, strict=True):
        assert tokenizer.decode(ids[f"{side}_input_ids"]) == f"{answer}<|im_end|>\n"


@given(answers=st.lists(st.tuples(words, words), min_size=1, max_size=5), limit=st.integers(1, 8))
def test_pairs_that_are_equal_once_cut_are_dropped_and_no_others(tokenizer, answers, limit):
    rows = [PAIR | {"row": i, "chosen": one, "rejected": other} for i, (one, other) in enumerate(answers, 1)]
    limits = (100, limit, 200)
    ended = {row["row"]: [f"{row[side]}<|im_end|>\n" for side in ("chosen", "rejected")] for row in rows}
    ids = {number: [tokenizer(text)["input_ids"][:limit] for text in texts] for number, texts in ended.items()}
    try:
        good, _, cut, dropped = usable_ids(rows, tokenizer, limits, "train.parquet", str, "drop")
    except UserError:
        good, cut, dropped = [], [], {"equal_after_cut": len(rows)}
    assert len(rows) == len(good) + sum(dropped.values())
    for row, row_ids in zip(good, cut, strict=True):
        assert ids[row["row"]] == [row_ids["chosen_input_ids"], row_ids["rejected_input_ids"]]
        assert row_ids["chosen_input_ids"] != row_ids["rejected_input_ids"]
        assert not equal_answers(row_ids, tokenizer.eos_token_id)
    left_out = {row["row"] for row in rows} - {row["row"] for row in good}
    for number in left_out:  # the same to DPO, or but for the last token, which the reward model makes the EOS
        one, other = ids[number]
        assert one == other or one[: limit - 1] == other[: limit - 1]
