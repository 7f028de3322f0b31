"""Prompts as messages and as one text; what stands where a row should be."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool"}

Message = dict[str, Any]  # role and content; of an assistant's tool_calls, of a tool's name and tool_call_id too
Messages = list[Message]


@dataclass(frozen=True)
class BadRow:
    """Stands where a row should be, or answers a check: a countable reason and a sentence for people."""

    reason: str
    message: str


def is_plain(messages: Messages) -> bool:
    """Whether the prompt is one user message, which its text alone says."""
    return len(messages) == 1 and messages[0].keys() == {"role", "content"} and messages[0]["role"] == "user"


def prompt_messages(row: dict[str, Any]) -> Messages:
    """The messages of a row of data/pairs: those of its column 'messages', or its prompt as the user's."""
    if row.get("messages"):
        return json.loads(row["messages"])
    return [{"role": "user", "content": row["prompt"]}]


def question_of(row: dict[str, Any]) -> str:
    """The last thing the prompt says: what an answer that only echoes would give back."""
    return prompt_messages(row)[-1]["content"]


def transcript(messages: Messages) -> str:
    """The messages as one text for people, and for telling prompts apart: a single user turn is its content."""
    if is_plain(messages):
        return messages[0]["content"]
    parts = []
    for message in messages:
        calls = [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls", [])]
        parts.append(f"{NAMES[message['role']]}: " + "\n".join(filter(None, [message["content"], *calls])))
    return "\n\n".join(parts)


def texts_in(value: Any) -> Iterator[str]:
    """Every text inside a value of JSON, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from texts_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from texts_in(inner)
