"""Apply the chat template and make token ids for DPO, the reward model and PPO.

Reads   data/pairs, models/base                           texts; tokenizer and chat template
Writes  data/tokenized/pairs_{train,heldout}.parquet      row, prompt_id, {prompt,chosen,rejected}_input_ids
        data/tokenized/reward_{train,heldout}.parquet     row, prompt_id, chosen_ids, rejected_ids; end in EOS
        data/tokenized/prompts_{train,heldout}.parquet    prompt_id, prompt, input_ids; one row a prompt
        data/tokenized/unseen.parquet                     row, prompt_input_ids, response_input_ids
        reports/tokenize_pairs/metrics.json               lengths, truncations, rows dropped
        reports/tokenize_pairs/run.json                   seconds, tokens/s, memory, versions

Run     dvc repro tokenize_pairs                          (untracked: python -m stages.tokenize_pairs)
"""

from collections import Counter
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator
from tqdm import tqdm

from stages.lib.data.chat import generation_header_ids, special_token_pattern, truncate
from stages.lib.data.token_tables import (
    count_cuts,
    length_statistics,
    pair_columns,
    prompt_columns,
    reward_columns,
    rows_of,
    text_columns,
    token_ids,
    without_special_tokens,
)
from stages.lib.model.loading import load_tokenizer
from stages.lib.run.artefacts import read_parquet, round_floats, write_json, write_parquet
from stages.lib.run.params import Base, Section, read_params, require
from stages.lib.run.stage import run_stage

SOURCES = ("train", "heldout", "unseen")


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
    num_header_tokens = len(generation_header_ids(tokenizer))
    require(
        params.max_prompt_length >= num_header_tokens,
        f"params.yaml: tokenize_pairs.max_prompt_length must hold the {num_header_tokens} tokens before an answer",
    )
    on_bad_row = read_params(root).get("fetch_pairs", {}).get("on_bad_row")
    pattern = special_token_pattern(tokenizer)
    read = {name: rows_of(read_parquet(root / f"data/pairs/{name}.parquet")) for name in SOURCES}
    rows = {
        name: without_special_tokens(read[name], pattern, f"data/pairs/{name}.parquet", on_bad_row)
        for name in SOURCES
    }

    limits = (params.max_prompt_length, params.max_completion_length, params.max_length)
    cuts: Counter[str] = Counter()
    ids = {}
    for name in SOURCES:
        progress = tqdm(rows[name], f"tokenize {name}", mininterval=1, unit=" rows")
        whole = [token_ids(row, tokenizer) for row in progress]
        cuts.update(count_cuts(whole, *limits))
        ids[name] = [truncate(row, *limits) for row in whole]

    folder = root / "data/tokenized"
    for split in ("train", "heldout"):
        write_parquet(folder / f"pairs_{split}.parquet", pair_columns(rows[split], ids[split]))
        reward = reward_columns(rows[split], ids[split], tokenizer.eos_token_id)
        write_parquet(folder / f"reward_{split}.parquet", reward)
        write_parquet(folder / f"prompts_{split}.parquet", prompt_columns(rows[split], ids[split]))
    write_parquet(folder / "unseen.parquet", text_columns(rows["unseen"], ids["unseen"]))
    lost = sum(len(read[name]) - len(rows[name]) for name in SOURCES)
    metrics = {
        "read": sum(map(len, read.values())),
        "kept": sum(map(len, rows.values())),
        "dropped": {"special_token": lost} if lost else {},
        "cut": dict(cuts),
        "lengths": length_statistics([row for name in SOURCES for row in ids[name]]),
        "train_pairs": len(rows["train"]),
        "heldout_pairs": len(rows["heldout"]),
        "unseen_texts": len(rows["unseen"]),
    }
    write_json(root / "reports/tokenize_pairs/metrics.json", round_floats(metrics))
    print(f"wrote data/tokenized: {metrics['kept']} of {metrics['read']} rows, {sum(cuts.values())} texts cut")
    print("wrote reports/tokenize_pairs/metrics.json")
    return {"tokens": sum(len(column) for name in SOURCES for row in ids[name] for column in row.values())}


if __name__ == "__main__":
    run_stage("tokenize_pairs", main, Params)
