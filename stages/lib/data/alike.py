"""Pairs that say the same, or the opposite, of what the models see of them: once cut, and in each model's form."""

import hashlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from stages.lib.data.chat import closed_by_eos
from stages.lib.run.errors import UserError

Ids = dict[str, list[int]]


def contradictions(pairs: Iterable[tuple[dict[str, Any], Ids]], eos_token_id: int) -> dict[int, int]:
    """Of each pair that stands the other way round as well, to DPO or to the reward model, the row and the other's.

    Prompts are the same where their prompt_id is, or what is left of them.

    Args:
        pairs: rows of data/pairs with their ids once cut; no row has two equal answers.
    """
    views: dict[int, list[tuple[Any, ...]]] = {}
    for row, ids in pairs:
        answers = [ids["chosen_input_ids"], ids["rejected_input_ids"]]
        closed = [closed_by_eos([], answer, eos_token_id) for answer in answers]
        forms = [tuple(map(_digest, answers)), tuple(map(_digest, closed))]
        prompts = (row["prompt_id"], _digest(ids["prompt_input_ids"]))
        views[row["row"]] = [(prompt, *form) for prompt in prompts for form in forms]
    seen = {view: number for number, of in views.items() for view in of}
    found = {}
    for number, of in views.items():
        turned = [(prompt, rejected, chosen) for prompt, chosen, rejected in of]
        if others := [seen[view] for view in turned if view in seen]:
            found[number] = others[0]
    return found


def repetitions(pairs: Iterable[tuple[dict[str, Any], Ids]]) -> set[int]:
    """The rows of pairs whose ids, once cut, are all those of a pair before them."""
    seen, found = set(), set()
    for row, ids in pairs:
        texts = tuple(_digest(ids[f"{part}_input_ids"]) for part in ("prompt", "chosen", "rejected"))
        if texts in seen:
            found.add(row["row"])
        seen.add(texts)
    return found


def require_no_contradiction(found: dict[int, int], where: Callable[[int], str]) -> None:
    """
    Args:
        found: as `contradictions` says.
        where: the place of a row's number.

    Raises:
        UserError: there is one.
    """
    for number, other in found.items():
        raise UserError(
            f"{where(number)}: contradicts {where(other)} once both are cut to the limits of tokenize_pairs: raise "
            "max_length, max_prompt_length or max_completion_length, mend one of the rows, or set "
            "fetch_pairs.on_bad_row to drop, which drops both"
        )


def _digest(ids: list[int]) -> bytes:
    """16 bytes in place of the ids, of which there may be a hundred thousand lists."""
    return hashlib.blake2b(np.asarray(ids, np.int32).tobytes(), digest_size=16).digest()
