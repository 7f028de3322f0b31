"""Token ids of a data set as tables: for DPO, the reward model, PPO and the unseen texts."""

import re
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from stages.lib.data.chat import (
    apply_chat_template,
    closed_by_eos,
    completion_ids,
    render_completion,
    render_prompt,
    text_ids,
    to_implicit_prompt_preferences,
    tokenize_row,
)
from stages.lib.run.errors import UserError

IDS = pa.list_(pa.int32())
Row = dict[str, Any]  # a row of data/pairs
Ids = dict[str, list[int]]  # prompt_input_ids and its completions, named alike


def without_special_tokens(rows: list[Row], pattern: re.Pattern[str], file: str, on_bad_row: str) -> list[Row]:
    """The rows of whose texts none contains a special token of the model.

    Args:
        pattern: `chat.special_token_pattern`.
        file: where the rows are from, for errors.
        on_bad_row: 'error' stops at such a row, 'drop' leaves it out.

    Raises:
        UserError: such a row under 'error', or no other row beside such.
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
    if first and not good:
        raise UserError(f"{file}: no row of {len(rows)} is left; {first}")
    return good


def token_ids(row: Row, tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Uncut token ids of a pair, of an unseen text ({prompt,response}_input_ids) or of a mere prompt."""
    if "chosen" in row:
        example = to_implicit_prompt_preferences(row) | {"row": row["row"]}
        return tokenize_row(apply_chat_template(example, tokenizer), tokenizer, None, None)
    question = [{"role": "user", "content": row["prompt"]}]
    if "response" not in row:
        where = f"row {row['row']} of the prompts to measure on"
        return {"prompt_input_ids": text_ids(render_prompt(question, tokenizer, where), tokenizer)}
    answer = [{"role": "assistant", "content": row["response"]}]
    prompt, response = render_completion(question, answer, tokenizer, f"row {row['row']} of the unseen texts")
    return {
        "prompt_input_ids": text_ids(prompt, tokenizer),
        "response_input_ids": completion_ids(prompt, response, tokenizer),
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


def corrupted_rows(
    rows: list[Row], ids: list[Ids], pattern: re.Pattern[str], pairs: list[Row]
) -> tuple[list[Row], list[Ids]]:
    """The corrupted copies that can be used.

    Not those of a pair that was dropped, those that hold a special token of their own, and those whose token ids
    are the original's once both are cut.

    Args:
        pattern: `chat.special_token_pattern`.
        pairs: those that were kept.
    """
    kept = {pair["row"] for pair in pairs}
    good = [
        (row, row_ids)
        for row, row_ids in zip(rows, ids, strict=True)
        if row["row"] in kept
        and row_ids["chosen_input_ids"] != row_ids["rejected_input_ids"]
        and not pattern.search(row["rejected"])
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
