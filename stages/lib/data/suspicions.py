"""What is no fault of a pair, but says that a data set may be read otherwise than it was meant."""

import json
import re
from collections.abc import Iterable

from stages.lib.data.conversations import lone_message
from stages.lib.data.pairs import Pair

# what other models' templates and dialogue forms put around turns; a plain text has none of it
OTHER_TEMPLATE = re.compile(
    r"<\|(?:im_start|im_end|user|assistant|system|eot_id|end|start_header_id|endoftext)\|>|\[/?INST\]|<</?SYS>>"
    r"|<(?:start|end)_of_turn>|</s>|(?:\A|\n\n)### (?:Instruction|Response|Human|Assistant):"
    r"|^(?:Human|User|Assistant|System):(?:\s|\Z)",
    re.MULTILINE,
)
MISSING = {"nan", "none", "null", "n/a", "#n/a", "<na>"}  # how programs write that a cell is empty
SUSPICIONS = {
    "other_template": "hold marks of another model's template: they are trained on as text",
    "begins_with_prompt": "have an answer that begins with the prompt: it is trained on as part of the answer",
    "message_as_text": "have an answer that is a message written as text (role and content): it is trained on as text",
    "missing_value": "have a text that says only nan, None or null, as programs write an empty cell: it is trained on",
}


def suspicious_counts(pairs: Iterable[Pair]) -> dict[str, int]:
    """How many pairs are suspicious, by the names of SUSPICIONS."""
    counts = dict.fromkeys(SUSPICIONS, 0)
    for pair in pairs:
        texts = (pair.chosen, pair.rejected)
        messages = [] if pair.messages is None else json.loads(pair.messages)
        prompt = messages[-1]["content"] if messages else pair.prompt
        asked = [message["content"] for message in messages] or [prompt]
        counts["other_template"] += any(OTHER_TEMPLATE.search(text) for text in (prompt, *texts))
        counts["begins_with_prompt"] += any(text.lstrip().startswith(prompt.strip()) for text in texts)
        counts["message_as_text"] += any(lone_message(text) is not None for text in texts)
        counts["missing_value"] += any(text.strip().casefold() in MISSING for text in (*asked, *texts))
    return counts


def count_turns(pairs: Iterable[Pair]) -> dict[str, int]:
    """How many pairs have a prompt of so many messages, the system's included."""
    counts: dict[int, int] = {}
    for pair in pairs:
        turns = 1 if pair.messages is None else len(json.loads(pair.messages))
        counts[turns] = counts.get(turns, 0) + 1
    return {str(turns): counts[turns] for turns in sorted(counts)}
