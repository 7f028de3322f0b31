"""What the limits of tokenize_pairs take away from the pairs, and the sentences that warn of it."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from stages.lib.data.messages import prompt_messages

Ids = dict[str, list[int]]


def count_cut_texts(rows: list[dict[str, Any]], whole: list[Ids], cut: list[Ids]) -> Counter[str]:
    """How many of the pairs' prompts and answers are cut, and how many prompts have lost their system message so.

    A long prompt keeps its end, so that its system message, or the beginning of it, is the first thing to go.

    Args:
        rows: of data/pairs.
        whole: their ids uncut.
    """
    counts: Counter[str] = Counter()
    for row, before, after in zip(rows, whole, cut, strict=True):
        shorter = {name for name, ids in after.items() if len(ids) < len(before[name])}
        if "prompt_input_ids" in shorter:
            counts["prompts"] += 1
            counts["system_messages"] += prompt_messages(row)[0]["role"] == "system"
        counts["answers"] += len(shorter - {"prompt_input_ids"})
    return counts


def cut_warnings(cut: Mapping[str, int], num_pairs: int, many: Mapping[str, float]) -> list[str]:
    """What the limits take away from the pairs, a sentence each.

    Args:
        cut: as `count_cut_texts` counts.
        many: shares of all 'prompts' and of all 'answers' above which one is said.
    """
    found = []
    if lost := cut["system_messages"]:
        found.append(
            f"{lost:,} of {num_pairs:,} pairs lost their system message, or its beginning: a prompt above "
            "max_prompt_length keeps its end; raise tokenize_pairs.max_prompt_length"
        )
    if cut["prompts"] > many["prompts"] * num_pairs:
        found.append(
            f"{cut['prompts']:,} of the pairs' {num_pairs:,} prompts ({cut['prompts'] / num_pairs:.0%}) are cut: their "
            "beginning is gone, and the answers may be to what no model sees; raise tokenize_pairs.max_prompt_length"
        )
    if cut["answers"] > many["answers"] * 2 * num_pairs:
        share = cut["answers"] / (2 * num_pairs)
        found.append(
            f"{cut['answers']:,} of the pairs' {2 * num_pairs:,} answers ({share:.0%}) are cut: what tells them apart "
            "may be gone; raise tokenize_pairs.max_length or max_completion_length"
        )
    return found
