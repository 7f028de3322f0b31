"""Score every answer with the reward model and the judge: the scorecard, a verdict on each model, the frontier.

Reads   data/answers.parquet, data/base_answers.parquet, data/courses/{dpo,ppo}.parquet
        data/tokenized/pairs_heldout.parquet         the preferred answers, cut where the models' are
        data/tokenized/prompts_{heldout,eval,judge}.parquet
        models/base, models/reward, models/judge
        reports/sample_responses/metrics.json        the limit in tokens, and the temperature
        reports/train_reward/heldout_scores.csv      for the picture of scores
        reports/train_ppo/metrics.json               the unit of its scores, its penalty and its price of KL
        params.yaml: analyze_logps.confidence and bootstrap_samples, those of every interval
Writes  reports/score_responses/scorecard.csv        model, decoding, measure, mean and change with intervals
        reports/score_responses/verdicts.json        per model: verdict and reasons
        reports/score_responses/frontier.csv, .png   score gained and win rate against distance from the base
        reports/score_responses/scores.png           reward-model scores of pairs and of answers
        reports/score_responses/metrics.json         the preferred answers' ranges, and what a verdict hangs on
        reports/score_responses/run.json             seconds, tokens/s, memory, versions

Run     dvc repro score_responses                    (untracked: python -m stages.score_responses)
"""

from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pydantic import ConfigDict, Field

from stages.lib.analysis import frontier
from stages.lib.analysis.names import MODELS
from stages.lib.analysis.scorecard import CHOSEN, preferred_ranges, scorecard
from stages.lib.analysis.stats import Resampling
from stages.lib.analysis.verdict import Verdict, verdict
from stages.lib.data.eos import up_to_eos
from stages.lib.model.frozen_side import FrozenSide
from stages.lib.model.judge import load_judge
from stages.lib.model.loading import load_causal_lm, load_tokenizer, pick_device, pick_precision
from stages.lib.model.memory import memory_dial
from stages.lib.model.reward import load_reward_model
from stages.lib.report import plots
from stages.lib.rl.rewards import sum_by_answer
from stages.lib.run.artefacts import (
    atomic_path,
    read_json,
    read_parquet,
    round_floats,
    write_history,
    write_json,
)
from stages.lib.run.params import Base, MicroBatchTokens, Section, load_params
from stages.lib.run.stage import run_stage

TRAINED = ("dpo", "ppo")
TILES = ("score", "objective", "kl", "rep_4", "tokens", "ended", "emoji")
TILES += ("win_rate", "win_rate_lc", "win_rate_same_end")
REPORTS = Path("reports/score_responses")


class Params(Section):
    micro_batch_tokens: MicroBatchTokens  # memory dial: tokens per forward pass


class Intervals(Section):
    """The two numbers behind every interval of the project; their home is the section of analyze_logps."""

    model_config = ConfigDict(extra="ignore")

    samples: int = Field(ge=1, alias="bootstrap_samples")  # resamples of prompts
    confidence: float = Field(gt=0, lt=1)


def main(base: Base, params: Params, root: Path = Path(".")) -> dict:
    device = pick_device()
    precision = pick_precision(base.precision, device)
    how = Resampling(**load_params("analyze_logps", Intervals, root).model_dump(), seed=base.seed)

    # 1. all texts under reward model, judge and base
    limits = read_json(root / "reports/sample_responses/metrics.json")
    preferred = preferred_answers(root, limits["max_new_tokens"])
    answers = pd.concat([read_table(root / "data/answers.parquet"), preferred], ignore_index=True)
    several = read_table(root / "data/base_answers.parquet")
    ppo = read_json(root / "reports/train_ppo/metrics.json")
    courses = {name: read_table(root / f"data/courses/{name}.parquet") for name in TRAINED}
    courses["ppo"] = seen_from_base(courses["ppo"], ppo, limits["temperature"])
    tables = [answers.assign(read=True), several, *courses.values()]
    scored, tokens = score(root, tables, limits["temperature"], params.micro_batch_tokens, device, precision)
    answers, several, *looks = scored
    courses = {
        name: look.assign(ref_logp=look["base_logp"]) if "read" in look else look
        for name, look in zip(courses, looks, strict=True)
    }
    of_base = answers["model"] == "base"
    answers["logp"] = answers["logp"].where(~of_base, answers["base_logp"])
    answers["entropy"] = answers["entropy"].where(~of_base, answers["base_entropy"])

    # 2. the scorecard and the verdicts
    answers["objective"] = objective(answers, ppo)
    opponents, candidates = (several[several["use"] == use] for use in ("opponent", "best of n"))
    rows = round_floats(scorecard(answers, opponents, how))
    ranges = preferred_ranges(answers, how)
    card = pd.DataFrame(rows)
    verdicts = {model: verdict(card, model, ranges) for model in TRAINED}

    # 3. the frontier
    points = frontier_of(
        answers, opponents, candidates, courses, {"dpo": True, "ppo": ppo["policy"] == "base"}, how
    )

    write_history(root / REPORTS / "scorecard.csv", rows)
    write_json(root / REPORTS / "verdicts.json", {model: vars(found) for model, found in verdicts.items()})
    write_history(root / REPORTS / "frontier.csv", round_floats(points))
    pairs = pd.read_csv(root / "reports/train_reward/heldout_scores.csv")
    pictures = {
        "frontier": plots.frontier(pd.DataFrame(points)),
        "scores": plots.scores(pairs, scores_of(answers)),
    }
    for name, png in pictures.items():
        with atomic_path(root / REPORTS / f"{name}.png") as unfinished:
            unfinished.write_bytes(png)
    write_json(root / REPORTS / "metrics.json", round_floats(summary(answers, card, ranges, verdicts)))
    print(f"wrote {REPORTS}/scorecard.csv, verdicts.json, frontier.csv, frontier.png, scores.png, metrics.json")
    for model, found in verdicts.items():
        print(f"{MODELS[model]}: {found.text}")
    return {"tokens": tokens, "device": device.type, "precision": precision}


def read_table(path: Path) -> pd.DataFrame:
    return pd.DataFrame(read_parquet(path))


def preferred_answers(root: Path, limit: int) -> pd.DataFrame:
    """The chosen answer of each held-out prompt's first pair, cut at the limit that the models' answers have."""
    tokenizer = load_tokenizer(root / "models/base")
    pairs = read_table(root / "data/tokenized/pairs_heldout.parquet").drop_duplicates("prompt_id")
    eos = tokenizer.eos_token_id
    ids = [up_to_eos(list(chosen), eos)[:limit] for chosen in pairs["chosen_input_ids"]]
    texts = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
    table = pd.DataFrame({"prompt_id": pairs["prompt_id"], "response_ids": ids, "text": texts})
    table["ended"] = [each[-1] == eos for each in ids]
    table[["logp", "entropy"]] = np.nan
    return table.assign(model=CHOSEN, decoding="data", split="heldout")


def seen_from_base(course: pd.DataFrame, ppo: dict, temperature: float) -> pd.DataFrame:
    """PPO's course, to be read by the base where PPO started from another model, which is what `ref_logp` is of.

    None of it where the base's log-probs will be of another temperature than the course's.
    """
    if ppo["policy"] == "base":
        return course
    if ppo["temperature"] != temperature:
        print(
            f"PPO's course is left out of the frontier: it was sampled at temperature {ppo['temperature']}, and KL to "
            f"the base is of sample_responses.temperature, {temperature}"
        )
        return course.iloc[:0]
    return course.assign(read=True)


def score(
    root: Path,
    tables: list[pd.DataFrame],
    temperature: float,
    micro_batch_tokens: MicroBatchTokens,
    device: torch.device,
    precision: str,
) -> tuple[list[pd.DataFrame], int]:
    """The tables with columns score and judge, and the number of tokens read; equal texts are read once.

    Where a table has the column `read`, base_logp and base_entropy too, what the base makes of the answer.
    """
    texts = pd.concat(tables, ignore_index=True)
    keys = pd.Series(zip(texts["prompt_id"], map(tuple, texts["response_ids"]), strict=True))
    codes, different = pd.factorize(keys)
    read = texts["read"].notna().groupby(codes).any().tolist()
    prompts = {}
    for split in ("heldout", "eval", "judge"):
        columns = read_parquet(root / f"data/tokenized/prompts_{split}.parquet")
        prompts |= dict(zip(columns["prompt_id"], columns["input_ids"], strict=True))
    asked = [prompts[prompt_id] for prompt_id, _ in different]
    said = [list(response) for _, response in different]

    tokenizer = load_tokenizer(root / "models/base")
    base = load_causal_lm(root / "models/base", device)
    reward_model = load_reward_model(root / "models/reward", device)
    judge = load_judge(root / "models/judge")
    dial = partial(memory_dial, micro_batch_tokens, 8192, stage="score_responses")
    frozen = FrozenSide(base, reward_model, temperature, tokenizer, precision, dial)
    found = frozen.opinions(asked, said, read, judge.layer, progress="judge, reward model and base")
    columns = pd.DataFrame({"score": found.scores.double(), "judge": judge.scores(found.means).double()})
    lengths = torch.tensor([len(said[i]) for i in np.flatnonzero(read)])
    columns.loc[read, "base_logp"] = sum_by_answer(found.logps, lengths).double().numpy()
    columns.loc[read, "base_entropy"] = (sum_by_answer(found.entropies, lengths) / lengths).double().numpy()

    scored, start = [], 0
    for table in tables:
        of_table = columns.iloc[codes[start : start + len(table)], : 4 if "read" in table else 2]
        scored.append(table.assign(**of_table.set_axis(table.index)))
        start += len(table)
    return scored, sum(map(len, asked)) + sum(map(len, said))


def objective(answers: pd.DataFrame, ppo: dict) -> pd.Series:
    """What PPO maximises, of each sampled answer; NaN for others, and where its reference is not the base.

    The score in the unit of its training, less the penalty of an answer that did not end and the price of its KL.
    """
    score = (answers["score"] - ppo["score_mean"]) / ppo["score_std"]
    kl = answers["logp"] - answers["base_logp"]
    value = score - ppo["missing_eos_penalty"] * ~answers["ended"].astype(bool) - ppo["kl_coef"] * kl
    return value.where((answers["decoding"] == "sampled") & (ppo["policy"] == "base"))


def frontier_of(
    answers: pd.DataFrame,
    opponents: pd.DataFrame,
    candidates: pd.DataFrame,
    courses: dict[str, pd.DataFrame],
    from_base: dict[str, bool],
    how: Resampling,
) -> list[dict]:
    """The points of the frontier: the models as they are, the courses of training, and the best of n.

    Args:
        opponents: the base's further answers to the prompts, with which the models' are compared.
        candidates: its several answers to a few of them, of which the best of n is taken.
    """
    sampled = answers[answers["decoding"] == "sampled"]
    own = {model: sampled[sampled["model"] == model] for model in MODELS}
    points = [frontier.final(MODELS[model], table, own["base"], opponents, how) for model, table in own.items()]
    for model, looks in courses.items():
        points += frontier.course(f"{MODELS[model]}'s course", looks, opponents, from_base[model], how)
    values = [candidates.pivot(index="prompt_id", columns="candidate", values=name) for name in ("score", "judge")]
    return points + frontier.best_of_n(*(table.to_numpy() for table in values), how)


def scores_of(answers: pd.DataFrame) -> pd.DataFrame:
    """Reward-model scores of the sampled answers, a row per prompt, a column per model."""
    sampled = answers[answers["decoding"] == "sampled"]
    return sampled.pivot(index="prompt_id", columns="model", values="score")[list(MODELS)]


def summary(
    answers: pd.DataFrame, card: pd.DataFrame, ranges: dict[str, tuple[float, float]], verdicts: dict[str, Verdict]
) -> dict:
    """What `dvc metrics diff` compares: counts, the preferred answers' ranges, and the chief figures."""
    sampled = answers[(answers["model"] == "base") & (answers["decoding"] == "sampled")]
    metrics: dict = {"prompts": len(sampled), "preferred": {name: list(ends) for name, ends in ranges.items()}}
    for model, found in verdicts.items():
        rows = card[(card["model"] == model) & (card["decoding"] == "sampled")].set_index("measure")
        metrics[model] = {"verdict": found.word}
        metrics[model] |= {name: float(rows.loc[name, "mean"]) for name in TILES if name in rows.index}
        greedy = card[(card["model"] == model) & (card["decoding"] == "greedy") & (card["measure"] == "rep_4")]
        metrics[model]["greedy_rep_4"] = float(greedy["mean"].iloc[0])
    return metrics


if __name__ == "__main__":
    run_stage("score_responses", main, Params)
