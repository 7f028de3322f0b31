"""Fetch the preference pairs, check every row, split them by prompt; fetch the unseen texts and more prompts.

Reads   fetch_pairs.path, unseen_path, eval_prompts_path    jsonl, json, csv (each may be .gz) or parquet
        (or the Hub, with fetch_pairs.hub_id, fetch_pairs.unseen_hub_id)
Writes  data/pairs/{train,heldout,judge}.parquet            row, prompt_id, prompt, chosen, rejected
        data/pairs/unseen.parquet                           row, prompt, response
        data/pairs/eval_prompts.parquet                     row, prompt; of no pair, to measure answers on
        reports/fetch_pairs/metrics.json                    source, checksum, all that was read, kept and dropped
        reports/fetch_pairs/run.json                        seconds, memory, versions

Run     dvc repro fetch_pairs                               (untracked: python -m stages.fetch_pairs)
"""

from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from pydantic import Field, model_validator

from stages.lib.data.pairs import (
    Pair,
    Prompt,
    check_pair,
    check_prompt,
    check_text,
    collect,
    draw_pairs,
    heldout_prompts,
    judge_prompts,
    normalise_prompt,
    number_prompts,
    without_duplicates,
    without_prompts,
)
from stages.lib.data.rows import open_source
from stages.lib.run.artefacts import write_json, write_parquet
from stages.lib.run.params import Base, OnBadRow, Section
from stages.lib.run.stage import run_stage


class Params(Section):
    hub_id: str | None  # a data set on the Hub; null: take `path`
    revision: str  # of hub_id; a branch is resolved to its commit
    path: str  # columns prompt, chosen, rejected
    unseen_hub_id: str | None  # null: take `unseen_path`
    unseen_revision: str
    unseen_path: str  # columns prompt, response
    eval_prompts: bool  # whether answers are measured on `eval_prompts_path` too, or on held-out prompts alone
    eval_prompts_path: str  # column prompt
    on_bad_row: OnBadRow
    max_pairs: int | None = Field(ge=2)  # drawn at random; null: all
    holdout_fraction: float = Field(gt=0, lt=1)  # of the distinct prompts
    judge_fraction: float = Field(gt=0, lt=1)  # of the distinct prompts, for the judge alone

    @model_validator(mode="after")
    def _leave_some_to_train_on(self) -> Self:
        if self.holdout_fraction + self.judge_fraction >= 1:
            raise ValueError(
                "holdout_fraction and judge_fraction together must be below 1, or nothing is left to train on"
            )
        return self


def main(base: Base, params: Params, root: Path = Path(".")) -> dict[str, Any]:
    source = open_source(params.hub_id, params.revision, root / params.path)
    pairs = without_duplicates(collect(source, check_pair, params.on_bad_row))
    pairs = draw_pairs(pairs, params.max_pairs, base.seed)
    prompt_ids = number_prompts(pairs.rows)
    num_prompts = len(set(prompt_ids.values()))
    heldout = heldout_prompts(num_prompts, params.holdout_fraction, base.seed)
    judge = judge_prompts(num_prompts, heldout, params.judge_fraction, base.seed)

    unseen_source = open_source(params.unseen_hub_id, params.unseen_revision, root / params.unseen_path)
    unseen = without_duplicates(collect(unseen_source, check_text, params.on_bad_row))
    paired = {normalise_prompt(pair.prompt) for pair in pairs.rows.values()}
    seen = {row for row, text in unseen.rows.items() if normalise_prompt(text.prompt) in paired}
    unseen = unseen.keep([row for row in unseen.rows if row not in seen], "prompt_of_a_pair")
    eval_prompts: dict[int, Prompt] = {}
    eval_metrics: dict[str, Any] = {}
    if params.eval_prompts:
        eval_source = open_source(None, "", root / params.eval_prompts_path)
        more = without_prompts(collect(eval_source, check_prompt, params.on_bad_row), paired)
        eval_prompts = more.rows
        eval_metrics = eval_source.origin | {"read": more.read, "dropped": dict(more.dropped)}

    split_of = {
        row: "heldout" if i in heldout else "judge" if i in judge else "train" for row, i in prompt_ids.items()
    }
    splits = {
        split: {row: pair for row, pair in pairs.rows.items() if split_of[row] == split}
        for split in ("train", "heldout", "judge")
    }
    for split, rows in splits.items():
        columns = {"row": list(rows), "prompt_id": [prompt_ids[row] for row in rows]}
        columns |= {name: [getattr(pair, name) for pair in rows.values()] for name in Pair._fields}
        write_parquet(root / f"data/pairs/{split}.parquet", columns)
    columns = {"row": list(unseen.rows), "prompt": [text.prompt for text in unseen.rows.values()]}
    columns["response"] = [text.response for text in unseen.rows.values()]
    write_parquet(root / "data/pairs/unseen.parquet", columns)
    schema = pa.schema({"row": pa.int64(), "prompt": pa.string()})  # there may be no row to take the types from
    columns = {"row": list(eval_prompts), "prompt": [prompt.prompt for prompt in eval_prompts.values()]}
    write_parquet(root / "data/pairs/eval_prompts.parquet", pa.table(columns, schema))

    metrics = source.origin | {
        "read": pairs.read,
        "kept": len(pairs.rows),
        "dropped": dict(pairs.dropped),
        "train_pairs": len(splits["train"]),
        "heldout_pairs": len(splits["heldout"]),
        "judge_pairs": len(splits["judge"]),
        "train_prompts": num_prompts - len(heldout) - len(judge),
        "heldout_prompts": len(heldout),
        "judge_prompts": len(judge),
        "repeated_prompts": len(pairs.rows) - num_prompts,
        "unseen_texts": len(unseen.rows),
        "unseen": unseen_source.origin | {"read": unseen.read, "dropped": dict(unseen.dropped)},
        "eval_prompts": len(eval_prompts),
        "eval": eval_metrics,
        "seed": base.seed,
    }
    write_json(root / "reports/fetch_pairs/metrics.json", metrics)
    counts = ", ".join(
        f"{metrics[f'{split}_pairs']} {what}"
        for split, what in (("train", "pairs to train on"), ("heldout", "held out"), ("judge", "for the judge"))
    )
    print(f"wrote data/pairs: {counts}, {metrics['unseen_texts']} unseen texts, {len(eval_prompts)} more prompts")
    print("wrote reports/fetch_pairs/metrics.json")
    return {}


if __name__ == "__main__":
    run_stage("fetch_pairs", main, Params)
