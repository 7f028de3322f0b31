"""Preference pairs: what a valid row is, counting those that are not, duplicates, the split by prompt."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from stages.lib.data.rows import BadRow, Source
from stages.lib.run.draws import HELDOUT_PROMPTS, draw, shuffled
from stages.lib.run.errors import UserError

# ASCII's control characters but tab, line feed and carriage return. Not U+0080 to U+009F: real data has them
# where an emoji went through a wrong encoding, and they are tokens like any other
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}
SINGLE_TURN = "only one user turn and its assistant turn can be read"


class PairError(UserError):
    """A row or a data set of texts that cannot be trained on; names file and row."""


class Pair(NamedTuple):
    """One prompt with its preferred and its other completion, as plain text."""

    prompt: str
    chosen: str
    rejected: str


class Text(NamedTuple):
    """A prompt with one response, of a kind the models never trained on."""

    prompt: str
    response: str


class Prompt(NamedTuple):
    """A prompt without an answer, to measure on."""

    prompt: str


@dataclass(frozen=True)
class Collected:
    """Rows that passed, by number, with a count of those that did not: read == len(rows) + sum(dropped)."""

    name: str
    read: int
    rows: dict[int, Any]
    dropped: Counter[str]

    def keep(self, numbers: Iterable[int], reason: str) -> "Collected":
        """Only the given rows; the others count as dropped for `reason`. Raises PairError if none is left."""
        rows = {number: self.rows[number] for number in numbers}
        dropped = self.dropped + Counter({reason: len(self.rows) - len(rows)})
        if not rows:
            raise PairError(f"{self.name}: no row is left of {self.read} read; dropped: {spell_counts(dropped)}")
        return Collected(self.name, self.read, rows, dropped)


def collect(source: Source, check: Callable[[dict], Pair | Text | Prompt | BadRow], on_bad_row: str) -> Collected:
    """Reads and checks every row.

    Args:
        check: the row as a tuple of texts, or why it is none.
        on_bad_row: 'error' stops at the first bad row; 'drop' counts it by reason.

    Raises:
        PairError: a bad row under 'error', or no good one at all.
    """
    rows: dict[int, Pair | Text | Prompt] = {}
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}  # an example of each reason
    ignored: set[str] = set()
    for number, row in source.rows:
        checked = row if isinstance(row, BadRow) else check(row)
        if not isinstance(checked, BadRow):
            rows[number] = checked
            ignored |= row.keys() - set(checked._fields)
            continue
        message = f"{source.where(number)}: {checked.message}"
        if on_bad_row == "error":
            raise PairError(f"{message}; mend the row or set fetch_pairs.on_bad_row to drop")
        dropped[checked.reason] += 1
        first.setdefault(checked.reason, message)
    if ignored:
        print(f"ignored columns of {source.name}: {spell_names(sorted(ignored))}")
    for reason, message in first.items():
        print(f"dropped {dropped[reason]} rows ({reason}), the first: {message}")
    read = len(rows) + sum(dropped.values())
    if read == 0:
        raise PairError(f"{source.name}: has no rows")
    if not rows:
        example = next(iter(first.values()))
        raise PairError(f"no row of {read} is usable: {spell_counts(dropped)}; the first: {example}")
    return Collected(source.name, read, rows, dropped)


def check_pair(row: dict[str, Any]) -> Pair | BadRow:
    """A row's prompt, chosen and rejected, plain or in TRL's conversational forms; other columns are ignored."""
    row = _plain_texts(row)
    if isinstance(row, BadRow):
        return row
    if problem := _text_problem(row, Pair._fields):
        return problem
    if row["chosen"].strip() == row["rejected"].strip():
        return BadRow("chosen_is_rejected", "'chosen' and 'rejected' are the same text")
    return Pair(row["prompt"], row["chosen"], row["rejected"])


def check_text(row: dict[str, Any]) -> Text | BadRow:
    """A row's prompt and response; other columns are ignored."""
    return _text_problem(row, Text._fields) or Text(row["prompt"], row["response"])


def check_prompt(row: dict[str, Any]) -> Prompt | BadRow:
    """A row's prompt; other columns are ignored."""
    return _text_problem(row, Prompt._fields) or Prompt(row["prompt"])


def without_duplicates(collected: Collected) -> Collected:
    """Drops rows equal to an earlier one in every text."""
    first = {texts: number for number, texts in reversed(collected.rows.items())}
    return collected.keep(sorted(first.values()), "duplicate")


def draw_pairs(collected: Collected, max_pairs: int | None, seed: int) -> Collected:
    """`max_pairs` rows at random, in their own order; None keeps all."""
    numbers = list(collected.rows)
    drawn = draw(len(numbers), max_pairs, seed, "max_pairs")
    return collected.keep([numbers[i] for i in drawn], "over_max_pairs")


def normalise_prompt(prompt: str) -> str:
    """What makes two prompts the same: the text without case, spacing and end punctuation."""
    letters = "".join(unicodedata.normalize("NFKC", prompt).casefold().split())
    end = len(letters)
    while end and unicodedata.category(letters[end - 1]).startswith("P"):
        end -= 1
    return letters[:end]


def number_prompts(pairs: dict[int, Pair]) -> dict[int, int]:
    """Row number -> prompt_id: 0, 1, ... by first appearance, one per distinct normalised prompt."""
    ids: dict[str, int] = {}
    return {row: ids.setdefault(normalise_prompt(pair.prompt), len(ids)) for row, pair in pairs.items()}


def heldout_prompts(num_prompts: int, fraction: float, seed: int) -> set[int]:
    """Prompt ids to hold out, at random: the fraction, rounded, but at least one and not all.

    Raises:
        PairError: fewer than two prompts, which no split can share out.
    """
    if num_prompts < 2:
        raise PairError(f"{num_prompts} distinct prompt: nothing is left after the split; give at least two")
    size = min(max(round(num_prompts * fraction), 1), num_prompts - 1)
    return set(shuffled(num_prompts, seed, HELDOUT_PROMPTS)[:size])


def judge_prompts(num_prompts: int, heldout: set[int], fraction: float, seed: int) -> set[int]:
    """Prompt ids to set apart for the judge, at random among those not held out: the fraction of all prompts,
    rounded, but at least one and not all that are left. Drawn apart from the held-out ones, which stay the same.

    Raises:
        PairError: one prompt is left to train on and to judge by.
    """
    left = [prompt_id for prompt_id in range(num_prompts) if prompt_id not in heldout]
    if len(left) < 2:
        raise PairError(
            f"{num_prompts} distinct prompts: nothing is left to train on after the split into training, "
            "held-out and judge's prompts; give at least three, or lower fetch_pairs.holdout_fraction"
        )
    size = min(max(round(num_prompts * fraction), 1), len(left) - 1)
    return {left[place] for place in shuffled(len(left), seed, "judge_prompts")[:size]}


def without_prompts(collected: Collected, prompts: set[str]) -> Collected:
    """Drops rows whose prompt, normalised, is among `prompts`, or that of an earlier row."""
    first = {normalise_prompt(row.prompt): number for number, row in reversed(collected.rows.items())}
    collected = collected.keep(sorted(first.values()), "repeated_prompt")
    seen = {number for number, row in collected.rows.items() if normalise_prompt(row.prompt) in prompts}
    return collected.keep([number for number in collected.rows if number not in seen], "prompt_of_a_pair")


def spell_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{reason} {count}" for reason, count in counts.items()) or "none"


def spell_names(names: Iterable[str]) -> str:
    """Up to ten names from the data, quoted and cut, so that none can garble a terminal."""
    quoted = [repr(name)[:40] for name in islice(names, 11)]
    return ", ".join(quoted[:10]) + (", ..." if len(quoted) > 10 else "") or "none"


def _text_problem(row: dict[str, Any], columns: tuple[str, ...]) -> BadRow | None:
    for column in columns:
        if column not in row:
            found = spell_names(row)
            return BadRow("missing_column", f"column '{column}' is missing (found: {found})")
        text = row[column]
        if text is None:
            return BadRow("null", f"'{column}' is null")
        if not isinstance(text, str):
            return BadRow("not_text", f"'{column}' is not text but {type(text).__name__}")
        if all(unicodedata.category(character) in INVISIBLE for character in text):
            return BadRow("empty", f"'{column}' is empty")
        if control := CONTROL.search(text):
            code = f"U+{ord(control[0]):04X} at character {control.start() + 1}"
            return BadRow("control_character", f"'{column}' has the control character {code}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            return BadRow("lone_surrogate", f"'{column}' has half a character at {error.start + 1} (a surrogate)")
    return None


def _plain_texts(row: dict[str, Any]) -> dict[str, Any] | BadRow:
    """TRL's conversational forms as plain text: prompt, chosen and rejected are lists of messages, or the
    prompt is the first message of both (TRL's implicit prompt) and may be repeated as text."""
    if not isinstance(row.get("chosen"), list) or not isinstance(row.get("rejected"), list):
        return row
    prompt = row.get("prompt")
    shared = prompt if isinstance(prompt, list) else []
    chosen, rejected = (_turns(shared + row[column]) for column in ("chosen", "rejected"))
    if chosen is None or rejected is None:
        return BadRow("conversation", f"a conversation of another shape; {SINGLE_TURN}")
    if chosen[0] != rejected[0] or (isinstance(prompt, str) and prompt != chosen[0]):
        return BadRow("conversation", "'chosen' and 'rejected' answer different prompts")
    return {"prompt": chosen[0], "chosen": chosen[1], "rejected": rejected[1]}


def _turns(messages: list[Any]) -> tuple[Any, Any] | None:
    if not all(isinstance(message, dict) for message in messages):
        return None
    if [message.get("role") for message in messages] != ["user", "assistant"]:
        return None
    return messages[0].get("content"), messages[1].get("content")
