"""What a row is: a prompt with its answers, in every form the field writes them, as one list of messages.

- plain: prompt, chosen and rejected as texts;
- messages: prompt as a list of messages, the last one the user's or a tool's; each answer as a message, a list of
  one, or the whole conversation;
- implicit prompt: no prompt, or the text of one of the user's turns; each answer is the whole conversation, and the
  turns before the last are the prompt, which both share;
- dialogue (hh-rlhf's): the same as text, `Human: ...`, blank line, `Assistant: ...`; or the prompt as such text that
  ends in `Assistant:`, and the answers alone.

Beside them a column `system` (text) becomes the first message and `tools` (JSON schemas) goes to the chat template.
A prompt may also be an object that holds its messages and tools (OpenAI's `input`). A message has a role (`ROLES` knows
its spellings, `from` the key's) and a content (or `value`): text or a list of text parts; `message_keys.py` says what
becomes of its other keys. Messages may be written as text (JSON or Python), as a CSV file has them: a list, each of
whose elements has a role and a content; or one such message, as an answer where all answers are messages. Other JSON
is a text like any, for an answer may well be JSON.
"""

import ast
import json
import re
import unicodedata
import warnings
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice
from typing import Any, NamedTuple

from stages.lib.data.message_keys import (
    ROLE_KEYS,
    ROLES,
    TEXT_KEYS,
    key_problem,
    one_of,
    role_of,
    unread_keys,
)
from stages.lib.data.messages import BadRow, Message, Messages, is_plain, transcript

# ASCII's control characters but tab, line feed and carriage return. Not U+0080 to U+009F: real data has them
# where an emoji went through a wrong encoding, and they are tokens like any other
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}
TEXT_PARTS = (None, "text", "input_text", "output_text")
WRAPPERS = ("messages", "conversations", "conversation")  # of an object around messages
BESIDE_MESSAGES = ("tools", "parallel_tool_calls")  # in OpenAI's `input`
MESSAGES_AS_TEXT = re.compile(r"""\s*(?:array\(\s*)?\[\s*\{(?:[^{}]*,)?\s*['"](?:role|from)['"]\s*:""")
DIALOGUE = re.compile(r"\s*Human:")
TURN = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")
FORMS = (
    "prompt, chosen and rejected as texts or messages; or no prompt, and chosen and rejected as whole conversations "
    "(messages, or text of 'Human:' and 'Assistant:' turns)"
)


class Conversation(NamedTuple):
    """A prompt and the answers to it, checked."""

    messages: Messages  # the prompt; its last message is the user's or a tool's
    answers: dict[str, str]  # by column
    tools: list[Any] | None

    @property
    def prompt(self) -> str:
        """The prompt as one text: that of its only message, or all turns under their speakers' names."""
        return transcript(self.messages)

    @property
    def written_messages(self) -> str | None:
        """The prompt's messages as JSON; None where `prompt` says it all."""
        return None if is_plain(self.messages) else json.dumps(self.messages, ensure_ascii=False)

    @property
    def written_tools(self) -> str | None:
        return None if self.tools is None else json.dumps(self.tools, ensure_ascii=False)


def read_conversation(row: dict[str, Any], answer_columns: tuple[str, ...]) -> Conversation | BadRow:
    """A row as prompt and answers, whatever its form, or why it is none.

    No text is altered but by what a form itself says: dialogue text loses the white space around its turns, text
    parts are joined, and a tool call's arguments written as JSON text are read.

    Args:
        answer_columns: those that answer the prompt ('chosen', 'rejected'; 'response'; none of a mere prompt).
    """
    columns = ("prompt", *answer_columns)
    texts = [name for name in columns if isinstance(row.get(name), str)]
    for name in texts:  # before any text is taken apart
        if problem := text_problem(row[name], f"'{name}'"):
            return problem
    cells, beside = _cells(row, answer_columns)
    parsed: dict[str, Messages | str | None | BadRow] = {name: _messages_of(cells[name], name) for name in columns}
    _read_dialogues(parsed, answer_columns)
    for name in columns:
        value = parsed[name]
        if isinstance(value, BadRow):
            return value
        if value is None and (name != "prompt" or not _all_messages(parsed, answer_columns)):
            return _nothing_there(row, name, answer_columns)
    read = _join(parsed, answer_columns)
    if isinstance(read, BadRow):
        return read
    messages, answers = read
    if problem := next(filter(None, map(_message_problem, range(1, len(messages) + 1), messages)), None):
        return problem
    messages = _with_system(row.get("system"), messages)
    if isinstance(messages, BadRow):
        return messages
    tools = _tools_of(row.get("tools"), beside.get("tools"))
    if isinstance(tools, BadRow):
        return tools
    return Conversation(messages, answers, tools)


def keys_left_unread(row: dict[str, Any], answer_columns: tuple[str, ...]) -> set[str]:
    """The keys inside the messages of a row that `read_conversation` reads which say something and are not read."""
    cells, beside = _cells(row, answer_columns)
    lists = [_listed(cell, name) for name, cell in cells.items()]
    found = unread_keys(message for messages in lists if isinstance(messages, list) for message in messages)
    return found | {f"prompt.{key}" for key, said in beside.items() if key != "tools" and said}


def last_role(prompt: Any) -> str | None:
    """Whose the last turn of a prompt is, which may be messages in an object; None where no known role says it."""
    cells, _ = _cells({"prompt": prompt}, ())
    messages = _listed(cells["prompt"], "prompt")
    return role_of(messages[-1]) if isinstance(messages, list) else None


def lone_message(value: Any) -> dict[str, Any] | None:
    """The message that a text is, an object of role and content (JSON or Python); None if it is none."""
    found = _literal(value) if isinstance(value, str) else None
    if not isinstance(found, dict) or not _are_messages([found]):
        return None
    return found if role_of(found) else None


def text_problem(text: Any, name: str) -> BadRow | None:
    """Why a value is no text to train on; None if it is one. `name` says where it stands."""
    if text is None:
        return BadRow("null", f"{name} is null")
    if not isinstance(text, str):
        return BadRow("not_text", f"{name} is not text but {type(text).__name__}")
    if all(unicodedata.category(character) in INVISIBLE for character in text):
        return BadRow("empty", f"{name} is empty")
    return _character_problem(text, name)


def spell_names(names: Iterable[Any]) -> str:
    """Up to ten names from the data, quoted and cut, so that none can garble a terminal."""
    quoted = [repr(name)[:40] for name in islice(names, 11)]
    return ", ".join(quoted[:10]) + (", ..." if len(quoted) > 10 else "") or "none"


def _character_problem(text: str, name: str) -> BadRow | None:
    if control := CONTROL.search(text):
        code = f"U+{ord(control[0]):04X} at character {control.start() + 1}"
        return BadRow("control_character", f"{name} has the control character {code}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return BadRow("lone_surrogate", f"{name} has half a character at {error.start + 1} (a surrogate)")
    return None


def _nothing_there(row: dict[str, Any], name: str, answer_columns: tuple[str, ...]) -> BadRow:
    if name in row:
        return BadRow("null", f"'{name}' is null")
    message = f"column '{name}' is missing (found: {spell_names(row)})"
    if name == "prompt" and answer_columns and all(isinstance(row.get(column), str) for column in answer_columns):
        message += f", and the answers are plain texts, of which none says where a prompt ends; read are {FORMS}"
    return BadRow("missing_column", message)


def _all_messages(parsed: dict[str, Any], names: tuple[str, ...]) -> bool:
    return bool(names) and all(isinstance(parsed[name], list | BadRow) for name in names)


def _cells(row: dict[str, Any], answer_columns: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the columns hold, with messages out of the objects around them; and what stands beside a prompt's messages.

    A text that is one message is that message as a prompt; as an answer where every answer is messages in some form:
    an answer may well be JSON, but hardly all of them such.
    """
    cells: dict[str, Any] = {name: row.get(name) for name in ("prompt", *answer_columns)}
    beside: dict[str, Any] = {}
    said = cells["prompt"]
    inside = _literal(said) if isinstance(said, str) else said
    if message := lone_message(said):
        cells["prompt"] = [message]
    elif isinstance(inside, dict) and (wrapper := _wrapper(inside)):
        if not isinstance(said, str) or inside.keys() <= {wrapper, *BESIDE_MESSAGES}:
            cells["prompt"] = inside[wrapper]
            beside = {key: value for key, value in inside.items() if key != wrapper}
    lone = {name: message for name in answer_columns if (message := lone_message(cells[name]))}
    if all(name in lone or isinstance(_listed(cells[name], name), list) for name in answer_columns):
        cells |= lone
    return cells, beside


def _messages_of(value: Any, name: str) -> Messages | str | None | BadRow:
    """A column's value as messages, also where they are written as text; as text; None where there is none."""
    value = _listed(value, name)
    if not isinstance(value, list):
        return value
    messages = []
    for place, message in enumerate(value, 1):
        is_answer = name != "prompt" and place == len(value)
        read = _message(message, f"'{name}', message {place}", is_answer)
        if isinstance(read, BadRow):
            return read
        messages.append(read)
    return messages


def _listed(value: Any, name: str) -> list[dict[str, Any]] | str | None | BadRow:
    """As `_messages_of`, the messages as they stand."""
    if isinstance(value, str):
        value = _messages_in_text(value, name)
        if isinstance(value, BadRow):
            return value
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, dict):
        if (wrapper := _wrapper(value)) and value.keys() == {wrapper}:
            return BadRow("wrapped_messages", f"'{name}' is an object of {wrapper!r}; write the list alone there")
        value = _one_by_one(value)
    if not isinstance(value, list):
        return BadRow("not_text", f"'{name}' is neither text nor messages but {type(value).__name__}")
    if not value:
        return BadRow("empty", f"'{name}' is an empty list")
    if not all(isinstance(message, dict) for message in value):
        return BadRow("not_text", f"'{name}' is a list of other things than messages (role and content)")
    return value


def _one_by_one(value: dict[str, Any]) -> list[Any]:
    """A message as a list of one; messages by column (role: a list, content: a list), as datasets gives some."""
    if value and all(isinstance(values, list) for values in value.values()):
        if len({len(values) for values in value.values()}) == 1:
            return [dict(zip(value, turn, strict=True)) for turn in zip(*value.values(), strict=True)]
    return [value]


def _messages_in_text(text: str, name: str) -> Any:
    """The list of messages that a text is; the text where it is none; why it can be taken for neither."""
    found = _literal(text)
    if isinstance(found, str) and (_are_messages(_literal(found)) or MESSAGES_AS_TEXT.match(found)):
        return BadRow(
            "lists_as_text", f"'{name}' is a list of messages encoded twice: write the list, not a string of it"
        )
    if isinstance(found, dict) and (wrapper := _wrapper(found)) and found.keys() == {wrapper}:
        return BadRow(
            "wrapped_messages", f"'{name}' is an object of {wrapper!r} written as text; write the list alone there"
        )
    if _are_messages(found):
        return found
    if isinstance(found, list) and any(_are_messages([turn]) for turn in found):
        return BadRow(
            "lists_as_text", f"'{name}' is a list of messages of which not each has a role and a content"
        )
    if name == "prompt" and isinstance(found, list) and found and all(isinstance(turn, str) for turn in found):
        return BadRow(
            "lists_as_text",
            f"'{name}' is a list of {len(found)} strings written as text: write the prompt itself, or turns as "
            "messages (role and content)",
        )
    if found is None and MESSAGES_AS_TEXT.match(text):
        return BadRow(
            "lists_as_text",
            f"'{name}' begins like a list of messages written as text that cannot be read: mend it (JSON or Python)",
        )
    return text


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(turn, dict)
            and ("role" in turn or "from" in turn)
            and ("content" in turn or "value" in turn or "tool_calls" in turn)
            for turn in value
        )
    )


def _wrapper(value: dict[str, Any]) -> str | None:
    """The key of an object under which it holds messages."""
    return next((key for key in WRAPPERS if _are_messages(value.get(key))), None)


def _literal(text: str) -> Any:
    """The list, object or string that a text of JSON or of Python is; None if it is neither."""
    text = text.strip()
    return _parsed(text) if text.startswith(("[", "{", '"')) else None


@lru_cache(maxsize=16)  # a row's few texts are asked about several times; nobody changes what they are
def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        try:
            with warnings.catch_warnings():  # of escapes Python does not know, in what may be prose
                warnings.simplefilter("ignore")
                return ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return None


def _message(message: dict[str, Any], where: str, is_answer: bool) -> Message | BadRow:
    """A message in the keys chat templates know: role, content, and tool_calls, name, tool_call_id if there."""
    role, spelt, content = role_of(message), one_of(message, ROLE_KEYS, where), one_of(message, TEXT_KEYS, where)
    if problem := next((said for said in (spelt, content) if isinstance(said, BadRow)), None):
        return problem
    if role is None:
        known = ", ".join(ROLES)
        return BadRow("unknown_role", f"{where}: the role {str(spelt)[:40]!r} is none of those known ({known})")
    if problem := key_problem(message, role, where, is_answer):
        return problem
    content = _content(content, where)
    if isinstance(content, BadRow):
        return content
    calls = message.get("tool_calls")
    if calls and role == "assistant":
        calls = _tool_calls(calls, where)
        if isinstance(calls, BadRow):
            return calls
        return {"role": role, "content": content or "", "tool_calls": calls}
    read = {"role": role, "content": content}
    if role == "tool":
        read |= {key: message[key] for key in ("name", "tool_call_id") if message.get(key) is not None}
    return read


def _content(content: Any, where: str) -> Any:
    """The text of a content that may be a list of text parts, which are joined; other things as they are."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if not isinstance(text, str) or (isinstance(part, dict) and kind not in TEXT_PARTS):
            return BadRow("not_text", f"{where}: a part of the kind {str(kind)[:40]!r}; only text is read")
        texts.append(text)
    return "".join(texts)


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]] | BadRow:
    """Tool calls with their arguments as an object, which is what chat templates expect, where they are JSON text."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        return BadRow("tool_call", f"{where}: 'tool_calls' is no list of calls")
    read = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return BadRow("tool_call", f"{where}: a tool call names no function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError):
                return BadRow("tool_call", f"{where}: the arguments of {function['name'][:40]!r} are not JSON")
        number = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        read.append(number | {"type": "function", "function": {"name": function["name"], "arguments": arguments}})
    return _jsonable(read, f"{where}: 'tool_calls'")


def _jsonable(value: Any, where: str) -> Any:
    """The value, or why it cannot be written as JSON with texts that can be trained on."""
    try:
        written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        return BadRow("tool_call", f"{where} cannot be written as JSON: {error}")
    return _character_problem(written, where) or value


def _tools_of(tools: Any, own: Any) -> list[Any] | None | BadRow:
    """The tools of the row's column, or those that stand beside the prompt's messages."""
    if own and tools and own != tools:
        return BadRow("tools", "'tools' and the prompt's own tools differ")
    tools = tools or own
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            return BadRow("tools", "'tools' is not JSON")
    if tools is None or tools == [] or (isinstance(tools, str) and not tools.strip()):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return BadRow("tools", "'tools' is no list of tools, each an object")
    return _jsonable(tools, "'tools'")


def _read_dialogues(parsed: dict[str, Any], answer_columns: tuple[str, ...]) -> None:
    """Turns what is hh-rlhf's text into messages, in place.

    Answers are dialogues where all are and there is no prompt, or theirs begins with it; a prompt is one where it
    begins with Human: and ends in Assistant:.
    """
    prompt = parsed["prompt"]
    if isinstance(prompt, str) and DIALOGUE.match(prompt) and prompt.rstrip().endswith("\n\nAssistant:"):
        parsed["prompt"] = _turns(prompt.rstrip().removesuffix("\n\nAssistant:"))
        for name in answer_columns:  # the space between "Assistant:" and the answer belongs to neither
            if isinstance(parsed[name], str) and not DIALOGUE.match(parsed[name]):
                parsed[name] = parsed[name].removeprefix(" ")
    dialogues = {}
    for name in answer_columns:
        value = parsed[name]
        if not (isinstance(value, str) and DIALOGUE.match(value) and "\n\nAssistant:" in value):
            return
        dialogues[name] = _turns(value)
    prompt = parsed["prompt"]
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt.strip()}]
    if prompt is None or all(turns[: len(prompt)] == prompt for turns in dialogues.values()):
        parsed.update(dialogues)


def _turns(text: str) -> Messages:
    """hh-rlhf's text as messages."""
    found = list(TURN.finditer(text))
    ends = [turn.start() for turn in found[1:]] + [len(text)]
    return [
        {"role": ROLES[turn[1].lower()], "content": text[turn.end() : end].strip()}
        for turn, end in zip(found, ends, strict=True)
    ]


def _join(parsed: dict[str, Any], answer_columns: tuple[str, ...]) -> tuple[Messages, dict[str, str]] | BadRow:
    """The prompt's messages and the text of each answer, from what each column holds."""
    said = parsed["prompt"]  # text, messages or None
    prompt = [{"role": "user", "content": said}] if isinstance(said, str) else said
    found: dict[str, Messages] = {}
    for name in answer_columns:
        answer = parsed[name]
        if isinstance(answer, str):
            answer = [{"role": "assistant", "content": answer}]
        whole = _whole(prompt, said if isinstance(said, str) else None, answer, name)
        if isinstance(whole, BadRow):
            return whole
        found[name] = whole
    shared = [whole[:-1] for whole in found.values()] or [prompt]
    if any(turns != shared[0] for turns in shared):
        names = " and ".join(repr(name) for name in answer_columns)
        return BadRow(
            "different_prompts", f"{names} answer different prompts: they differ before the last assistant turn"
        )
    messages = shared[0]
    if not messages or messages[-1]["role"] not in ("user", "tool"):
        last = messages[-1]["role"] if messages else "nothing"
        return BadRow("conversation", f"the prompt must end with a turn of the user or a tool, not {last}")
    answers = {}
    for name, whole in found.items():
        answer = whole[-1]
        if answer.get("tool_calls"):
            return BadRow("tool_call", f"'{name}' is a tool call; only answers in text are compared")
        if problem := text_problem(answer["content"], f"'{name}'"):
            return problem
        answers[name] = answer["content"]
    return messages, answers


def _whole(prompt: Messages | None, said: str | None, answer: Messages, name: str) -> Messages | BadRow:
    """The whole conversation: prompt and answer, or the answer where it repeats the prompt (`said`: as text)."""
    if answer[-1]["role"] != "assistant":
        return BadRow("conversation", f"'{name}' must end with a turn of the assistant, not {answer[-1]['role']}")
    turns = answer[:-1]
    if prompt is None or turns == prompt:
        return answer
    if answer[0]["role"] == "assistant":
        return prompt + answer
    repeated = {turn["content"].strip() for turn in turns if turn["role"] == "user" and _is_text(turn["content"])}
    if said is not None and said.strip() in repeated:
        return answer
    if turns[0]["role"] == "system" and turns[1:] == prompt:
        return answer
    if prompt[0]["role"] == "system" and turns == prompt[1:]:
        return prompt[:1] + answer
    if turns[: len(prompt)] == prompt:  # and further turns, which the other answer has to share
        return answer
    return BadRow("different_prompts", f"'prompt' and '{name}' are of different prompts")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _message_problem(number: int, message: Message) -> BadRow | None:
    if message.get("tool_calls") and message["content"] == "":
        return None
    return text_problem(message["content"], f"'prompt', message {number},")


def _with_system(system: Any, messages: Messages) -> Messages | BadRow:
    """The messages after the row's system message; an empty or missing one says nothing."""
    if system is None or system == "":
        return messages
    if problem := text_problem(system, "'system'"):
        return messages if problem.reason == "empty" else problem
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"] == system:
        return messages
    return BadRow("two_systems", "'system' and the prompt's own system message differ")
