"""What becomes of each key of a message: used, refused because it changes what is meant, or left unread and counted.

Used are role and content (or from and value), an assistant's tool_calls, a tool's name and tool_call_id. Refused, where
they say anything, are those of `REFUSED`, a `name` of anyone but a tool (some templates render it), `tool_calls` of
anyone but the assistant, and a weight on an answer that is not 1 (`WEIGHTS`): pairs are trained on whole. Every other
key, also of a text part or of a tool call, is left unread; `unread_keys` names them, so that none goes in silence.
"""

from collections.abc import Iterable
from typing import Any

from stages.lib.data.messages import BadRow

ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant", "chatbot": "assistant", "model": "assistant",
    "chatgpt": "assistant", "ai": "assistant",
    "system": "system", "developer": "system",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value")
USED = {"assistant": {"tool_calls"}, "tool": {"name", "tool_call_id"}}  # by role, beside those two
REFUSED = (
    "tools", "functions", "function_call", "thinking", "reasoning", "reasoning_content", "reasoning_details",
    "tool_plan", "documents", "images", "image", "audio", "video", "videos",
)  # fmt: skip
WEIGHTS = ("weight", "loss_weight", "train", "training", "trainable")  # how much of a turn is to be trained on
NOTHING = (None, "", [], {})  # values that say nothing
PART_KEYS = {"type", "text"}
CALL_KEYS = {"id", "type", "function"}
FUNCTION_KEYS = {"name", "arguments"}


def role_of(message: dict[str, Any]) -> str | None:
    """The role of a message by our name; None if it has none that is known."""
    spelt = one_of(message, ROLE_KEYS, "")
    return ROLES.get(spelt.strip().lower()) if isinstance(spelt, str) else None


def one_of(message: dict[str, Any], keys: tuple[str, str], where: str) -> Any:
    """What the message has under the one or the other key; None if neither says anything, BadRow if both differ."""
    said = [message[key] for key in keys if message.get(key) is not None]
    if len(said) == 2 and said[0] != said[1]:
        return BadRow("unreadable_key", f"{where}: '{keys[0]}' and '{keys[1]}' differ; take one out of the data")
    return said[0] if said else None


def key_problem(message: dict[str, Any], role: str, where: str, is_answer: bool) -> BadRow | None:
    """Why a message cannot be read without changing what it means; None if it can.

    Args:
        role: one of ours.
        where: names the message.
        is_answer: whether it is what is trained on.
    """
    for key in REFUSED:
        if message.get(key):
            remedy = "write them to the row's own column 'tools'" if key == "tools" else "take it out of the data"
            return BadRow("unreadable_key", f"{where}: has '{key}', which is not read here; {remedy}")
    if message.get("tool_calls") and role != "assistant":
        return BadRow("unreadable_key", f"{where}: has 'tool_calls', which only an assistant's message can have")
    if message.get("name") and role != "tool":
        return BadRow(
            "unreadable_key",
            f"{where}: has a 'name', which some chat templates render and others do not; write it into the text, or "
            "take it out of the data",
        )
    for key in USED["tool"] if role == "tool" else ():
        if not isinstance(message.get(key), str | None):
            return BadRow("unreadable_key", f"{where}: '{key}' is not text but {type(message[key]).__name__}")
    for key in WEIGHTS if is_answer else ():
        if message.get(key) not in (1, *NOTHING):
            return BadRow(
                "unreadable_key",
                f"{where}: has '{key}' {str(message[key])[:20]}, and answers are trained on whole: take the row out of "
                "the data, or the key",
            )
    return None


def unread_keys(messages: Iterable[dict[str, Any]]) -> set[str]:
    """The keys of messages that can be read which say something and are left unread, inner ones after a dot."""
    found = set()
    for message in messages:
        found |= _saying(message, {*ROLE_KEYS, *TEXT_KEYS} | USED.get(role_of(message) or "", set()))
        content = message.get("content") or message.get("value")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict):
                found |= {f"content.{key}" for key in _saying(part, PART_KEYS)}
        for call in message.get("tool_calls") or ():
            inner = call.get("function")
            found |= {
                f"tool_calls.{key}" for key in _saying(call, CALL_KEYS if inner else CALL_KEYS | FUNCTION_KEYS)
            }
            found |= {f"tool_calls.function.{key}" for key in _saying(inner or {}, FUNCTION_KEYS)}
    return found


def _saying(value: dict[str, Any], used: set[str]) -> set[str]:
    return {key for key, said in value.items() if key not in used and said not in NOTHING}
