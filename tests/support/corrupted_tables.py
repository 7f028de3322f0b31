"""Corrupted copies and the judge's prompts for tests that make their token tables by hand."""

from pathlib import Path

import pyarrow as pa

from stages.lib.run.artefacts import read_parquet, write_parquet

IDS = pa.list_(pa.int32())


def spoilt(ids: list[int], keep_last: bool) -> list[int]:
    """The ids backwards, the last one perhaps in its place: of the same length, and another text."""
    return ids[-2::-1] + ids[-1:] if keep_last else ids[::-1]


def write_negatives(root: Path) -> None:
    """pairs_negatives.parquet: one copy of every training pair, its chosen answer backwards."""
    pairs = read_parquet(root / "data/tokenized/pairs_train.parquet")
    columns = {"row": pairs["row"], "prompt_id": pairs["prompt_id"], "kind": ["shuffle"] * len(pairs["row"])}
    columns["prompt_input_ids"] = pa.array(pairs["prompt_input_ids"], IDS)
    columns["chosen_input_ids"] = pa.array(pairs["chosen_input_ids"], IDS)
    columns["rejected_input_ids"] = pa.array([spoilt(ids, False) for ids in pairs["chosen_input_ids"]], IDS)
    write_parquet(root / "data/tokenized/pairs_negatives.parquet", columns)


def write_reward_negatives(root: Path) -> None:
    """reward_negatives_{train,heldout}.parquet: two kinds of copies of every chosen answer."""
    for split in ("train", "heldout"):
        pairs = read_parquet(root / f"data/tokenized/reward_{split}.parquet")
        copies = {
            "loop": [
                ids[: len(ids) // 2] + ids[len(ids) // 2 - 3 : len(ids) // 2] * 5 + ids[-1:]
                for ids in pairs["chosen_ids"]
            ],
            "shuffle": [ids[:5] + spoilt(ids[5:], True) for ids in pairs["chosen_ids"]],
        }
        columns = {name: pairs[name] * len(copies) for name in ("row", "prompt_id")}
        columns["kind"] = [kind for kind in copies for _ in pairs["row"]]
        columns["chosen_ids"] = pa.array(pairs["chosen_ids"] * len(copies), IDS)
        columns["rejected_ids"] = pa.array([ids for texts in copies.values() for ids in texts], IDS)
        write_parquet(root / f"data/tokenized/reward_negatives_{split}.parquet", columns)


def write_judge_prompts(root: Path) -> None:
    """prompts_judge.parquet: the first three held-out prompts under ids of their own."""
    pairs = read_parquet(root / "data/tokenized/pairs_heldout.parquet")
    columns = {"prompt_id": [900, 901, 902], "prompt": ["?"] * 3}
    columns["input_ids"] = pa.array((pairs["prompt_input_ids"] * 3)[:3], IDS)
    write_parquet(root / "data/tokenized/prompts_judge.parquet", columns)
