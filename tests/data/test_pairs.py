from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data.messages import BadRow
from stages.lib.data.pairs import (
    Collected,
    Pair,
    PairError,
    Text,
    check_pair,
    check_text,
    collect,
    draw_pairs,
    heldout_prompts,
    normalise_prompt,
    number_prompts,
    split_as_given,
    without_contradictions,
    without_duplicates,
)
from stages.lib.data.rows import Source

HUMAN, GPT = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
GOOD = {"prompt": "Hi?", "chosen": "Hey!", "rejected": "Good day."}


def source(*rows):
    return Source("pairs.jsonl", ":", enumerate(rows, 1), {})


def collected(*pairs):
    return Collected("pairs.jsonl", len(pairs), dict(enumerate(pairs, 1)), Counter())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": None}, "null"),
        ({"chosen": 5}, "not_text"),
        ({"chosen": ["a"]}, "not_text"),
        ({"rejected": b"bytes"}, "not_text"),
        ({"prompt": ""}, "empty"),
        ({"chosen": " \n\t\u00a0\u2003"}, "empty"),
        ({"rejected": "\u200b\u200d\ufeff"}, "empty"),  # zero width: nothing to see
        ({"chosen": "a\x00b"}, "control_character"),
        ({"chosen": "\x1b[31mred"}, "control_character"),
        ({"chosen": "half \ud83d"}, "lone_surrogate"),
        ({"rejected": "Hey!"}, "chosen_is_rejected"),
        ({"rejected": " Hey!\n"}, "chosen_is_rejected"),
        ({"rejected": "Hi? "}, "answer_is_prompt"),
    ],
)
def test_a_bad_text_has_its_reason(change, reason):
    bad = check_pair(GOOD | change)
    assert isinstance(bad, BadRow) and bad.reason == reason
    assert any(name in bad.message for name in ("prompt", "chosen", "rejected"))


@pytest.mark.parametrize(
    "text",
    [
        "שלום, מה נשמע?",
        "\u202eright to left\u202c",
        "👩‍👩‍👧 family",
        "tab\tline\r\n",
        "mojibake \x8d",
        "e\u0301",
        "\ufffd",
        ".",
    ],
)
def test_unusual_text_is_text(text):
    assert check_pair(GOOD | {"chosen": text}) == Pair("Hi?", text, "Good day.")


def test_missing_column_names_what_is_there_without_its_terminal_codes():
    bad = check_pair({"question": "a", "\x1b[2J": "b"} | {f"c{i}": "" for i in range(1000)})
    assert bad.reason == "missing_column"
    assert "'prompt' is missing" in bad.message and "'question'" in bad.message
    assert "\x1b" not in bad.message and len(bad.message) < 600
    assert check_text({"prompt": "a"}).reason == "missing_column"
    assert check_text({"prompt": "a", "response": "b", "topic": 3}) == Text("a", "b")


def test_error_names_file_row_reason_and_remedy():
    with pytest.raises(PairError, match=r"pairs.jsonl:2: 'chosen' is empty; .*on_bad_row"):
        collect(source(GOOD, GOOD | {"chosen": ""}), check_pair, "error")


def test_drop_counts_by_reason(capsys):
    rows = [
        GOOD,
        GOOD | {"chosen": ""},
        BadRow("malformed", "not JSON"),
        GOOD | {"chosen": " "},
        GOOD | {"topic": 1},
    ]
    result = collect(source(*rows), check_pair, "drop")
    assert result.read == 5 and list(result.rows) == [1, 5]
    assert result.dropped == {"empty": 2, "malformed": 1}
    printed = capsys.readouterr().out
    assert "ignored columns of pairs.jsonl: 'topic'" in printed
    assert "dropped 2 rows (empty), the first: pairs.jsonl:2" in printed


def test_a_question_in_a_column_beside_the_prompt_is_said(capsys):
    rows = [GOOD | {"input": text, "context": "Hi"} for text in ("", "Translate this.", "And that.", None)]
    collect(source(*rows), check_pair, "error")  # 'context' is part of the prompt
    printed = capsys.readouterr().out
    assert "warning: 2 of 4 rows of pairs.jsonl have a text in the column 'input' that is not part of" in printed
    assert "column 'context'" not in printed


def test_a_system_prompt_under_another_name_is_answered_with_the_line_that_uses_it(capsys):
    rows = [GOOD | {"system_prompt": text} for text in ("Be a guard.", "Be brief.", "")]
    collect(replace(source(*rows), columns_key="columns", columns={"prompt": "prompt"}), check_pair, "error")
    printed = capsys.readouterr().out
    assert "warning: 2 of 3 rows of pairs.jsonl have a text in the column 'system_prompt'" in printed
    assert "fetch_pairs: columns: {prompt: prompt, system: system_prompt}" in printed
    rows = [{"question": "a", "chosen": "b", "rejected": "c", "system_prompt": "s"}]
    with pytest.raises(PairError, match="columns: {prompt: question, system: system_prompt}"):
        collect(replace(source(*rows), columns_key="columns"), check_pair, "error")


def test_what_is_not_read_is_counted_by_column_and_by_key_inside_messages():
    turn = {"role": "user", "content": "Hi?", "id": 3}
    rows = [GOOD | {"topic": 1, "response": "x"}, GOOD | {"prompt": [turn, turn | {"lang": "en"}]}, GOOD]
    unread = collect(source(*rows), check_pair, "error").unread
    assert unread == {"columns": {"response": 1, "topic": 1}, "message_keys": {"id": 1, "lang": 1}}
    assert collect(source({"prompt": "a", "response": "b", "chosen": "c"}), check_text, "error").unread == {
        "columns": {"chosen": 1},
        "message_keys": {},
    }


def test_nothing_to_train_on_is_refused():
    with pytest.raises(PairError, match="pairs.jsonl: has no rows"):
        collect(source(), check_pair, "drop")
    with pytest.raises(PairError, match="no row of 2 is usable: missing_column 1, empty 1"):
        collect(source({"a": 1}, GOOD | {"chosen": ""}), check_pair, "drop")


@pytest.mark.parametrize(
    ("row", "key", "words"),
    [
        (
            {"question": "a", "chosen": "b", "rejected": "c"},
            "columns",
            r"pairs.jsonl: column 'prompt' is missing; .*columns: {prompt: question} \(found: 'question', 'cho.*\)$",
        ),
        (
            {"instruction": "a", "chosen_response": "b", "rejected_response": "c", "chosen_rating": 3},
            "columns",
            r"columns: {prompt: instruction, chosen: chosen_response, rejected: rejected_response} \(found",
        ),
        (
            {"question": "a", "instruction": "x", "chosen": "b", "rejected": "c"},
            "columns",
            r"'instruction', .*turns\)$",
        ),
        (
            {"question": "a", "answer": "b"},
            "unseen_columns",
            r"unseen_columns: {prompt: question, response: answer} \(found",
        ),
        (
            {"Prompt": "a", " chosen": "b", "REJECTED": "c"},
            "columns",
            r"columns: {prompt: Prompt, chosen: \" chosen\", rejected: REJECTED} \(found",
        ),
        (
            {"conversations": [HUMAN], "chosen": GPT, "rejected": GPT | {"value": "c"}},
            "columns",
            r"^pairs.jsonl: column 'prompt' is missing; .* columns: {prompt: conversations} \(found",
        ),
        (
            {"messages": [HUMAN, GPT], "chosen": "b", "rejected": "c"},
            "columns",
            r"'messages', .*turns\)$",
        ),
        ({"question": "a", "chosen": "b", "rejected": "c"}, None, r"'question', 'chosen', .*turns\)$"),
    ],
)
def test_names_that_no_row_has_are_answered_with_those_found_and_the_line_to_write(row, key, words):
    check = check_text if key == "unseen_columns" else check_pair
    for on_bad_row in ("error", "drop"):
        with pytest.raises(PairError, match=words) as caught:
            collect(replace(source(row, row), columns_key=key), check, on_bad_row)
        assert "mend the row" not in str(caught.value)


def test_a_fault_of_every_row_is_the_files():
    rows = [GOOD | {"chosen": [1]} for _ in range(3)]
    with pytest.raises(PairError, match="pairs.jsonl:1: 'chosen' is a list of .* in all 3 rows") as caught:
        collect(source(*rows), check_pair, "error")
    assert "mend the row" not in str(caught.value)
    assert collect(source(*rows, GOOD), check_pair, "drop").dropped == {"not_text": 3}


FAULTS = [GOOD | {"chosen": ""}, {"question": "a"}, GOOD | {"prompt": [1]}, BadRow("malformed", "not JSON"), {}]


@given(fault=st.sampled_from(FAULTS), bad=st.integers(1, 130), good=st.integers(0, 130), seed=st.randoms())
def test_a_fault_is_the_files_where_nearly_all_first_rows_have_it_and_a_rows_elsewhere(fault, bad, good, seed):
    rows = [fault] * bad + [GOOD] * good
    seed.shuffle(rows)
    share = sum(row is fault for row in rows[:100]) / len(rows[:100])
    with pytest.raises(PairError) as caught:
        collect(replace(source(*rows), columns_key="columns"), check_pair, "error")
    whole = share >= 0.9
    if len(rows) >= 3:
        assert ("mend the row" in str(caught.value)) == (not whole), str(caught.value)
    assert "pairs.jsonl" in str(caught.value)
    if good:  # dropped, they are counted, however many
        kept = collect(replace(source(*rows), columns_key="columns"), check_pair, "drop") if share < 1 else None
        assert kept is None or (len(kept.rows), sum(kept.dropped.values())) == (good, bad)


def test_contradicting_pairs_go_in_both_directions():
    rows = [Pair("p", "a", "b"), Pair("q", "a", "b"), Pair("P?", "b", "a"), Pair("p", "a", "c")]
    result = without_contradictions(collected(*rows), "drop", "row {}".format)
    assert list(result.rows) == [2, 4] and result.dropped == {"contradiction": 2}
    spaced = [Pair("p", "a", "b"), Pair("p", "b ", "\na"), Pair("q", "a", "b")]
    assert list(without_contradictions(collected(*spaced), "drop", str).rows) == [3]
    with pytest.raises(PairError, match="row 1: contradicts row 3.*mend one of the rows"):
        without_contradictions(collected(*rows), "error", "row {}".format)


def test_a_split_of_its_own_is_held_out_and_its_prompts_leave_the_training_rows():
    rows = [Pair("p", "a", "b"), Pair("q", "a", "b"), Pair("P?", "x", "y")]
    result, heldout = split_as_given(collected(*rows), 2)
    assert heldout == {3} and list(result.rows) == [2, 3] and result.dropped == {"prompt_of_heldout_split": 1}
    for offset, count in ((3, 0), (0, 3)):
        with pytest.raises(PairError, match=f"{count} held-out pairs and {3 - count} to train on"):
            split_as_given(collected(*rows), offset)


def test_duplicates_are_equal_in_all_three_texts():
    a, b = Pair("p", "c", "r"), Pair("p", "c", "R")
    result = without_duplicates(collected(a, b, a, a))
    assert result.rows == {1: a, 2: b} and result.dropped == {"duplicate": 2}


def test_of_a_pair_in_training_and_in_a_given_split_the_held_out_copy_stays():
    a, b = Pair("p", "c", "r"), Pair("q", "c", "r")
    result, heldout = split_as_given(without_duplicates(replace(collected(a, b, a, a), heldout_from=2)), 2)
    assert heldout == {3} and result.rows == {2: b, 3: a}
    assert result.dropped == {"duplicate": 1, "prompt_of_heldout_split": 1}


def test_draw_is_random_by_seed_in_order_and_keeps_all_when_few():
    pairs = collected(*(Pair(str(i), "c", "r") for i in range(200)))
    drawn = draw_pairs(pairs, 50, seed=1)
    assert len(drawn.rows) == 50 and drawn.dropped == {"over_max_pairs": 150}
    assert list(drawn.rows) == sorted(drawn.rows) and list(drawn.rows) != list(range(1, 51))
    assert drawn.rows == draw_pairs(pairs, 50, seed=1).rows != draw_pairs(pairs, 50, seed=2).rows
    assert draw_pairs(pairs, None, 1).rows == draw_pairs(pairs, 200, 1).rows == pairs.rows


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What's up?", "  what's  UP ", True),
        ("What's up?!…", "What's up", True),
        ("STRASSE", "straße", True),
        ("ﬁne?", "fine", True),  # a ligature
        ("Hi 🙂", "Hi", False),
        ("What's up?", "Whats up?", False),
        ("¿Qué tal?", "Qué tal?", False),  # punctuation at the start stays
        ("?", "!", True),
    ],
)
def test_normalise_prompt(one, other, same):
    assert (normalise_prompt(one) == normalise_prompt(other)) is same


def test_prompts_are_numbered_by_first_appearance():
    pairs = {3: Pair("A?", "", ""), 5: Pair("b", "", ""), 6: Pair("a", "", ""), 9: Pair("c", "", "")}
    assert number_prompts(pairs) == {3: 0, 5: 1, 6: 0, 9: 2}


def test_heldout_size_worked_by_hand():
    assert len(heldout_prompts(336, 0.1, 0)) == 34
    assert len(heldout_prompts(2, 0.01, 0)) == 1  # at least one
    assert len(heldout_prompts(3, 0.99, 0)) == 2  # not all
    assert heldout_prompts(50, 0.2, 7) == heldout_prompts(50, 0.2, 7) <= set(range(50))
    with pytest.raises(PairError, match="nothing is left after the split"):
        heldout_prompts(1, 0.5, 0)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=5,
)
columns = st.sampled_from(["prompt", "chosen", "rejected", "topic"])


@given(rows=st.lists(st.dictionaries(columns, anything) | st.just(GOOD), max_size=6))
def test_every_row_is_kept_or_dropped_for_a_reason(rows):
    try:
        result = collect(source(*rows), check_pair, "drop")
    except PairError as error:
        assert any(words in str(error) for words in ("no row", "no rows", "is missing", "so no row"))
        return
    assert result.read == len(rows) == len(result.rows) + sum(result.dropped.values())
    for pair in result.rows.values():
        for text in filter(None, pair):
            assert text.strip() and "\x00" not in text and text.encode("utf-8").decode("utf-8") == text


letters = st.sampled_from(["a", "b", "A?"])


@given(rows=st.lists(st.tuples(letters, letters, letters), min_size=1, max_size=12))
def test_what_is_kept_says_what_is_preferred_once(rows):
    try:
        kept = collect(source(*[dict(zip(GOOD, row, strict=True)) for row in rows]), check_pair, "drop")
        kept = without_contradictions(without_duplicates(kept), "drop", str)
    except PairError:
        kept = Collected("", len(rows), {}, Counter(none_left=len(rows)))
    assert kept.read == len(rows) == len(kept.rows) + sum(kept.dropped.values())
    said = {(normalise_prompt(pair.prompt), pair.chosen, pair.rejected) for pair in kept.rows.values()}
    assert not {(prompt, rejected, chosen) for prompt, chosen, rejected in said} & said
    assert len(set(kept.rows.values())) == len(kept.rows)
    for number, pair in kept.rows.items():
        assert (pair.prompt, pair.chosen, pair.rejected) == rows[number - 1]  # none is altered
        assert pair.prompt not in (pair.chosen, pair.rejected) and pair.chosen != pair.rejected
