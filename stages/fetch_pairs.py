"""Fetch the preference pairs, check every row, split them by prompt; fetch the unseen texts and more prompts.

Reads   fetch_pairs.path, unseen_path, eval_prompts_path    jsonl, json, csv, tsv or parquet
        (a file or a folder of them; or the Hub, with fetch_pairs.hub_id, fetch_pairs.unseen_hub_id)
Writes  data/pairs/{train,heldout,judge}.parquet            row, prompt_id, prompt, chosen, rejected; where a prompt is
                                                            more than a user's turn, messages and tools (JSON) too
        data/pairs/unseen.parquet                           row, prompt, response
        data/pairs/eval_prompts.parquet                     row, prompt; of no pair, to measure answers on
        data/pairs/places.json                              of each of the three sources: where a row's number stands
        reports/fetch_pairs/metrics.json                    source, checksum, all that was read, kept and dropped
        reports/fetch_pairs/run.json                        seconds, memory, versions

Run     dvc repro fetch_pairs                               (untracked: python -m stages.fetch_pairs)
"""

from pathlib import Path
from typing import Any, Self

import pyarrow as pa
from pydantic import Field, model_validator

from stages.lib.data.hub_rows import from_hub
from stages.lib.data.pairs import (
    Collected,
    Pair,
    Prompt,
    Text,
    check_pair,
    check_prompt,
    check_text,
    collect,
    columns_of,
    draw_pairs,
    has_messages,
    heldout_prompts,
    judge_prompts,
    normalise_prompt,
    number_prompts,
    split_as_given,
    without_contradictions,
    without_duplicates,
    without_prompts,
)
from stages.lib.data.rows import from_path, written_places
from stages.lib.data.suspicions import SUSPICIONS, count_turns, suspicious_counts
from stages.lib.run.artefacts import write_json, write_parquet
from stages.lib.run.params import Base, OnBadRow, Section
from stages.lib.run.stage import run_stage

PAIR_COLUMNS = ("prompt", "chosen", "rejected", "system", "tools")
TEXT_COLUMNS = ("prompt", "response", "system", "tools")


class Params(Section):
    hub_id: str | None  # a data set on the Hub; null: take `path`
    revision: str  # of hub_id; a branch is resolved to its commit
    config: str | None  # of hub_id; null: the only one
    split: str | None  # of hub_id; null: train, or the only one
    heldout_split: str | None  # of hub_id, whole in place of holdout_fraction; null: none
    path: str  # a file or a folder; columns prompt, chosen, rejected
    files: str = Field(min_length=1)  # which names of a folder
    heldout_files: str | None = Field(min_length=1)  # which to hold out whole
    columns: dict[str, str]  # our names to the data's
    unseen_hub_id: str | None  # null: take `unseen_path`
    unseen_revision: str
    unseen_config: str | None
    unseen_split: str | None
    unseen_path: str  # columns prompt, response
    unseen_columns: dict[str, str]
    eval_prompts: bool  # whether answers are measured on `eval_prompts_path` too, or on held-out prompts alone
    eval_prompts_path: str  # column prompt
    on_bad_row: OnBadRow
    max_pairs: int | None = Field(ge=2)  # drawn at random; null: all
    holdout_fraction: float = Field(gt=0, lt=1)  # of the distinct prompts
    judge_fraction: float = Field(gt=0, lt=1)  # of the distinct prompts, for the judge alone

    @model_validator(mode="after")
    def _check_columns(self) -> Self:
        for name, known in (("columns", PAIR_COLUMNS), ("unseen_columns", TEXT_COLUMNS)):
            for ours in getattr(self, name):
                if ours not in known:
                    raise ValueError(f"{name}: {ours!r} is no column of ours; ours are {', '.join(known)}")
        if self.heldout_split is not None and self.hub_id is None:
            raise ValueError("heldout_split needs hub_id; of a folder of files, set heldout_files")
        if self.heldout_files is not None and self.hub_id is not None:
            raise ValueError("heldout_files is of a folder of files; of a data set on the Hub, set heldout_split")
        return self

    @model_validator(mode="after")
    def _leave_some_to_train_on(self) -> Self:
        if self.holdout_fraction + self.judge_fraction >= 1:
            raise ValueError(
                "holdout_fraction and judge_fraction together must be below 1, or nothing is left to train on"
            )
        return self


def main(base: Base, params: Params, root: Path = Path(".")) -> dict[str, Any]:
    if params.hub_id is not None:
        where = params.hub_id, params.revision, params.config, params.split
        source = from_hub(*where, heldout_split=params.heldout_split)
    else:
        source = from_path(root / params.path, params.files, params.heldout_files)
    source = source.renamed(params.columns, "columns")
    pairs = without_duplicates(collect(source, check_pair, params.on_bad_row))
    pairs = without_contradictions(pairs, params.on_bad_row, source.where)
    pairs = draw_pairs(pairs, params.max_pairs, base.seed)
    if params.heldout_split is not None or params.heldout_files is not None:
        pairs, heldout = split_as_given(pairs, source.heldout_from)
        prompt_ids = number_prompts(pairs.rows)
        num_prompts = len(set(prompt_ids.values()))
        heldout = {prompt_ids[row] for row in heldout}
    else:
        prompt_ids = number_prompts(pairs.rows)
        num_prompts = len(set(prompt_ids.values()))
        heldout = heldout_prompts(num_prompts, params.holdout_fraction, base.seed)
    judge = judge_prompts(num_prompts, heldout, params.judge_fraction, base.seed)

    if params.unseen_hub_id is not None:
        where = params.unseen_hub_id, params.unseen_revision, params.unseen_config, params.unseen_split
        unseen_source = from_hub(*where, prefix="unseen_")
    else:
        unseen_source = from_path(root / params.unseen_path)
    unseen_source = unseen_source.renamed(params.unseen_columns, "unseen_columns")
    unseen = without_duplicates(collect(unseen_source, check_text, params.on_bad_row))
    paired = {normalise_prompt(pair.prompt) for pair in pairs.rows.values()}
    seen = {row for row, text in unseen.rows.items() if normalise_prompt(text.prompt) in paired}
    unseen = unseen.keep([row for row in unseen.rows if row not in seen], "prompt_of_a_pair")
    eval_prompts: dict[int, Prompt] = {}
    eval_metrics: dict[str, Any] = {}
    places = {"pairs": written_places(source), "unseen": written_places(unseen_source)}
    if params.eval_prompts:
        eval_source = from_path(root / params.eval_prompts_path).renamed({}, None)
        more = without_prompts(collect(eval_source, check_prompt, params.on_bad_row), paired)
        eval_prompts = more.rows
        places["eval_prompts"] = written_places(eval_source)
        eval_metrics = eval_source.origin | counts_of(more)

    split_of = {
        row: "heldout" if i in heldout else "judge" if i in judge else "train" for row, i in prompt_ids.items()
    }
    splits = {
        split: {row: pair for row, pair in pairs.rows.items() if split_of[row] == split}
        for split in ("train", "heldout", "judge")
    }
    for split, rows in splits.items():
        columns = {"row": pa.array(list(rows), pa.int64()), "prompt_id": [prompt_ids[row] for row in rows]}
        columns |= columns_of(rows, Pair, has_messages(pairs.rows))
        write_parquet(root / f"data/pairs/{split}.parquet", columns)
    for name, kind, texts in (("unseen", Text, unseen.rows), ("eval_prompts", Prompt, eval_prompts)):
        columns = {"row": pa.array(list(texts), pa.int64())} | columns_of(texts, kind, has_messages(texts))
        write_parquet(root / f"data/pairs/{name}.parquet", columns)

    write_json(root / "data/pairs/places.json", places)

    metrics = source.origin | counts_of(pairs)
    metrics |= {
        "kept": len(pairs.rows),
        "train_pairs": len(splits["train"]),
        "heldout_pairs": len(splits["heldout"]),
        "judge_pairs": len(splits["judge"]),
        "train_prompts": num_prompts - len(heldout) - len(judge),
        "heldout_prompts": len(heldout),
        "judge_prompts": len(judge),
        "repeated_prompts": len(pairs.rows) - num_prompts,
        "unseen_texts": len(unseen.rows),
        "unseen": unseen_source.origin | counts_of(unseen),
        "eval_prompts": len(eval_prompts),
        "eval": eval_metrics,
        "turns": count_turns(pairs.rows.values()),
        "suspicious": suspicious_counts(pairs.rows.values()),
        "seed": base.seed,
    }
    write_json(root / "reports/fetch_pairs/metrics.json", metrics)
    for what, count in metrics["suspicious"].items():
        if count:
            print(f"warning: {count} of {len(pairs.rows)} pairs {SUSPICIONS[what]}")
    counts = ", ".join(
        f"{metrics[f'{split}_pairs']} {what}"
        for split, what in (("train", "pairs to train on"), ("heldout", "held out"), ("judge", "for the judge"))
    )
    print(f"wrote data/pairs: {counts}, {metrics['unseen_texts']} unseen texts, {len(eval_prompts)} more prompts")
    print("wrote reports/fetch_pairs/metrics.json")
    return {}


def counts_of(collected: Collected) -> dict[str, Any]:
    return {"read": collected.read, "dropped": dict(collected.dropped), "unread": collected.unread}


if __name__ == "__main__":
    run_stage("fetch_pairs", main, Params)
