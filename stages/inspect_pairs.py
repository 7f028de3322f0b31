"""A look at the pairs before anything is trained on them, as one page that opens without a network.

Reads   data/pairs, data/tokenized/{pairs_train,pairs_heldout,judge_pairs}.parquet, models/base    texts, ids, tokenizer
        reports/fetch_pairs/metrics.json, reports/tokenize_pairs/metrics.json         what was read, dropped and cut
Writes  reports/inspect_pairs/data.html          counts by reason, turns, lengths, scripts, one-feature rankers, pairs
        reports/inspect_pairs/metrics.json       the same numbers
        reports/inspect_pairs/run.json           seconds, memory, versions

Run     dvc repro inspect_pairs                  (untracked: python -m stages.inspect_pairs)

Nothing is trained on what it writes, so no change of a word on the page reruns a training.
"""

from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import Field

from stages.lib.analysis.pair_profile import in_words, one_feature_rankers, repeated_prompts, scripts
from stages.lib.data.chat import special_token_pattern
from stages.lib.data.token_tables import token_ids
from stages.lib.model.loading import load_tokenizer
from stages.lib.report.data_page import Lengths, SeenPair, data_page, segments
from stages.lib.report.render import render_data
from stages.lib.run.artefacts import atomic_path, read_json, read_rows, round_floats, write_json
from stages.lib.run.draws import draw
from stages.lib.run.params import Base, Section, load_param
from stages.lib.run.stage import run_stage

REPORTS = Path("reports/inspect_pairs")
TABLES = {"train": "pairs_train", "heldout": "pairs_heldout", "judge": "judge_pairs"}
MOST = 2000  # pairs that features and lengths are taken from, drawn by seed: more would say the same
PARTS = ("prompt", "chosen", "rejected")


class Params(Section):
    rows: int = Field(ge=1)  # pairs shown as the models see them


def main(base: Base, params: Params, root: Path = Path(".")) -> dict[str, Any]:
    tokenizer = load_tokenizer(root / "models/base")
    limit_keys = ("max_prompt_length", "max_completion_length", "max_length")
    limits = {key: load_param("tokenize_pairs", key, int | None, root) for key in limit_keys}
    fetched, tokenized = (read_json(root / f"reports/{name}_pairs/metrics.json") for name in ("fetch", "tokenize"))

    # 1. The pairs that are left, as texts and as the models see them
    texts = {row["row"]: row for split in TABLES for row in read_rows(root / f"data/pairs/{split}.parquet")}
    ids = {
        row["row"]: row for name in TABLES.values() for row in read_rows(root / f"data/tokenized/{name}.parquet")
    }
    numbers = sorted(ids)
    looked_at = [numbers[i] for i in draw(len(numbers), MOST, base.seed, "inspect_pairs")]
    whole = {number: token_ids(texts[number], tokenizer) for number in looked_at}
    pairs = pd.DataFrame([texts[number] for number in looked_at])

    # 2. What they are like
    rankers = one_feature_rankers(pairs, load_param("analyze_logps", "confidence", float, root))
    lengths = Lengths(*([len(row[f"{part}_input_ids"]) for row in whole.values()] for part in PARTS))
    metrics: dict[str, Any] = {
        "pairs": len(numbers),
        "looked_at": len(looked_at),
        "scripts": scripts(pairs),
        "repeated": repeated_prompts([row["prompt_id"] for row in ids.values()]),
        "rankers": {
            key: value for name, share in rankers.items() for key, value in share.as_metrics(name).items()
        },
    }

    # 3. Some of them as the models see them
    shown = [looked_at[i] for i in draw(len(looked_at), params.rows, base.seed, "pairs shown")]
    pattern = special_token_pattern(tokenizer)
    special = {token_id for token, token_id in tokenizer.get_vocab().items() if pattern.fullmatch(token)}
    seen = []
    for number in shown:
        parts = {}
        for part in PARTS:
            own, uncut = ids[number][f"{part}_input_ids"], whole[number][f"{part}_input_ids"]
            parts[part] = segments(own, uncut, special, lambda ids: str(tokenizer.decode(ids)))
        seen.append(SeenPair(number, **parts))

    page = data_page(fetched, tokenized, metrics, rankers, in_words(rankers), lengths, limits, seen)
    html = render_data(page).encode("utf-8", errors="replace")
    with atomic_path(root / REPORTS / "data.html") as partial:
        partial.write_bytes(html)
    write_json(root / REPORTS / "metrics.json", round_floats(metrics))
    for warning in page.warnings:
        print(f"look: {warning}")
    print(f"wrote {REPORTS}/data.html: look at it before training; {REPORTS}/metrics.json")
    return {}


if __name__ == "__main__":
    run_stage("inspect_pairs", main, Params)
