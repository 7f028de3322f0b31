"""Token ids of a data set as tables: for DPO, the reward model, PPO and the unseen texts."""

import re
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from stages.lib.data.chat import (
    apply_chat_template,
    closed_by_eos,
    render_completion,
    text_ids,
    to_implicit_prompt_preferences,
    tokenize_row,
)
from stages.lib.run.errors import UserError

IDS = pa.list_(pa.int32())
Row = dict[str, Any]  # a row of data/pairs
Ids = dict[str, list[int]]  # prompt_input_ids and its completions, named alike


def rows_of(columns: dict[str, list]) -> list[Row]:
    """Columns as a list of rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def without_special_tokens(rows: list[Row], pattern: re.Pattern[str], file: str, on_bad_row: str) -> list[Row]:
    """The rows of whose texts none contains a special token of the model.

    Args:
        pattern: `chat.special_token_pattern`.
        file: where the rows are from, for errors.
        on_bad_row: 'error' stops at such a row, 'drop' leaves it out.

    Raises:
        UserError: such a row under 'error', or no other row at all.
    """
    good, first = [], None
    for row in rows:
        columns = [name for name, text in row.items() if isinstance(text, str) and pattern.search(text)]
        if not columns:
            good.append(row)
            continue
        token = pattern.search(row[columns[0]])[0]
        message = f"{file}, row {row['row']} of the source: '{columns[0]}' contains the special token {token}"
        if on_bad_row != "drop":
            raise UserError(f"{message}; mend the row or set fetch_pairs.on_bad_row to drop")
        first = first or message
    if first:
        print(f"dropped {len(rows) - len(good)} rows (special_token), the first: {first}")
    if not good:
        raise UserError(f"{file}: no row of {len(rows)} is left; {first}")
    return good


def token_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Uncut token ids of a pair, or of an unseen text as prompt_input_ids and response_input_ids."""
    if "response" not in row:
        example = to_implicit_prompt_preferences(row) | {"row": row["row"]}
        return tokenize_row(apply_chat_template(example, tokenizer), tokenizer, None, None)
    question = [{"role": "user", "content": row["prompt"]}]
    answer = [{"role": "assistant", "content": row["response"]}]
    prompt, response = render_completion(question, answer, tokenizer, f"row {row['row']} of the unseen texts")
    return {
        "prompt_input_ids": text_ids(prompt, tokenizer),
        "response_input_ids": text_ids(response, tokenizer),
    }


def count_cuts(
    rows: list[Ids], max_prompt_length: int, max_completion_length: int | None, max_length: int
) -> dict[str, int]:
    """How many texts each limit cuts; a completion that both its limits cut counts under both."""
    cuts = dict.fromkeys(("max_prompt_length", "max_completion_length", "max_length"), 0)
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


def pair_columns(rows: list[Row], ids: list[Ids]) -> dict[str, Any]:
    """DPO's table: row, prompt_id, prompt_input_ids, chosen_input_ids, rejected_input_ids."""
    return _numbers(rows, "row", "prompt_id") | {name: _ids([row[name] for row in ids]) for name in ids[0]}


def reward_columns(rows: list[Row], ids: list[Ids], eos_token_id: int) -> dict[str, Any]:
    """The reward model's table: row, prompt_id, chosen_ids, rejected_ids, each ending in its one last EOS."""
    columns = _numbers(rows, "row", "prompt_id")
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
        "prompt_id": list(first),
        "prompt": [rows[index]["prompt"] for index in first.values()],
        "input_ids": _ids([ids[index]["prompt_input_ids"] for index in first.values()]),
    }


def text_columns(rows: list[Row], ids: list[Ids]) -> dict[str, Any]:
    """The unseen texts' table: row, prompt_input_ids, response_input_ids."""
    return _numbers(rows, "row") | {name: _ids([row[name] for row in ids]) for name in ids[0]}


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


def _numbers(rows: list[Row], *names: str) -> dict[str, Any]:
    return {name: [row[name] for row in rows] for name in names}


def _ids(rows: list[list[int]]) -> pa.Array:
    return pa.array(rows, IDS)
