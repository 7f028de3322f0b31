from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    without_duplicates,
)
from stages.lib.data.rows import BadRow, Source

GOOD = {"prompt": "Hi?", "chosen": "Hey!", "rejected": "Good day."}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


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


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [user("Hi?"), assistant("Hey!")], "rejected": [user("Hi?"), assistant("Good day.")]},
        {"prompt": [user("Hi?")], "chosen": [assistant("Hey!")], "rejected": [assistant("Good day.")]},
        {
            "prompt": "Hi?",
            "chosen": [user("Hi?"), assistant("Hey!")],
            "rejected": [user("Hi?"), assistant("Good day.")],
        },
    ],
)
def test_conversations_of_one_turn_are_pairs(row):
    assert check_pair(row) == Pair("Hi?", "Hey!", "Good day.")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]}, "different prompts"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}, "one user turn"),
        ({"chosen": [], "rejected": []}, "one user turn"),
        ({"chosen": ["a", "b"], "rejected": ["a", "c"]}, "one user turn"),
        (
            {
                "prompt": [{"role": "system", "content": "s"}, user("a")],
                "chosen": [assistant("b")],
                "rejected": [assistant("c")],
            },
            "one user turn",
        ),
        ({"chosen": [user("a"), assistant(None)], "rejected": [user("a"), assistant("d")]}, "null"),
        ({"chosen": [user({}), assistant("b")], "rejected": [user({}), assistant("d")]}, "not text"),
    ],
)
def test_other_conversations_are_bad_rows(row, words):
    bad = check_pair(row)
    assert isinstance(bad, BadRow) and words in bad.message


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


def test_nothing_to_train_on_is_refused():
    with pytest.raises(PairError, match="pairs.jsonl: has no rows"):
        collect(source(), check_pair, "drop")
    with pytest.raises(PairError, match="no row of 2 is usable: missing_column 2"):
        collect(source({"a": 1}, {"a": 2}), check_pair, "drop")


def test_duplicates_are_equal_in_all_three_texts():
    a, b = Pair("p", "c", "r"), Pair("p", "c", "R")
    result = without_duplicates(collected(a, b, a, a))
    assert result.rows == {1: a, 2: b} and result.dropped == {"duplicate": 2}


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
        assert "no row" in str(error) or "no rows" in str(error)
        return
    assert result.read == len(rows) == len(result.rows) + sum(result.dropped.values())
    for pair in result.rows.values():
        for text in pair:
            assert text.strip() and "\x00" not in text and text.encode("utf-8").decode("utf-8") == text
