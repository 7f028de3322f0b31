"""Fetch the preference pairs, check every row, split them by prompt; fetch the unseen texts.

Reads   fetch_pairs.path, fetch_pairs.unseen_path    jsonl, json, csv (each may be .gz) or parquet
        (or the Hub, with fetch_pairs.hub_id, fetch_pairs.unseen_hub_id)
Writes  data/pairs/train.parquet, heldout.parquet    row, prompt_id, prompt, chosen, rejected
        data/pairs/unseen.parquet                    row, prompt, response
        reports/fetch_pairs/metrics.json             source, checksum, everything read, kept and dropped
        reports/fetch_pairs/run.json                 seconds, memory, versions

Run     dvc repro fetch_pairs                        (untracked: python -m stages.fetch_pairs)
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from stages.lib.data.pairs import (
    Pair,
    check_pair,
    check_text,
    collect,
    draw_pairs,
    heldout_prompts,
    normalise_prompt,
    number_prompts,
    without_duplicates,
)
from stages.lib.data.rows import open_source
from stages.lib.run.artefacts import write_json, write_parquet
from stages.lib.run.params import Base, Section
from stages.lib.run.stage import run_stage


class Params(Section):
    hub_id: str | None  # a data set on the Hub; null: take `path`
    revision: str  # of hub_id; a branch is resolved to its commit
    path: str  # columns prompt, chosen, rejected
    unseen_hub_id: str | None  # null: take `unseen_path`
    unseen_revision: str
    unseen_path: str  # columns prompt, response
    on_bad_row: Literal["error", "drop"]
    max_pairs: int | None = Field(ge=2)  # drawn at random; null: all
    holdout_fraction: float = Field(gt=0, lt=1)  # of the distinct prompts


def main(base: Base, params: Params, root: Path = Path(".")) -> dict[str, Any]:
    source = open_source(params.hub_id, params.revision, root / params.path)
    pairs = without_duplicates(collect(source, check_pair, params.on_bad_row))
    pairs = draw_pairs(pairs, params.max_pairs, base.seed)
    prompt_ids = number_prompts(pairs.rows)
    num_prompts = len(set(prompt_ids.values()))
    heldout = heldout_prompts(num_prompts, params.holdout_fraction, base.seed)

    unseen_source = open_source(params.unseen_hub_id, params.unseen_revision, root / params.unseen_path)
    unseen = without_duplicates(collect(unseen_source, check_text, params.on_bad_row))
    paired = {normalise_prompt(pair.prompt) for pair in pairs.rows.values()}
    seen = {row for row, text in unseen.rows.items() if normalise_prompt(text.prompt) in paired}
    unseen = unseen.keep([row for row in unseen.rows if row not in seen], "prompt_of_a_pair")

    splits = {
        "train": {row: pair for row, pair in pairs.rows.items() if prompt_ids[row] not in heldout},
        "heldout": {row: pair for row, pair in pairs.rows.items() if prompt_ids[row] in heldout},
    }
    for split, rows in splits.items():
        columns = {"row": list(rows), "prompt_id": [prompt_ids[row] for row in rows]}
        columns |= {name: [getattr(pair, name) for pair in rows.values()] for name in Pair._fields}
        write_parquet(root / f"data/pairs/{split}.parquet", columns)
    columns = {"row": list(unseen.rows), "prompt": [text.prompt for text in unseen.rows.values()]}
    columns["response"] = [text.response for text in unseen.rows.values()]
    write_parquet(root / "data/pairs/unseen.parquet", columns)

    metrics = source.origin | {
        "read": pairs.read,
        "kept": len(pairs.rows),
        "dropped": dict(pairs.dropped),
        "train_pairs": len(splits["train"]),
        "heldout_pairs": len(splits["heldout"]),
        "train_prompts": num_prompts - len(heldout),
        "heldout_prompts": len(heldout),
        "repeated_prompts": len(pairs.rows) - num_prompts,
        "unseen_texts": len(unseen.rows),
        "unseen": unseen_source.origin | {"read": unseen.read, "dropped": dict(unseen.dropped)},
        "seed": base.seed,
    }
    write_json(root / "reports/fetch_pairs/metrics.json", metrics)
    counts = f"{metrics['train_pairs']} pairs to train on, {metrics['heldout_pairs']} held out"
    print(f"wrote data/pairs: {counts}, {metrics['unseen_texts']} unseen texts")
    print("wrote reports/fetch_pairs/metrics.json")
    return {}


if __name__ == "__main__":
    run_stage("fetch_pairs", main, Params)
