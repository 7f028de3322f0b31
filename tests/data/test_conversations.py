"""The forms of a row, each worked by hand, and what holds for all of them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data.conversations import Conversation, keys_left_unread, read_conversation
from stages.lib.data.messages import BadRow, prompt_messages, question_of, transcript
from stages.lib.data.pairs import Pair, Prompt, Text, check_pair, check_prompt, check_text

ANSWERS = ("chosen", "rejected")


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


GOOD, BAD = [assistant("Hey!")], [assistant("Good day.")]
TURNS = [user("I collect."), assistant("What?"), user("Hi?")]
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"thing": 1}}}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {}}}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "chosen": "Hey!", "rejected": "Good day."},
        {"prompt": [user("Hi?")], "chosen": GOOD, "rejected": BAD},
        {"prompt": user("Hi?"), "chosen": GOOD[0], "rejected": BAD[0]},
        {"prompt": "Hi?", "chosen": GOOD, "rejected": BAD},
        {"prompt": [user("Hi?")], "chosen": "Hey!", "rejected": "Good day."},
        {"chosen": [user("Hi?"), *GOOD], "rejected": [user("Hi?"), *BAD]},
        {"prompt": None, "chosen": [user("Hi?"), *GOOD], "rejected": [user("Hi?"), *BAD]},
        {"prompt": "Hi?", "chosen": [user("Hi?"), *GOOD], "rejected": [user("Hi?"), *BAD]},
        {"prompt": [user("Hi?")], "chosen": [user("Hi?"), *GOOD], "rejected": [user("Hi?"), *BAD]},
        {
            "chosen": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hey!"}],
            "rejected": [{"from": "User", "value": "Hi?"}, {"from": "Assistant", "value": "Good day."}],
        },
        {
            "prompt": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "?"}]}
            ],
            "chosen": GOOD,
            "rejected": BAD,
        },
        {
            "chosen": "\n\nHuman: Hi?\n\nAssistant: Hey!",
            "rejected": "\n\nHuman: Hi?\n\nAssistant: Good day.",
        },
        {
            "prompt": "Hi?",
            "chosen": "\n\nHuman: Hi?\n\nAssistant: Hey!",
            "rejected": "\n\nHuman: Hi?\n\nAssistant: Good day.",
        },
        {"prompt": "\n\nHuman: Hi?\n\nAssistant:", "chosen": " Hey!", "rejected": " Good day."},
        {"prompt": "Hi?", "chosen": json.dumps(GOOD), "rejected": str(BAD)},
        {"prompt": "Hi?", "chosen": str([user("Hi?"), *GOOD]), "rejected": str([user("Hi?"), *BAD])},
        {"system": "", "prompt": "Hi?", "chosen": "Hey!", "rejected": "Good day.", "tools": []},
        {"system": None, "prompt": "Hi?", "chosen": "Hey!", "rejected": "Good day.", "tools": None},
    ],
)
def test_every_form_of_one_turn_is_the_plain_pair(row):
    assert check_pair(row) == Pair("Hi?", "Hey!", "Good day.")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": TURNS, "chosen": GOOD, "rejected": BAD},
        {"prompt": TURNS, "chosen": "Hey!", "rejected": "Good day."},
        {"prompt": TURNS, "chosen": TURNS + GOOD, "rejected": TURNS + BAD},
        {"chosen": TURNS + GOOD, "rejected": TURNS + BAD},
        {
            "prompt": "I collect.",
            "chosen": TURNS + GOOD,
            "rejected": TURNS + BAD,
        },  # the first or the last of the turns
        {"prompt": "Hi?", "chosen": TURNS + GOOD, "rejected": TURNS + BAD},
        {"prompt": TURNS[:1], "chosen": TURNS[1:] + GOOD, "rejected": TURNS[1:] + BAD},
        {
            "chosen": "\n\nHuman: I collect.\n\nAssistant: What?\n\nHuman: Hi?\n\nAssistant: Hey!",
            "rejected": "\n\nHuman: I collect.\n\nAssistant: What?\n\nHuman: Hi?\n\nAssistant: Good day.",
        },
        {
            "prompt": "\n\nHuman: I collect.\n\nAssistant: What?\n\nHuman: Hi?\n\nAssistant:",
            "chosen": " Hey!",
            "rejected": "Good day.",
        },
    ],
)
def test_every_form_of_several_turns_is_the_same_pair(row):
    pair = check_pair(row)
    assert pair == Pair(
        "User: I collect.\n\nAssistant: What?\n\nUser: Hi?", "Hey!", "Good day.", json.dumps(TURNS), None
    )
    assert prompt_messages(pair._asdict()) == TURNS and question_of(pair._asdict()) == "Hi?"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [system("Be a guard."), user("Hi?")], "chosen": GOOD, "rejected": BAD},
        {"system": "Be a guard.", "prompt": "Hi?", "chosen": "Hey!", "rejected": "Good day."},
        {"system": "Be a guard.", "chosen": [user("Hi?"), *GOOD], "rejected": [user("Hi?"), *BAD]},
        {
            "system": "Be a guard.",
            "prompt": [system("Be a guard."), user("Hi?")],
            "chosen": [user("Hi?"), *GOOD],
            "rejected": [system("Be a guard."), user("Hi?"), *BAD],
        },
        {
            "prompt": [user("Hi?")],
            "chosen": [system("Be a guard."), user("Hi?"), *GOOD],
            "rejected": [{"role": "developer", "content": "Be a guard."}, user("Hi?"), *BAD],
        },
    ],
)
def test_a_system_message_is_kept_wherever_it_stands(row):
    pair = check_pair(row)
    assert pair.prompt == "System: Be a guard.\n\nUser: Hi?"
    assert json.loads(pair.messages) == [system("Be a guard."), user("Hi?")]


def test_tool_calls_tools_and_their_results():
    asked = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    written = {"function": {"name": "look_up", "arguments": '{"thing": 1}'}}
    result = {"role": "tool", "name": "look_up", "content": "wipe dry"}
    for call in (asked, asked | {"tool_calls": [written], "content": ""}):
        row = {"prompt": [user("Hi?"), call, result], "chosen": GOOD, "rejected": BAD, "tools": [TOOL]}
        pair = check_pair(row)
        assert json.loads(pair.messages) == [user("Hi?"), asked | {"content": ""}, result]
        assert json.loads(pair.tools) == [TOOL]
        assert check_pair(row | {"tools": json.dumps([TOOL])}) == pair
    assert pair.prompt.splitlines()[-1] == "Tool: wipe dry" and '"look_up"' in pair.prompt


@pytest.mark.parametrize(
    ("row", "reason", "words"),
    [
        ({"chosen": [user("a"), *GOOD], "rejected": [user("c"), *BAD]}, "different_prompts", "before"),
        (
            {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")], "rejected": [user("a"), assistant("e")]},
            "different_prompts",
            "answer different prompts",
        ),
        ({"prompt": "x", "chosen": [user("a"), *GOOD], "rejected": [user("a"), *BAD]}, "different_prompts", "'chosen'"),
        ({"chosen": [user("a"), assistant("b")], "rejected": [user("a")]}, "conversation", "'rejected' must end"),
        ({"chosen": GOOD, "rejected": BAD}, "conversation", "must end with a turn of the user"),
        ({"prompt": [system("s")], "chosen": GOOD, "rejected": BAD}, "conversation", "not system"),
        ({"chosen": [], "rejected": []}, "empty", "'chosen' is an empty list"),
        ({"chosen": ["a", "b"], "rejected": ["a", "c"]}, "not_text", "messages"),
        ({"chosen": [user("a"), assistant(None)], "rejected": [user("a"), assistant("d")]}, "null", "'chosen' is null"),
        ({"chosen": [user({}), assistant("b")], "rejected": [user({}), assistant("d")]}, "not_text", "message 1"),
        ({"prompt": [{"role": "poet", "content": "x"}], "chosen": GOOD, "rejected": BAD}, "unknown_role", "poet"),
        ({"prompt": [{"content": "x"}], "chosen": GOOD, "rejected": BAD}, "unknown_role", "None"),
        (
            {"prompt": [user([{"type": "image", "url": "x"}])], "chosen": GOOD, "rejected": BAD},
            "not_text",
            "'image'",
        ),
        ({"prompt": "p", "chosen": assistant("") | {"tool_calls": [CALL]}, "rejected": BAD}, "tool_call", "a tool"),
        (
            {"system": "a", "prompt": [system("b"), user("c")], "chosen": GOOD, "rejected": BAD},
            "two_systems",
            "differ",
        ),
        ({"system": 3, "prompt": "p", "chosen": "a", "rejected": "b"}, "not_text", "'system'"),
        ({"tools": "no", "prompt": "p", "chosen": "a", "rejected": "b"}, "tools", "not JSON"),
        ({"prompt": "p", "chosen": "[{'role': 'user'", "rejected": "b"}, "lists_as_text", "cannot be read"),
        ({"prompt": "p", "chosen": "p", "rejected": "b"}, "answer_is_prompt", "'chosen' is only the prompt"),
        ({"chosen": "p and a", "rejected": "p and b"}, "missing_column", "Human:"),
        ({"prompt": [user("a\x00")], "chosen": GOOD, "rejected": BAD}, "control_character", "message 1"),
        ({"prompt": [user("a")] * 2 + [user("")], "chosen": GOOD, "rejected": BAD}, "empty", "message 3"),
        ({"prompt": [{**user("a"), "images": ["x"]}], "chosen": GOOD, "rejected": BAD}, "unreadable_key", "images"),
    ],
)  # fmt: skip
def test_what_is_no_pair_has_its_reason(row, reason, words):
    bad = check_pair(row)
    assert isinstance(bad, BadRow) and bad.reason == reason and words in bad.message


@pytest.mark.parametrize("write", [json.dumps, repr])
@pytest.mark.parametrize("first", [{"weight": 1}, {"name": None}, {"id": "a", "x": {"y": [1]}}])
def test_messages_as_text_are_messages_whatever_key_stands_first(write, first):
    chosen, rejected = ([first | user("Hi?"), first | end[0]] for end in (GOOD, BAD))
    assert check_pair({"chosen": write(chosen), "rejected": write(rejected)}) == Pair("Hi?", "Hey!", "Good day.")


@pytest.mark.parametrize(
    "answer",
    [
        '{"role": "assistant", "content": "The kettle!"}',
        '{"value": "kettle"}',
        '{"content": "kettle"}',
        '[{"content": "kettle"}]',
        '[{"name": "kettle", "value": 3}]',
        '["kettle", "pot"]',
        "['kettle']",
        '"kettle"',
        "[]",
        '{"model": "m", "messages": [{"role": "user", "content": "kettle"}]}',
        "[{'role': 'user'}]",
        '[kettle](a "b\\d")',
    ],
)
def test_an_answer_that_is_json_stays_as_it_is(answer):
    row = {"prompt": "Write JSON", "chosen": answer, "rejected": "No."}
    assert check_pair(row) == Pair("Write JSON", answer, "No.")
    assert check_pair({"prompt": "Write JSON", "chosen": "No.", "rejected": answer}).rejected == answer


@pytest.mark.parametrize(
    ("text", "reason", "words"),
    [
        (json.dumps({"messages": GOOD}), "wrapped_messages", "'messages'"),
        (repr({"conversations": GOOD}), "wrapped_messages", "'conversations'"),
        ({"messages": GOOD}, "wrapped_messages", "write the list alone"),
        (json.dumps(json.dumps(GOOD)), "lists_as_text", "encoded twice"),
        (json.dumps(repr(GOOD)), "lists_as_text", "encoded twice"),
        ('[{"weight": 1, "role": "assistant", "content": "Hey', "lists_as_text", "cannot be read"),
        ("array([{'role': 'assistant', 'content': 'Hey'}], dtype=object)", "lists_as_text", "cannot be read"),
        (json.dumps([*GOOD, {"role": "user"}]), "lists_as_text", "not each"),
    ],
)
def test_messages_as_text_that_cannot_be_taken_as_such_are_refused(text, reason, words):
    bad = check_pair({"prompt": "Hi?", "chosen": text, "rejected": "No."})
    assert isinstance(bad, BadRow) and bad.reason == reason and words in bad.message and "'chosen'" in bad.message


@pytest.mark.parametrize("prompt", ["['How do I boil water?']", '["Hi", "there?"]'])
def test_a_prompt_that_is_a_list_of_strings_as_text_is_refused(prompt):
    bad = check_pair({"prompt": prompt, "chosen": "a", "rejected": "b"})
    assert isinstance(bad, BadRow) and bad.reason == "lists_as_text" and "the prompt itself" in bad.message


@pytest.mark.parametrize(
    ("message", "key"),
    [
        (system("s") | {"tools": [TOOL]}, "'tools'"),
        (user("a") | {"tool_calls": [CALL]}, "'tool_calls'"),
        (assistant("a") | {"reasoning": "because"}, "'reasoning'"),
        (assistant("a") | {"thinking": "because"}, "'thinking'"),
        (system("s") | {"functions": "[]"}, "'functions'"),
    ],
)
def test_keys_of_a_message_that_change_what_the_model_would_see_are_refused(message, key):
    bad = check_pair({"prompt": [message, user("Hi?")], "chosen": GOOD, "rejected": BAD})
    assert isinstance(bad, BadRow) and bad.reason == "unreadable_key" and key in bad.message


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"prompt": [user("Hi?") | {"name": "Ada"}], "chosen": GOOD, "rejected": BAD}, "'name'"),
        ({"prompt": "Hi?", "chosen": [GOOD[0] | {"weight": 0}], "rejected": BAD}, "'weight' 0"),
        ({"prompt": "Hi?", "chosen": GOOD, "rejected": [BAD[0] | {"train": False}]}, "'train' False"),
        (
            {"prompt": "Hi?", "chosen": [GOOD[0] | {"value": "Ho!"}], "rejected": BAD},
            "'content' and 'value' differ",
        ),
        ({"prompt": [user("Hi?") | {"from": "gpt"}], "chosen": GOOD, "rejected": BAD}, "'role' and 'from' differ"),
        (
            {
                "prompt": [user("Hi?"), {"role": "tool", "content": "4", "tool_call_id": 7}],
                "chosen": GOOD,
                "rejected": BAD,
            },
            "'tool_call_id' is not text but int",
        ),
    ],
)
def test_keys_that_say_which_text_is_meant_or_how_much_of_it_are_refused(row, key):
    bad = check_pair(row)
    assert isinstance(bad, BadRow) and bad.reason == "unreadable_key" and key in bad.message


def test_a_part_that_is_no_text_is_refused_though_it_has_one():
    bad = check_pair({"prompt": [user([{"type": "reasoning", "text": "hm"}])], "chosen": GOOD, "rejected": BAD})
    assert isinstance(bad, BadRow) and "'reasoning'" in bad.message


def test_keys_that_are_left_unread_are_named():
    part = {"type": "text", "text": "Hi?", "cache_control": {"type": "ephemeral"}}
    call = CALL | {"index": 0, "id": "c"}
    prompt = [
        user([part]) | {"id": "a", "weight": 0, "refusal": None, "annotations": []},
        assistant("") | {"tool_calls": [call], "from": "assistant"},
        {"role": "tool", "name": "look_up", "tool_call_id": "c", "content": "wipe"},
    ]
    row = {
        "prompt": prompt,
        "chosen": [GOOD[0] | {"weight": 1}],
        "rejected": json.dumps([BAD[0] | {"model": "m"}]),
    }
    assert isinstance(check_pair(row), Pair)
    expected = {"id", "weight", "content.cache_control", "tool_calls.index", "model"}
    assert keys_left_unread(row, ANSWERS) == expected
    assert keys_left_unread({"prompt": "a", "chosen": "b", "rejected": '{"x": 1}', "topic": 3}, ANSWERS) == set()


@given(
    key=st.text(min_size=1, max_size=8)
    | st.sampled_from(["weight", "name", "train", "tools", "id", "tool_calls"]),
    said=st.none() | st.booleans() | st.integers(-1, 2) | st.text(max_size=3) | st.just([CALL]) | st.just([]),
    place=st.integers(0, 3),
    as_text=st.booleans(),
)
def test_whatever_a_message_says_is_used_refused_or_counted(key, said, place, as_text):
    turns = [*TURNS, GOOD[0]]
    plain = {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": BAD}
    turns[place] = {key: said} | turns[place]
    row = {"prompt": turns[:-1], "chosen": turns[-1:], "rejected": BAD}
    row = {name: json.dumps(value) for name, value in row.items()} if as_text else row
    if key in ("role", "content") or (key in ("from", "value") and said is None):
        return
    read = check_pair(row)
    silent = said is None or said in ("", [])
    if isinstance(read, BadRow):
        assert not silent or key in ("from", "value")  # which say other things than role and content
    elif read == check_pair(plain):
        assert (key in keys_left_unread(row, ANSWERS)) == (not silent) or (key == "tool_calls" and said is False)
    else:
        assert key == "tool_calls" and said


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_a_lone_message_as_text_is_a_conversation_of_one(write):
    pair = Pair("Hi?", "Hey!", "Good day.")
    assert check_pair({"prompt": write(user("Hi?")), "chosen": "Hey!", "rejected": "Good day."}) == pair
    assert check_pair({"prompt": write(user("Hi?")), "chosen": write(GOOD[0]), "rejected": write(BAD[0])}) == pair
    for chosen in (GOOD, GOOD[0], write(GOOD)):
        assert check_pair({"prompt": "Hi?", "chosen": chosen, "rejected": write(BAD[0])}) == pair
    assert check_text({"prompt": "Hi?", "response": write(GOOD[0])}) == Text("Hi?", "Hey!")
    assert check_prompt({"prompt": write(user("Hi?"))}) == Prompt("Hi?")
    bad = check_pair({"prompt": write(GOOD[0]), "chosen": "Hey!", "rejected": "Good day."})
    assert isinstance(bad, BadRow) and bad.reason == "conversation"


@pytest.mark.parametrize("write", [json.dumps, repr, dict])
def test_a_prompt_may_be_an_object_of_messages_and_tools(write):
    said = {"messages": [user("Hi?")], "tools": [TOOL], "parallel_tool_calls": True}
    row = {"prompt": write(said), "chosen": GOOD, "rejected": BAD}
    assert check_pair(row) == Pair("Hi?", "Hey!", "Good day.", tools=json.dumps([TOOL]))
    assert keys_left_unread(row, ANSWERS) == {"prompt.parallel_tool_calls"}
    assert check_pair(row | {"tools": [TOOL]}) == check_pair(row)
    assert check_pair(row | {"tools": [TOOL, TOOL]}).reason == "tools"
    payload = json.dumps({"model": "m", "messages": [user("Hi?")]})  # a question about such an object
    assert check_pair({"prompt": payload, "chosen": "a", "rejected": "b"}).prompt == payload


def test_unseen_texts_and_mere_prompts_have_the_same_forms():
    assert check_text({"prompt": "a", "response": "b", "topic": 3}) == Text("a", "b")
    assert check_text({"prompt": TURNS, "response": GOOD}).messages == json.dumps(TURNS)
    assert check_text({"response": [user("a"), *GOOD]}) == Text("a", "Hey!")
    assert check_prompt({"prompt": "a"}) == Prompt("a") == check_prompt({"prompt": [user("a")]})
    assert check_prompt({"prompt": "a", "system": "s"}).prompt == "System: s\n\nUser: a"
    assert check_prompt({"prompt": []}).reason == "empty" and check_prompt({}).reason == "missing_column"


def test_an_answer_that_is_a_dialogue_of_something_else_stays_a_text():
    play = "Human: To be\n\nAssistant: or not"
    assert check_pair({"prompt": "A play?", "chosen": play, "rejected": "No."}) == Pair("A play?", play, "No.")


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8).map(
    "x{}y".format
)
turns = st.tuples(
    st.none() | words,  # the system's
    st.lists(st.tuples(words, words), max_size=3),  # earlier questions and answers
    words,
)


def messages_of(said):
    first, earlier, last = said
    head = [] if first is None else [system(first)]
    return [*head, *(m for q, a in earlier for m in (user(q), assistant(a))), user(last)]


@given(said=turns, answers=st.lists(words, min_size=2, max_size=2, unique=True), form=st.integers(0, 6))
def test_whatever_the_form_the_conversation_is_the_same(said, answers, form):
    prompt, spelt = messages_of(said), {"system": "system", "user": "human", "assistant": "gpt"}
    chosen, rejected = ([assistant(text)] for text in answers)
    rows = [
        {"prompt": prompt, "chosen": chosen, "rejected": rejected},
        {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]},
        {"chosen": prompt + chosen, "rejected": prompt + rejected},
        {"prompt": prompt, "chosen": prompt + chosen, "rejected": prompt + rejected},
        {"prompt": prompt[-1]["content"], "chosen": prompt + chosen, "rejected": prompt + rejected},
        {"prompt": json.dumps(prompt), "chosen": str(chosen), "rejected": json.dumps(rejected)},
        {
            name: [
                {"from": spelt[m["role"]], "value": [{"type": "text", "text": m["content"]}]} for m in prompt + end
            ]
            for name, end in (("chosen", chosen), ("rejected", rejected))
        },
    ]
    read = read_conversation(rows[form], ANSWERS)
    assert read == Conversation(prompt, dict(zip(ANSWERS, answers, strict=True)), None)
    row = {"prompt": read.prompt, "messages": read.written_messages}
    assert prompt_messages(row) == prompt and transcript(prompt) == read.prompt
    assert all(message["content"] in read.prompt for message in prompt)


@given(
    said=turns.filter(lambda said: said[0] is None), answers=st.lists(words, min_size=2, max_size=2, unique=True)
)
def test_dialogue_text_gives_back_its_turns(said, answers):
    names = {"user": "Human", "assistant": "Assistant"}
    prompt = messages_of(said)
    text = "".join(f"\n\n{names[m['role']]}: {m['content']}" for m in prompt)
    whole = {name: f"{text}\n\nAssistant: {answer}" for name, answer in zip(ANSWERS, answers, strict=True)}
    alone = {name: f" {answer}" for name, answer in zip(ANSWERS, answers, strict=True)}
    expected = Conversation(prompt, dict(zip(ANSWERS, answers, strict=True)), None)
    assert read_conversation(whole, ANSWERS) == expected
    assert read_conversation(alone | {"prompt": f"{text}\n\nAssistant:"}, ANSWERS) == expected


KEYS = ["role", "from", "content", "value", "text", "tool_calls", "function", "name"]
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(KEYS), inner)
        | inner.map(repr)
        | st.just(assistant("b"))
        | st.just(user("a"))
    ),
    max_leaves=8,
)  # fmt: skip
columns = st.sampled_from(["prompt", "chosen", "rejected", "system", "tools"])


@given(row=st.dictionaries(columns, anything, max_size=5))
def test_anything_is_a_pair_of_clean_texts_or_a_bad_row_with_a_sentence(row):
    read = check_pair(row)
    if isinstance(read, BadRow):
        assert read.reason and len(read.message) < 1000
        return
    for text in filter(None, read):
        text.encode("utf-8")
        assert text.strip()
    assert prompt_messages(read._asdict())[-1]["role"] in ("user", "tool")
