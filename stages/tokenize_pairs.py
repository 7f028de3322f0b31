"""Apply the chat template and make token ids for DPO, the reward model and PPO.

Reads   data/pairs, data/corrupted, models/base           texts; tokenizer and chat template
Writes  data/tokenized/pairs_{train,heldout}.parquet      row, prompt_id, {prompt,chosen,rejected}_input_ids
        data/tokenized/pairs_negatives.parquet            the same and kind: a training pair's corrupted copy
        data/tokenized/reward_{train,heldout}.parquet     row, prompt_id, chosen_ids, rejected_ids; end in EOS
        data/tokenized/reward_negatives_{train,heldout}.parquet   the same and kind: every corrupted copy
        data/tokenized/judge_pairs.parquet                the judge's pairs, as pairs_train
        data/tokenized/judge_{corrupted,short}.parquet    its corrupted copies, its short answers
        data/tokenized/prompts_{train,heldout,judge,eval}.parquet   prompt_id, prompt, input_ids; one row a prompt
        data/tokenized/unseen.parquet                     row, prompt_input_ids, response_input_ids
        reports/tokenize_pairs/metrics.json               lengths, truncations, rows dropped
        reports/tokenize_pairs/run.json                   seconds, tokens/s, memory, versions

Run     dvc repro tokenize_pairs                          (untracked: python -m stages.tokenize_pairs)
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self, cast

from pydantic import Field, model_validator
from tqdm import tqdm
from transformers import AutoConfig

from stages.lib.data.alike import contradictions, repetitions, require_no_contradiction
from stages.lib.data.chat import generation_header_ids, special_token_pattern, truncate
from stages.lib.data.cuts import count_cut_texts, cut_warnings
from stages.lib.data.rows import read_places
from stages.lib.data.sizes import too_few_for_the_judge
from stages.lib.data.token_tables import (
    Ids,
    Row,
    corrupted_rows,
    count_cuts,
    length_statistics,
    pair_columns,
    prompt_columns,
    reward_columns,
    text_columns,
    token_ids,
    usable_ids,
    without_special_tokens,
)
from stages.lib.model.loading import load_tokenizer
from stages.lib.run.artefacts import read_json, read_rows, round_floats, write_json, write_parquet
from stages.lib.run.params import Base, OnBadRow, Section, load_param, require
from stages.lib.run.stage import run_stage

MANY_CUT = {"answers": 0.2, "prompts": 0.1}  # shares of the pairs' texts that are cut, above which the stage warns
PAIRS = ("train", "heldout", "judge")
SOURCES = (*PAIRS, "unseen", "eval_prompts")
COPIES = {  # tables of data/corrupted, and of which pairs their rows are copies
    "train": "train",
    "heldout": "heldout",
    "negatives": "train",
    "judge": "judge",
    "judge_short": "judge",
}
ANSWERS = (  # what is sampled after a prompt, in tokens
    ("train_dpo", "response_length"),
    ("train_ppo", "response_length"),
    ("sample_responses", "max_new_tokens"),
    ("sample_responses", "first_max_new_tokens"),
)


class Params(Section):
    max_prompt_length: int = Field(ge=1)  # tokens; a longer prompt keeps its end
    max_completion_length: int | None = Field(ge=1)  # tokens; a longer completion keeps its beginning
    max_length: int  # tokens of both; the completion loses its end

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_length <= self.max_prompt_length:
            raise ValueError(
                f"max_length ({self.max_length}) must be above max_prompt_length ({self.max_prompt_length}), "
                "or no completion fits"
            )
        return self


def main(base: Base, params: Params, root: Path = Path(".")) -> dict[str, Any]:
    tokenizer = load_tokenizer(root / "models/base")
    eos = cast(int, tokenizer.eos_token_id)
    num_header_tokens = len(generation_header_ids(tokenizer))
    require(
        params.max_prompt_length >= num_header_tokens,
        f"params.yaml: tokenize_pairs.max_prompt_length must hold the {num_header_tokens} tokens before an answer",
    )
    check_positions(params, root)
    on_bad_row = load_param("fetch_pairs", "on_bad_row", OnBadRow, root)
    pattern = special_token_pattern(tokenizer)
    read = {name: read_rows(root / f"data/pairs/{name}.parquet") for name in SOURCES}
    places = {name: read_places(each) for name, each in read_json(root / "data/pairs/places.json").items()}
    file_of = {name: f"data/pairs/{name}.parquet" for name in SOURCES}
    where_of = {name: places.get("pairs" if name in PAIRS else name, str) for name in SOURCES}
    rows = {
        name: without_special_tokens(read[name], pattern, file_of[name], where_of[name], on_bad_row)
        for name in SOURCES
    }
    # a number for each prompt to measure on, after those of the pairs
    first = 1 + max(row["prompt_id"] for name in PAIRS for row in read[name])
    rows["eval_prompts"] = [row | {"prompt_id": i} for i, row in enumerate(rows["eval_prompts"], first)]

    limits = (params.max_prompt_length, params.max_completion_length, params.max_length)
    cuts: Counter[str] = Counter()
    dropped = Counter(special_token=sum(len(read[name]) - len(rows[name]) for name in SOURCES))
    whole: dict[str, list[Ids]] = {}
    ids: dict[str, list[Ids]] = {}
    for name in SOURCES:
        rows[name], whole[name], ids[name], faults = usable_ids(
            rows[name], tokenizer, limits, file_of[name], where_of[name], on_bad_row
        )
        dropped += faults

    alike = alike_rows(rows, ids, eos, where_of["train"], on_bad_row)
    dropped += Counter({reason: len(numbers) for reason, numbers in alike.items()})
    gone = {number for numbers in alike.values() for number in numbers}
    for name in PAIRS if gone else ():
        left = [place for place, row in enumerate(rows[name]) if row["row"] not in gone]
        require(
            bool(left), f"{file_of[name]}: no row of {len(rows[name])} is left: once cut, they contradict others"
        )
        rows[name], whole[name], ids[name] = (
            [of[place] for place in left] for of in (rows[name], whole[name], ids[name])
        )
    cut_of_pairs: Counter[str] = Counter()
    for name in SOURCES:
        cuts.update(count_cuts(whole[name], *limits))
        if name in PAIRS:
            cut_of_pairs += count_cut_texts(rows[name], whole[name], ids[name])

    problem = too_few_for_the_judge([row["prompt_id"] for row in rows["judge"]])
    require(problem is None, f"data/pairs/judge.parquet: {problem}")

    copies = {name: read_rows(root / f"data/corrupted/{name}.parquet") for name in COPIES}
    usable = {}
    cuts_of_copies: Counter[str] = Counter()
    for name, split in COPIES.items():
        kept = {row["row"] for row in rows[split]}
        todo = [copy for copy in copies[name] if copy["row"] in kept]
        uncut = [
            token_ids(copy, tokenizer)
            for copy in tqdm(todo, f"tokenize corrupted {name}", mininterval=1, unit=" rows")
        ]
        cuts_of_copies.update(count_cuts(uncut, *limits))
        cut = [truncate(copy, *limits) for copy in uncut]
        usable[name] = corrupted_rows(todo, cut, pattern, eos)

    folder = root / "data/tokenized"
    for split in ("train", "heldout"):
        write_parquet(folder / f"pairs_{split}.parquet", pair_columns(rows[split], ids[split]))
        reward = reward_columns(rows[split], ids[split], eos)
        write_parquet(folder / f"reward_{split}.parquet", reward)
        copied, copied_ids = usable[split]
        reward = reward_columns(copied, copied_ids, eos, with_kind=True)
        write_parquet(folder / f"reward_negatives_{split}.parquet", reward)
    write_parquet(folder / "pairs_negatives.parquet", pair_columns(*usable["negatives"], with_kind=True))
    write_parquet(folder / "judge_pairs.parquet", pair_columns(rows["judge"], ids["judge"]))
    write_parquet(folder / "judge_corrupted.parquet", pair_columns(*usable["judge"], with_kind=True))
    write_parquet(folder / "judge_short.parquet", pair_columns(*usable["judge_short"], with_kind=True))
    for name in (*PAIRS, "eval_prompts"):
        table = prompt_columns(rows[name], ids[name])
        write_parquet(folder / f"prompts_{name.removesuffix('_prompts')}.parquet", table)
    write_parquet(folder / "unseen.parquet", text_columns(rows["unseen"], ids["unseen"]))
    metrics = {
        "read": sum(map(len, read.values())),
        "kept": sum(map(len, rows.values())),
        "dropped": dict(+dropped),
        "cut": dict(cuts),
        "cut_of_pairs": {what: cut_of_pairs[what] for what in ("prompts", "answers", "system_messages")},
        "lengths": length_statistics([row for name in SOURCES for row in ids[name]]),
        "train_pairs": len(rows["train"]),
        "heldout_pairs": len(rows["heldout"]),
        "judge_pairs": len(rows["judge"]),
        "unseen_texts": len(rows["unseen"]),
        "eval_prompts": len(rows["eval_prompts"]),
        "corrupted": {name: {"read": len(copies[name]), "kept": len(usable[name][0])} for name in COPIES},
    }
    write_json(root / "reports/tokenize_pairs/metrics.json", round_floats(metrics))
    num_pairs = sum(len(rows[name]) for name in PAIRS)
    for warning in cut_warnings(cut_of_pairs, num_pairs, MANY_CUT):
        print(f"warning: {warning}")
    num_cut = (cuts + cuts_of_copies).total()
    print(f"wrote data/tokenized: {metrics['kept']} of {metrics['read']} rows, {num_cut} texts cut")
    print("wrote reports/tokenize_pairs/metrics.json")
    tables = [*ids.values(), *(table for _, table in usable.values())]
    return {"tokens": sum(len(column) for table in tables for row in table for column in row.values())}


def alike_rows(
    rows: dict[str, list[Row]],
    ids: dict[str, list[Ids]],
    eos_token_id: int,
    where: Callable[[int], str],
    on_bad_row: str,
) -> dict[str, set[int]]:
    """By reason, the rows of pairs that contradict or repeat another in what the models see of them.

    Of pairs that are the same the first stays, a held-out one before the judge's before one to train on.

    Args:
        where: the place of a row's number in its source.

    Raises:
        UserError: a contradiction under 'error'.
    """
    pairs = [pair for name in ("heldout", "judge", "train") for pair in zip(rows[name], ids[name], strict=True)]
    opposite = contradictions(pairs, eos_token_id)
    if on_bad_row == "error":
        require_no_contradiction(opposite, where)
    found = {"contradiction_after_cut": set(opposite), "repeated_after_cut": repetitions(pairs) - opposite.keys()}
    for reason, numbers in found.items():
        if numbers:
            print(f"dropped {len(numbers)} rows ({reason}), the first: {where(min(numbers))}")
    return found


def check_positions(params: Params, root: Path) -> None:
    """
    Raises:
        UserError: the base has fewer positions than a pair, or a prompt with its sampled answer, may have tokens.
    """
    config = AutoConfig.from_pretrained(root / "models/base", local_files_only=True)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is None:
        return
    require(
        params.max_length <= positions,
        f"params.yaml: tokenize_pairs.max_length is {params.max_length}, and the base has {positions} positions; "
        "lower it, or choose a base model with more",
    )
    for section, key in ANSWERS:
        length = load_param(section, key, int, root)
        require(
            params.max_prompt_length + length <= positions,
            f"params.yaml: tokenize_pairs.max_prompt_length and {section}.{key} are {params.max_prompt_length} and "
            f"{length}, and the base has {positions} positions; lower one, or choose a base model with more",
        )


if __name__ == "__main__":
    run_stage("tokenize_pairs", main, Params)
