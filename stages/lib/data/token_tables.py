"""Token ids of a data set as tables: for DPO, the reward model, PPO and the unseen texts."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from stages.lib.data.chat import (
    ChatError,
    apply_chat_template,
    closed_by_eos,
    completion_ids,
    render_completion,
    render_prompt,
    text_ids,
    tokenize_row,
    truncate,
)
from stages.lib.data.messages import prompt_messages, texts_in
from stages.lib.data.rows import NEARLY_ALL, NUM_FIRST_ROWS
from stages.lib.run.errors import UserError

REMEDIES = {  # of a fault of the whole set
    "special_token": "the texts seem to be written in a chat template already; give plain texts or messages",
    "chat_template": "choose a base model whose template renders them, or take out of the data what it does not",
    "equal_after_cut": "raise tokenize_pairs.max_length or max_completion_length, or see that the answers differ",
}
IDS = pa.list_(pa.int32())
Row = dict[str, Any]  # a row of data/pairs
Ids = dict[str, list[int]]  # prompt_input_ids and its completions, named alike


def without_special_tokens(
    rows: list[Row], pattern: re.Pattern[str], file: str, where: Callable[[int], str], on_bad_row: str
) -> list[Row]:
    """The rows of whose texts none contains a special token of the model.

    Args:
        pattern: `chat.special_token_pattern`.
        file: what the rows were read from, for errors.
        where: the place of a row's number in its source.
        on_bad_row: 'error' stops at such a row, 'drop' leaves it out.

    Raises:
        UserError: such a row under 'error', or no other row beside such.
    """

    def fault_of(row: Row) -> tuple[str, str] | None:
        if found := _special_token(row, pattern):
            return "special_token", f"'{found[0]}' contains the special token {found[1]}"
        return None

    good, _ = _without_faults(rows, fault_of, file, where, on_bad_row)
    return good


def _without_faults(
    rows: list[Row],
    fault_of: Callable[[Row], tuple[str, str] | None],
    file: str,
    where: Callable[[int], str],
    on_bad_row: str,
) -> tuple[list[Row], Counter[str]]:
    """The rows without a fault, and how many have which.

    Args:
        fault_of: reason and sentence, or None.

    Raises:
        UserError: a fault under 'error', or no row without; one that nearly all rows have is told from a row's.
    """
    good: list[Row] = []
    dropped: Counter[str] = Counter()
    first: dict[str, str] = {}
    for row in tqdm(rows, f"look at {Path(file).stem}", mininterval=1, delay=1, unit=" rows"):
        if (fault := fault_of(row)) is None:
            good.append(row)
            continue
        reason, message = fault[0], f"{where(row['row'])}: {fault[1]}"
        if on_bad_row != "drop":
            remedy = "mend the row or set fetch_pairs.on_bad_row to drop"
            begin = [fault_of(each) for each in rows[:NUM_FIRST_ROWS]]
            same = sum(other is not None and other[0] == reason for other in begin)
            if len(begin) >= 3 and same >= NEARLY_ALL * len(begin):
                remedy = f"it is the same in {same} of the first {len(begin)} rows of {file}: {REMEDIES[reason]}"
            raise UserError(f"{message}; {remedy}")
        dropped[reason] += 1
        first.setdefault(reason, message)
    for reason, message in first.items():
        print(f"dropped {dropped[reason]} rows ({reason}), the first: {message}")
    if first and not good:
        reason, message = next(iter(first.items()))
        raise UserError(f"{file}: no row of {len(rows)} is left; {message}: {REMEDIES[reason]}")
    return good, dropped


def _special_token(row: Row, pattern: re.Pattern[str]) -> tuple[str, str] | None:
    """The first column with a special token in it, and the token; columns of JSON are searched by their texts."""
    for name, text in row.items():
        if isinstance(text, str):
            for part in texts_in(json.loads(text)) if name in ("messages", "tools") else (text,):
                if match := pattern.search(part):
                    return name, match[0]
    return None


def usable_ids(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    limits: tuple[int, int | None, int],
    file: str,
    where: Callable[[int], str],
    on_bad_row: str,
) -> tuple[list[Row], list[Ids], list[Ids], Counter[str]]:
    """The rows that the chat template renders and whose two answers still differ once they are cut.

    Args:
        limits: max_prompt_length, max_completion_length and max_length of `truncate`.
        file: what the rows were read from, for errors.
        where: the place of a row's number in its source.
        on_bad_row: 'error' stops at any other row, 'drop' leaves it out.

    Returns:
        Rows, their ids uncut and cut, and how many rows were left out by reason: chat_template, equal_after_cut.

    Raises:
        UserError: such a row under 'error', or no other row beside such.
    """
    whole: dict[int, Ids] = {}
    cut: dict[int, Ids] = {}
    eos = cast(int, tokenizer.eos_token_id)

    def fault_of(row: Row) -> tuple[str, str] | None:
        number = row["row"]
        try:
            whole[number] = token_ids(row, tokenizer, where(number))
        except ChatError as error:
            return "chat_template", str(error).removeprefix(f"{where(number)}: ")
        cut[number] = truncate(whole[number], *limits)
        if "chosen" in row and equal_answers(cut[number], eos):
            return "equal_after_cut", (
                "'chosen' and 'rejected' are equal once cut to the limits of tokenize_pairs (raise max_length or "
                "max_completion_length to tell them apart)"
            )
        return None

    good, dropped = _without_faults(rows, fault_of, file, where, on_bad_row)
    return good, [whole[row["row"]] for row in good], [cut[row["row"]] for row in good], dropped


def equal_answers(ids: Ids, eos_token_id: int) -> bool:
    """Whether chosen and rejected are the same to DPO, or to the reward model, whose last id is always the EOS."""
    prompt, chosen, rejected = (ids[f"{part}_input_ids"] for part in ("prompt", "chosen", "rejected"))
    closed = (closed_by_eos(prompt, answer, eos_token_id) for answer in (chosen, rejected))
    return chosen == rejected or next(closed) == next(closed)


def token_ids(row: Row, tokenizer: PreTrainedTokenizerBase, where: str = "example") -> Ids:
    """Uncut token ids of a pair, of an unseen text ({prompt,response}_input_ids) or of a mere prompt.

    Raises:
        ChatError: the chat template does not render the row; `where` names it.
    """
    prompt = prompt_messages(row)
    tools = json.loads(row["tools"]) if row.get("tools") else None
    if "chosen" in row:
        sides = {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        example = {"prompt": prompt, "tools": tools, "where": where} | sides
        return tokenize_row(apply_chat_template(example, tokenizer), tokenizer, None, None)
    if "response" not in row:
        return {"prompt_input_ids": text_ids(render_prompt(prompt, tokenizer, where, tools), tokenizer)}
    answer = [{"role": "assistant", "content": row["response"]}]
    prompt_text, response = render_completion(prompt, answer, tokenizer, where, tools)
    return {
        "prompt_input_ids": text_ids(prompt_text, tokenizer),
        "response_input_ids": completion_ids(prompt_text, response, tokenizer),
    }


def count_cuts(
    rows: list[Ids], max_prompt_length: int, max_completion_length: int | None, max_length: int
) -> dict[str, int]:
    """How many texts each limit cuts; a completion that both its limits cut counts under both."""
    cuts: dict[str, int] = dict.fromkeys(("max_prompt_length", "max_completion_length", "max_length"), 0)
    for row in rows:
        sizes = {name: len(ids) for name, ids in row.items()}
        prompt = sizes.pop("prompt_input_ids")
        cuts["max_prompt_length"] += prompt > max_prompt_length
        room = max_length - min(prompt, max_prompt_length)
        for size in sizes.values():
            limit = max_completion_length or size
            cuts["max_completion_length"] += size > limit
            cuts["max_length"] += min(size, limit) > room
    return cuts


def corrupted_rows(
    rows: list[Row], ids: list[Ids], pattern: re.Pattern[str], eos_token_id: int
) -> tuple[list[Row], list[Ids]]:
    """The corrupted copies that can be used.

    Not those that hold a special token of their own, and those that are the original once both are cut.

    Args:
        rows: copies of pairs that were kept.
        pattern: `chat.special_token_pattern`.
    """
    good = [
        (row, row_ids)
        for row, row_ids in zip(rows, ids, strict=True)
        if not equal_answers(row_ids, eos_token_id) and not pattern.search(row["rejected"])
    ]
    return [row for row, _ in good], [row_ids for _, row_ids in good]


def pair_columns(rows: list[Row], ids: list[Ids], with_kind: bool = False) -> dict[str, Any]:
    """DPO's table: row, prompt_id, {prompt,chosen,rejected}_input_ids; of corrupted copies their kind too."""
    return _numbers(rows, with_kind) | {
        f"{part}_input_ids": _ids([row[f"{part}_input_ids"] for row in ids])
        for part in ("prompt", "chosen", "rejected")
    }


def reward_columns(rows: list[Row], ids: list[Ids], eos_token_id: int, with_kind: bool = False) -> dict[str, Any]:
    """The reward model's table: row, prompt_id, chosen_ids, rejected_ids, each ending in its one last EOS; of
    corrupted copies their kind too."""
    columns = _numbers(rows, with_kind)
    for side in ("chosen", "rejected"):
        whole = [closed_by_eos(row["prompt_input_ids"], row[f"{side}_input_ids"], eos_token_id) for row in ids]
        columns[f"{side}_ids"] = _ids(whole)
    return columns


def prompt_columns(rows: list[Row], ids: list[Ids]) -> dict[str, Any]:
    """PPO's table: prompt_id, prompt, input_ids; each prompt once, in its first wording."""
    first: dict[int, int] = {}
    for index, row in enumerate(rows):
        first.setdefault(row["prompt_id"], index)
    return {
        "prompt_id": pa.array(list(first), pa.int64()),
        "prompt": pa.array([rows[index]["prompt"] for index in first.values()], pa.string()),
        "input_ids": _ids([ids[index]["prompt_input_ids"] for index in first.values()]),
    }


def text_columns(rows: list[Row], ids: list[Ids]) -> dict[str, Any]:
    """The unseen texts' table: row, prompt_input_ids, response_input_ids."""
    columns = {"row": [row["row"] for row in rows]}
    return columns | {name: _ids([row[name] for row in ids]) for name in ids[0]}


def length_statistics(rows: list[Ids]) -> dict[str, dict[str, float]]:
    """Mean, median, 99th percentile and maximum of each kind of text, in tokens."""
    sizes: dict[str, list[int]] = {}
    for row in rows:
        for name, ids in row.items():
            sizes.setdefault(name.removesuffix("_input_ids"), []).append(len(ids))
    return {
        name: {
            "mean": float(np.mean(lengths)),
            "p50": float(np.percentile(lengths, 50)),
            "p99": float(np.percentile(lengths, 99)),
            "max": max(lengths),
        }
        for name, lengths in sizes.items()
    }


def _numbers(rows: list[Row], with_kind: bool) -> dict[str, Any]:
    types = {"row": pa.int64(), "prompt_id": pa.int64()} | ({"kind": pa.string()} if with_kind else {})
    return {name: pa.array([row[name] for row in rows], of) for name, of in types.items()}


def _ids(rows: list[list[int]]) -> pa.Array:
    return pa.array(rows, IDS)
