"""Answer whether DPO and PPO find their training data more likely, with intervals and pictures.

Reads   data/tokenized/pairs_{train,heldout}.parquet, unseen.parquet   the texts as token ids
        data/reference_logps                        base's log-probs of the pairs, computed once
        data/dpo_pairs.parquet                      which training pairs DPO met
        models/base, models/dpo, models/ppo
        data/pairs/heldout.parquet                  texts, for the one-feature rankers
        reports/train_dpo/{history,heldout}.csv, reports/train_reward/heldout_scores.csv
Writes  reports/analyze_logps/logps.parquet         model, group, row, prompt_id, tokens, logp, logp_per_token
        reports/analyze_logps/metrics.json          every estimate X with X_low and X_high
        reports/analyze_logps/answer.md             the same as a paragraph
        reports/analyze_logps/*.csv, *.png          plots and pictures
        reports/analyze_logps/run.json              seconds, tokens/s, memory, versions

Run     dvc repro analyze_logps                     (untracked: python -m stages.analyze_logps)
"""

from pathlib import Path

import pandas as pd
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from stages.lib.analysis import rankings
from stages.lib.analysis.answer import answer
from stages.lib.analysis.memorisation import change_quantiles, changes, displacement, levels, pair_changes, tidy
from stages.lib.analysis.names import MODELS
from stages.lib.analysis.stats import Resampling
from stages.lib.data.chat import seen_text
from stages.lib.data.reference import other_precision, read_reference_logps
from stages.lib.model.loading import freeze, load_causal_lm, load_tokenizer, pick_device, pick_precision
from stages.lib.model.logps import completion_logps
from stages.lib.model.memory import memory_dial
from stages.lib.report import plots
from stages.lib.run.artefacts import (
    atomic_path,
    read_parquet,
    round_floats,
    write_history,
    write_json,
    write_parquet,
)
from stages.lib.run.draws import draw
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, MicroBatchTokens, Section
from stages.lib.run.stage import run_stage

REPORTS = Path("reports/analyze_logps")
MEASURED = ("train_dpo/history.csv", "train_dpo/heldout.csv", "train_reward/heldout_scores.csv")  # under reports/


class Params(Section):
    max_train_pairs: int | None = Field(ge=1)  # of the training pairs that DPO met, drawn by seed; null: all
    max_unseen_texts: int | None = Field(ge=1)  # unseen texts drawn by seed; null: all
    micro_batch_tokens: MicroBatchTokens  # memory dial: tokens per forward pass
    bootstrap_samples: int = Field(ge=1)  # resamples of prompts for each interval
    confidence: float = Field(gt=0, lt=1)  # of every interval


def main(base: Base, params: Params, root: Path = Path(".")) -> dict:
    device = pick_device()
    precision = pick_precision(base.precision, device)
    if warning := other_precision(root, precision):
        print(f"analyze_logps: warning: {warning}")
    how = Resampling(params.bootstrap_samples, params.confidence, base.seed)
    words = pd.DataFrame(read_parquet(root / "data/pairs/heldout.parquet"))
    measured = {path: pd.read_csv(root / "reports" / path) for path in MEASURED}

    # 1. the log-prob of every text under every model; base's of the pairs are known
    met = read_parquet(root / "data/dpo_pairs.parquet")["row"]
    texts = collect_texts(root, met, params.max_train_pairs, params.max_unseen_texts, base.seed)
    tokens = 0
    for name in MODELS:
        todo = texts[texts["base_logp"].isna()] if name == "base" else texts
        prompts, completions = todo["prompt_ids"].tolist(), todo["completion_ids"].tolist()
        model = freeze(load_causal_lm(root / "models" / name, device))
        dial = memory_dial(params.micro_batch_tokens, 8192, model, "analyze_logps")
        logps = dial.run(completion_logps, model, prompts, completions, precision=precision, progress=name)
        summed = pd.Series(logps.numpy().astype(float), todo.index)
        texts[name] = (summed.combine_first(texts["base_logp"]) if name == "base" else summed) / texts["tokens"]
        tokens += sum(map(len, prompts)) + sum(map(len, completions))

    # 2. what changed, for which texts
    estimates = {name: levels(texts, name, how) for name in MODELS}
    for name in ("dpo", "ppo"):
        estimates[name] |= changes(texts, name, how) | displacement(texts, name, params.confidence)

    # 3. what ranks the held-out pairs, beside counting one feature
    words = seen_words(words, texts, load_tokenizer(root / "models/base"))
    pairs = rankings.heldout_table(texts, words, measured["train_reward/heldout_scores.csv"])
    for name, found in rankings.estimates(pairs, how).items():
        estimates[name] = estimates.get(name, {}) | found

    write_parquet(root / REPORTS / "logps.parquet", tidy(texts))
    print(f"wrote {REPORTS}/logps.parquet: {len(texts)} texts under {len(MODELS)} models")
    write_answer(root, texts, estimates, len(met), params.confidence)
    write_plots(root, texts, estimates, measured)
    return {"tokens": tokens, "device": device.type, "precision": precision}


def collect_texts(
    root: Path, met: list[int], max_train_pairs: int | None, max_unseen_texts: int | None, seed: int
) -> pd.DataFrame:
    """A row per text: group, row, prompt_id, prompt_ids, completion_ids, tokens, base_logp where it is known.

    Args:
        met: rows of the training pairs that DPO met.

    Raises:
        UserError: DPO was trained on no pair, only on corrupted copies.
    """
    tables = []
    for split in ("train", "heldout"):
        pairs = pd.DataFrame(read_parquet(root / f"data/tokenized/pairs_{split}.parquet"))
        reference = pd.DataFrame(read_reference_logps(root, split))
        if split == "train":
            pairs = pairs[pairs["row"].isin(met)]
            if pairs.empty:
                raise UserError(
                    "DPO met no pair itself, only corrupted copies: raise train_dpo.max_steps or batch_size"
                )
            pairs = pairs.iloc[draw(len(pairs), max_train_pairs, seed, "analysed_pairs")]
        pairs = pairs.merge(reference, on=["row", "prompt_id"], validate="one_to_one")
        for side in ("chosen", "rejected"):
            columns = {f"{side}_input_ids": "completion_ids", f"{side}_logps": "base_logp"}
            table = pairs.rename(columns={"prompt_input_ids": "prompt_ids", **columns})
            tables.append(table.assign(group=f"{split}_{side}"))
    unseen = pd.DataFrame(read_parquet(root / "data/tokenized/unseen.parquet"))
    unseen = unseen.iloc[draw(len(unseen), max_unseen_texts, seed, "analysed_texts")]
    unseen = unseen.rename(columns={"prompt_input_ids": "prompt_ids", "response_input_ids": "completion_ids"})
    texts = pd.concat([*tables, unseen.assign(group="unseen")], ignore_index=True)
    texts["tokens"] = texts["completion_ids"].map(len)
    texts["prompt_id"] = texts["prompt_id"].astype("Int64")
    return texts.loc[:, ["group", "row", "prompt_id", "prompt_ids", "completion_ids", "tokens", "base_logp"]]


def seen_words(words: pd.DataFrame, texts: pd.DataFrame, tokenizer: PreTrainedTokenizerBase) -> pd.DataFrame:
    """row, chosen, rejected: the held-out answers as text, cut where their token ids were cut."""
    columns = {"row": words["row"]}
    for side in ("chosen", "rejected"):
        seen = texts[texts["group"] == f"heldout_{side}"]
        ids = dict(zip(seen["row"], seen["completion_ids"], strict=True))
        columns[side] = [
            seen_text(text, ids[row], tokenizer) if row in ids else text
            for row, text in zip(words["row"], words[side], strict=True)
        ]
    return pd.DataFrame(columns)


def write_answer(root: Path, texts: pd.DataFrame, estimates: dict, met_pairs: int, confidence: float) -> None:
    """The estimates as numbers and in words."""
    sizes = texts["group"].value_counts().to_dict()
    groups = {"train_pairs": "train_chosen", "heldout_pairs": "heldout_chosen", "unseen_texts": "unseen"}
    metrics: dict = {name: int(sizes[group]) for name, group in groups.items()}
    text = answer(estimates, metrics | {"met_pairs": met_pairs}, confidence)
    for name, intervals in estimates.items():
        metrics[name] = {k: v for key, interval in intervals.items() for k, v in interval.as_metrics(key).items()}
    write_json(root / REPORTS / "metrics.json", round_floats(metrics))
    with atomic_path(root / REPORTS / "answer.md") as partial:
        partial.write_text(text, encoding="utf-8")
    print(f"wrote {REPORTS}/metrics.json, answer.md")


def write_plots(root: Path, texts: pd.DataFrame, estimates: dict, measured: dict[str, pd.DataFrame]) -> None:
    """Curves for DVC and pictures for people."""
    moved = pair_changes(texts)
    accuracies = estimates["rankers"] | {name: estimates[name]["rewards/accuracies"] for name in ("dpo", "ppo")}
    accuracies["reward_model"] = estimates["reward_model"]["accuracy"]
    curves = {
        "quantiles": change_quantiles(texts).to_dict("records"),
        "displacement": moved.to_dict("records"),
        "rankers": [{"ranker": name} | each.as_metrics("accuracy") for name, each in accuracies.items()],
    }
    training, heldout, _ = (measured[name] for name in MEASURED)
    pictures = {
        "densities": plots.densities(texts),
        "ecdf": plots.ecdf(texts),
        "displacement": plots.displacement(moved),
        "rankers": plots.rankers(accuracies, trained=("dpo", "ppo", "reward_model")),
        "margins": plots.margins(training, heldout),
    }
    for name, rows in curves.items():
        write_history(root / REPORTS / f"{name}.csv", round_floats(rows))
    for name, png in pictures.items():
        with atomic_path(root / REPORTS / f"{name}.png") as partial:
            partial.write_bytes(png)
    print(f"wrote {REPORTS}/{', '.join([*(f'{n}.csv' for n in curves), *(f'{n}.png' for n in pictures)])}")


if __name__ == "__main__":
    run_stage("analyze_logps", main, Params)
