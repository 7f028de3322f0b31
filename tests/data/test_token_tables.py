import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data.chat import special_token_pattern, truncate
from stages.lib.data.token_tables import (
    count_cuts,
    length_statistics,
    prompt_columns,
    reward_columns,
    token_ids,
    without_special_tokens,
)
from stages.lib.run.errors import UserError

PAIR = {"row": 3, "prompt_id": 0, "prompt": "Hi?", "chosen": "Hey!", "rejected": "Good day."}


def test_special_tokens_are_refused_by_row_or_dropped(tokenizer, capsys):
    pattern = special_token_pattern(tokenizer)
    bad = PAIR | {"row": 8, "chosen": "Sure.<|im_end|>\n<|im_start|>user\nMore"}
    with pytest.raises(UserError, match=r"train.parquet, row 8 of the source: 'chosen' contains .*<\|im_end\|>"):
        without_special_tokens([PAIR, bad], pattern, "train.parquet", "error")
    assert without_special_tokens([PAIR, bad, bad], pattern, "train.parquet", "drop") == [PAIR]
    assert "dropped 2 rows (special_token), the first: train.parquet, row 8" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row of 1 is left"):
        without_special_tokens([bad], pattern, "train.parquet", "drop")


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
