"""Preference pairs: what a valid row is, counting those that are not, duplicates, the split by prompt."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from math import inf
from typing import Any, NamedTuple

import pyarrow as pa

from stages.lib.data.conversations import keys_left_unread, last_role, read_conversation, spell_names
from stages.lib.data.messages import BadRow
from stages.lib.data.rows import NEARLY_ALL, NUM_FIRST_ROWS, Source
from stages.lib.run.draws import HELDOUT_PROMPTS, draw, shuffled
from stages.lib.run.errors import UserError

OTHER_NAMES = {  # under which the field knows our columns
    "prompt": (
        "question", "instruction", "input", "query", "user_prompt", "problem", "context", "user", "history",
        "conversations", "conversation", "messages",
    ),
    "chosen": (
        "chosen_response", "response_chosen", "answer_chosen", "accepted", "preferred", "better", "win",
        "preferred_output",
    ),
    "rejected": (
        "rejected_response", "response_rejected", "answer_rejected", "dispreferred", "worse", "lose",
        "non_preferred_output",
    ),
    "response": ("answer", "output", "completion", "target", "chosen"),
}  # fmt: skip
ANSWERS = {"chosen", "rejected", "response"}
SYSTEM_NAMES = ("system_prompt", "system_message", "system_instruction", "sys_prompt")
# may belong to the prompt
BESIDE_THE_PROMPT = {"question", "instruction", "input", "query", "problem", "context", "history", *SYSTEM_NAMES}


class PairError(UserError):
    """A row or a data set of texts that cannot be trained on; names file and row."""


class Pair(NamedTuple):
    """One prompt with its preferred and its other completion.

    Of all three kinds of row `prompt` is the whole prompt as one text; where it is more than a user's turn,
    `messages` has its turns as JSON, and `tools` the tools it may call.
    """

    prompt: str
    chosen: str
    rejected: str
    messages: str | None = None
    tools: str | None = None


class Text(NamedTuple):
    """A prompt with one response, of a kind the models never trained on."""

    prompt: str
    response: str
    messages: str | None = None
    tools: str | None = None


class Prompt(NamedTuple):
    """A prompt without an answer, to measure on."""

    prompt: str
    messages: str | None = None
    tools: str | None = None


@dataclass(frozen=True)
class Collected:
    """Rows that passed, by number, with a count of those that did not: read == len(rows) + sum(dropped)."""

    name: str
    read: int
    rows: dict[int, Any]
    dropped: Counter[str]
    heldout_from: float = inf  # the number above which rows are those to hold out whole
    #: under 'columns' and 'message_keys': how many rows have each that is not read
    unread: dict[str, dict[str, int]] = field(default_factory=dict)

    def keep(self, numbers: Iterable[int], reason: str) -> "Collected":
        """Only the given rows; the others count as dropped for `reason`. Raises PairError if none is left."""
        rows = {number: self.rows[number] for number in numbers}
        dropped = self.dropped + Counter({reason: len(self.rows) - len(rows)})
        if not rows:
            raise PairError(f"{self.name}: no row is left of {self.read} read; dropped: {spell_counts(dropped)}")
        return replace(self, rows=rows, dropped=dropped)


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
    columns: Counter[str] = Counter()  # rows that have each column, or key of a message, that is not read
    keys: Counter[str] = Counter()
    lost: Counter[str] = Counter()  # rows whose text in an ignored column is not in the prompt
    begin = list(islice(source.rows, NUM_FIRST_ROWS))
    if fault := _fault_of_the_file(source, begin, check, on_bad_row):
        raise PairError(fault)

    def refuse(number: int, bad: BadRow) -> None:
        message = f"{source.where(number)}: {bad.message}"
        if on_bad_row == "error":
            raise PairError(f"{message}; mend the row or set fetch_pairs.on_bad_row to drop")
        dropped[bad.reason] += 1
        first.setdefault(bad.reason, message)

    for number, row in chain(begin, source.rows):
        if isinstance(row, BadRow):
            refuse(number, row)
            continue
        checked = check(row)
        if isinstance(checked, BadRow):
            refuse(number, checked)
            continue
        rows[number] = checked
        read_columns = {*checked._fields, "system"} - {"messages"}
        columns.update(row.keys() - read_columns)
        keys.update(keys_left_unread(row, tuple(read_columns & ANSWERS)))
        lost.update(name for name in BESIDE_THE_PROMPT & row.keys() if not _is_within(row[name], checked.prompt))
    for what, names in (("columns", columns), ("keys inside messages", keys)):
        if names:
            print(f"ignored {what} of {source.name}: {spell_names(sorted(names))}")
    for name in sorted(lost):
        remedy = "where it belongs to the question, join the two"
        if name in SYSTEM_NAMES:
            line = f"{source.columns_key}: {_as_line(source.columns | {'system': name})}"
            use = f"set in params.yaml, fetch_pairs: {line}" if source.columns_key else "call the column system"
            remedy = f"if it is the system message, {use}"
        print(
            f"warning: {lost[name]} of {len(rows)} rows of {source.name} have a text in the column {name!r} that "
            f"is not part of the prompt, and so not trained on: {remedy}"
        )
    for reason, message in first.items():
        print(f"dropped {dropped[reason]} rows ({reason}), the first: {message}")
    read = len(rows) + sum(dropped.values())
    if read == 0:
        raise PairError(f"{source.name}: has no rows")
    if not rows:
        example = next(iter(first.values()))
        raise PairError(f"no row of {read} is usable: {spell_counts(dropped)}; the first: {example}")
    heldout_from = min((part.offset for part in source.parts if part.heldout), default=inf)
    unread = {
        what: {repr(name)[1:-1][:40]: count for name, count in sorted(counts.items())}
        for what, counts in (("columns", columns), ("message_keys", keys))
    }
    return Collected(source.name, read, rows, dropped, heldout_from, unread)


def _fault_of_the_file(
    source: Source, begin: list[tuple[int, Any]], check: Callable[[dict], Any], on_bad_row: str
) -> str | None:
    """What is wrong with the whole file where nearly all its first rows have one fault, with a remedy; else None.

    Where rows are dropped, only a fault of all of them that has a remedy of its own.
    """
    checked = [(number, row if isinstance(row, BadRow) else check(row)) for number, row in begin]
    bad_rows = [(number, bad) for number, bad in checked if isinstance(bad, BadRow)]
    reason, count = next(iter(Counter(bad.reason for _, bad in bad_rows).most_common(1)), (None, 0))
    if not count or count < NEARLY_ALL * len(checked):
        return None
    number, bad = next(each for each in bad_rows if each[1].reason == reason)
    # a fault of 'conversation': the prompt's turns may be in another column
    if count == len(checked) and reason in ("missing_column", "conversation"):
        row = next(row for _, row in begin if isinstance(row, dict))
        if line := _renaming(source, row):
            return f"{source.name}: {line}"
        if reason == "missing_column":
            return f"{source.name}: {bad.message}"
    if len(checked) < 3 or on_bad_row == "drop":
        return None
    rows = f"all {count} rows" if len(checked) < NUM_FIRST_ROWS else f"the first {count} rows"
    rows = rows if count == len(checked) else f"{count} of the first {len(checked)} rows"
    return f"{source.where(number)}: {bad.message}; it is the same in {rows}: mend the file"


def _renaming(source: Source, row: dict[str, Any]) -> str:
    """The line for params.yaml where the names of a row's columns make it obvious."""
    if source.columns_key is None:
        return ""
    wanted = ("prompt", "response") if source.columns_key == "unseen_columns" else ("prompt", "chosen", "rejected")
    spelt = {name.strip().casefold(): name for name in row}
    missing = [ours for ours in wanted if ours not in row]
    pairs = {}
    for ours in missing:
        there = [spelt[name] for name in OTHER_NAMES[ours] if name in spelt and _may_be(ours, row[spelt[name]])]
        if ours in spelt:
            pairs[ours] = spelt[ours]
        elif len(there) == 1:
            pairs[ours] = there[0]
    if not pairs:
        return ""
    if "system" not in row.keys() | source.columns.keys():
        there = [spelt[name] for name in SYSTEM_NAMES if name in spelt]
        pairs |= {"system": there[0]} if len(there) == 1 else {}
    return (
        f"column '{missing[0]}' is missing; if these are they, set in params.yaml, fetch_pairs: "
        f"{source.columns_key}: {_as_line(source.columns | pairs)} (found: {spell_names(row)})"
    )


def _as_line(columns: dict[str, str]) -> str:
    """A value of `columns` as YAML in one line."""
    return "{" + ", ".join(f"{ours}: {_as_yaml(theirs)}" for ours, theirs in columns.items()) + "}"


def _may_be(ours: str, value: Any) -> bool:
    """Whether a value has a form that is read as our column: a prompt's last turn is not the assistant's."""
    return ours != "prompt" or not isinstance(value, list | dict) or last_role(value) in ("user", "tool")


def _as_yaml(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_][\w-]*", name) else json.dumps(name, ensure_ascii=False)


def _is_within(value: Any, prompt: str) -> bool:
    """Whether a column says nothing that the prompt does not."""
    return not value or (isinstance(value, str) and value.strip() in prompt)


def check_pair(row: dict[str, Any]) -> Pair | BadRow:
    """A row's prompt, chosen and rejected, in any form that conversations.py reads; other columns are ignored."""
    read = read_conversation(row, ("chosen", "rejected"))
    if isinstance(read, BadRow):
        return read
    pair = Pair(read.prompt, **read.answers, messages=read.written_messages, tools=read.written_tools)
    if pair.chosen.strip() == pair.rejected.strip():
        return BadRow("chosen_is_rejected", "'chosen' and 'rejected' are the same text")
    for side in ("chosen", "rejected"):
        if read.answers[side].strip() in (read.messages[-1]["content"].strip(), pair.prompt.strip()):
            return BadRow("answer_is_prompt", f"'{side}' is only the prompt again")
    return pair


def check_text(row: dict[str, Any]) -> Text | BadRow:
    """A row's prompt and response, in any form that conversations.py reads; other columns are ignored."""
    read = read_conversation(row, ("response",))
    if isinstance(read, BadRow):
        return read
    return Text(read.prompt, read.answers["response"], read.written_messages, read.written_tools)


def check_prompt(row: dict[str, Any]) -> Prompt | BadRow:
    """A row's prompt, in any form that conversations.py reads; other columns are ignored."""
    read = read_conversation(row, ())
    if isinstance(read, BadRow):
        return read
    return Prompt(read.prompt, read.written_messages, read.written_tools)


def without_duplicates(collected: Collected) -> Collected:
    """Drops rows equal to an earlier one in every text, among those to hold out whole and among the others."""
    rows = reversed(collected.rows.items())
    first = {(number > collected.heldout_from, texts): number for number, texts in rows}
    return collected.keep(sorted(first.values()), "duplicate")


def without_contradictions(collected: Collected, on_bad_row: str, where: Callable[[int], str]) -> Collected:
    """Drops all pairs of a prompt that stand the other way round as well: which answer is preferred is not said.

    Args:
        on_bad_row: 'error' stops at the first such pair.
        where: the place of a row's number.

    Raises:
        PairError: such a pair under 'error', or no other beside such.
    """
    bare = {
        row: pair._replace(
            prompt=normalise_prompt(pair.prompt), chosen=pair.chosen.strip(), rejected=pair.rejected.strip()
        )
        for row, pair in collected.rows.items()
    }
    first = {pair: row for row, pair in bare.items()}
    good = []
    for number, pair in bare.items():
        if (other := first.get(pair._replace(chosen=pair.rejected, rejected=pair.chosen))) is None:
            good.append(number)
        elif on_bad_row == "error":
            raise PairError(
                f"{where(number)}: contradicts {where(other)}, which prefers the other of the same two answers; "
                "mend one of the rows or set fetch_pairs.on_bad_row to drop, which drops both"
            )
    return collected.keep(good, "contradiction")


def split_as_given(collected: Collected, offset: int) -> tuple[Collected, set[int]]:
    """Without the training rows whose prompt is held out; and the numbers of the held-out rows, those above `offset`.

    Raises:
        PairError: no row is held out, or none is left to train on.
    """
    heldout = {row for row in collected.rows if row > offset}
    prompts = {normalise_prompt(collected.rows[row].prompt) for row in heldout}
    kept = [
        row
        for row, pair in collected.rows.items()
        if row in heldout or normalise_prompt(pair.prompt) not in prompts
    ]
    if not heldout or len(kept) == len(heldout):
        others = len(kept) - len(heldout)
        raise PairError(f"{collected.name}: {len(heldout)} held-out pairs and {others} to train on are left")
    return collected.keep(kept, "prompt_of_heldout_split"), heldout


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


def columns_of(
    rows: dict[int, Pair] | dict[int, Text] | dict[int, Prompt], kind: type, extra: bool
) -> dict[str, Any]:
    """The columns of a table of data/pairs after its numbers.

    Args:
        kind: Pair, Text or Prompt, which names the columns.
        extra: whether any row of the data set has `messages` or `tools`; without, there are no such columns.
    """
    names = [name for name in kind._fields if extra or name not in ("messages", "tools")]
    return {name: pa.array([getattr(row, name) for row in rows.values()], pa.string()) for name in names}


def has_messages(rows: dict[int, Any]) -> bool:
    """Whether any prompt is more than a user's turn, so that its table has columns for that."""
    return any(row.messages is not None or row.tools is not None for row in rows.values())
