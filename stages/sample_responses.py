"""Answer the same prompts with base, DPO and PPO, greedy and sampled.

Generation only: what the answers are worth is score_responses' to say.

Reads   models/base, models/dpo, models/ppo
        data/tokenized/prompts_{heldout,eval,judge}.parquet
        data/courses/{dpo,ppo}.parquet          which of the judge's prompts training looked at
Writes  data/answers.parquet                    model, decoding, prompt_id, split, response_ids, text, ended; logp
                                                and entropy of the trained models
        data/base_answers.parquet               several sampled answers of the base to one prompt: to a few held-out
                                                ones for the best of n; and as opponents of the trained models'
                                                answers, to every prompt measured and to the judge's
        reports/sample_responses/samples.json   the first prompts and their six answers
        reports/sample_responses/samples.md     the same, to read
        reports/sample_responses/metrics.json   counts, limits, and how long answers are
        reports/sample_responses/run.json       seconds, tokens/s, memory, versions

Sampling is plain, without top-p: logp, in nats and summed over an answer, is of the very distribution that was drawn
from, logits divided by the temperature. entropy is the mean over an answer's tokens. What the base finds likely is
score_responses' to read, in its one pass over all answers. Sampled: every held-out and evaluation prompt; greedy: the
held-out prompts.

Run     dvc repro sample_responses              (untracked: python -m stages.sample_responses)
"""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import torch
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.lib.analysis.names import MODELS
from stages.lib.data.chat import text_ids
from stages.lib.model.generate import Answer, answer_prompts, in_precision
from stages.lib.model.loading import freeze, load_causal_lm, load_tokenizer, pick_device, pick_precision
from stages.lib.model.logps import TokenLogps, read_answers
from stages.lib.model.memory import MemoryDial
from stages.lib.report.gallery import as_markdown, gallery_entries
from stages.lib.run.artefacts import atomic_path, read_parquet, round_floats, write_json, write_parquet
from stages.lib.run.draws import draw, seed_of
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, Section
from stages.lib.run.stage import run_stage

FIRST_PROMPT = "What's your morning routine like?"
CANDIDATES = 17  # answers of the base to each best-of-n prompt: one more than the largest n, as its opponent
COURSE_OPPONENTS = 2  # answers of the base to each prompt that training looked at
BATCH_SIZE = 96
MICRO_BATCH_TOKENS = 4096
REPORTS = Path("reports/sample_responses")


class Params(Section):
    max_new_tokens: int = Field(ge=1)  # of every answer that is measured
    temperature: float = Field(gt=0)
    opponents: int = Field(ge=1)  # the base's answers to each prompt, with which a sampled one is compared
    best_of_n_prompts: int = Field(ge=1)  # held-out prompts that the base answers 17 times
    gallery_prompts: int = Field(ge=1)  # held-out prompts shown, after the first, fixed one
    first_max_new_tokens: int = Field(ge=1)  # for the first prompt, shown whole


def main(base: Base, params: Params, root: Path = Path(".")) -> dict:
    device = pick_device()
    precision = pick_precision(base.precision, device)
    tokenizer = load_tokenizer(root / "models/base")
    prompts = read_prompts(root)
    heldout, judged = prompts[prompts["split"] == "heldout"], prompts[prompts["split"] == "judge"]
    measured = prompts[prompts["split"] != "judge"]

    # 1. What every model is asked, and what the base alone; equal random numbers, so that models alone differ
    greedy, sampled = {"decoding": "greedy", "use": "measured"}, {"decoding": "sampled", "use": "measured"}
    first = pd.DataFrame([{"input_ids": first_prompt(tokenizer), "use": "first"}])
    asked = [heldout.assign(**greedy), measured.assign(**sampled)]
    asked += [first.assign(decoding="greedy"), first.assign(decoding="sampled")]
    few = heldout.iloc[draw(len(heldout), params.best_of_n_prompts, base.seed, "best of n")]
    several = [repeated(few, CANDIDATES, "best of n"), repeated(judged, COURSE_OPPONENTS, "opponent")]
    several += [repeated(measured, params.opponents - 1, "opponent")]  # the measured answer is one of them
    of_all, of_base = (pd.concat(tables, ignore_index=True) for tables in (asked, asked + several))
    longest = max(params.max_new_tokens, params.first_max_new_tokens)
    numbers = torch.Generator().manual_seed(seed_of(base.seed, "answers"))
    uniforms = torch.rand(len(of_base), longest, generator=numbers)

    tables = []
    for name in MODELS:
        model = freeze(load_causal_lm(root / "models" / name, device))
        table = of_base if name == "base" else of_all
        # 2. The model answers
        is_first = table["use"] == "first"
        answers = answer_prompts(
            in_precision(model, precision),
            tokenizer,
            table["input_ids"].tolist(),
            [params.first_max_new_tokens if first else params.max_new_tokens for first in is_first],
            precision,
            temperature=[params.temperature if how == "sampled" else None for how in table["decoding"]],
            uniforms=uniforms,
            batch_size=BATCH_SIZE,
            progress=f"{name} answers",
        )
        columns = {"response_ids": [answer.ids for answer in answers], "text": [answer.text for answer in answers]}
        tables.append(table.assign(model=name, **columns, ended=[answer.ended for answer in answers]))
        # 3. How likely a trained model found its answers
        if name != "base":
            own = tables[-1][table["use"] == "measured"].copy()
            own["logp"], own["entropy"] = read(model, own, params.temperature, precision, f"{name} reads")
            tables[-1] = tables[-1].join(own[["logp", "entropy"]])
    everything = pd.concat(tables, ignore_index=True)
    answers = everything[everything["use"] == "measured"]
    base_answers = everything[everything["use"].isin(["best of n", "opponent"])]

    names = ["prompt_id", "split", "response_ids", "text", "ended", "model", "decoding"]
    write_table(root / "data/answers.parquet", answers[[*names, "logp", "entropy"]])
    write_table(root / "data/base_answers.parquet", base_answers[[*names[:5], "use", "candidate"]])
    samples = gallery(
        everything[everything["use"] == "first"], answers, heldout, params.gallery_prompts, base.seed
    )
    write_json(root / REPORTS / "samples.json", samples)
    with atomic_path(root / REPORTS / "samples.md") as partial:
        partial.write_text(as_markdown(samples), encoding="utf-8")
    metrics = {"heldout_prompts": len(heldout), "eval_prompts": len(measured) - len(heldout)}
    metrics |= {"judge_prompts": len(judged), "max_new_tokens": params.max_new_tokens}
    metrics["temperature"] = params.temperature
    for name in MODELS:
        own = answers[(answers["model"] == name) & (answers["decoding"] == "sampled")]
        lengths = own["response_ids"].map(len)
        metrics[name] = {"tokens": float(lengths.mean()), "ended": float(own["ended"].mean())}
    write_json(root / REPORTS / "metrics.json", round_floats(metrics))
    print(f"wrote data/answers.parquet: {len(answers)} answers; data/base_answers.parquet: {len(base_answers)}")
    print(f"wrote {REPORTS}/samples.json, samples.md, metrics.json")
    tokens = int(everything["response_ids"].map(len).sum())
    return {"tokens": tokens, "device": device.type, "precision": precision}


def read_prompts(root: Path) -> pd.DataFrame:
    """prompt_id, prompt, input_ids, split: all held-out and evaluation prompts, and the judge's that courses used.

    Raises:
        UserError: no held-out prompt, or a course's prompt is not among the judge's.
    """
    tables = []
    for split in ("heldout", "eval", "judge"):
        table = pd.DataFrame(read_parquet(root / f"data/tokenized/prompts_{split}.parquet"))
        tables.append(table.assign(split=split)[["prompt_id", "prompt", "input_ids", "split"]])
    heldout, further, judged = tables
    if heldout.empty:
        raise UserError("no held-out prompt to answer; raise fetch_pairs.holdout_fraction or max_pairs")
    looked_at: set[int] = set()
    for name in ("dpo", "ppo"):
        looked_at |= set(read_parquet(root / f"data/courses/{name}.parquet")["prompt_id"])
    judged = judged[judged["prompt_id"].isin(looked_at)]
    if missing := looked_at - set(judged["prompt_id"]):
        raise UserError(
            f"data/courses: prompt {min(missing)} is not in data/tokenized/prompts_judge.parquet; "
            "run `dvc repro -f train_dpo train_ppo`"
        )
    return pd.concat([table for table in (heldout, further, judged) if len(table)], ignore_index=True)


def first_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The fixed first prompt of the gallery, as token ids."""
    message = [{"role": "user", "content": FIRST_PROMPT}]
    return text_ids(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True), tokenizer)


def repeated(asked: pd.DataFrame, count: int, use: str) -> pd.DataFrame:
    """`asked`, each prompt `count` times, to be sampled."""
    candidates = list(range(count)) * len(asked)
    return asked.loc[asked.index.repeat(count)].assign(decoding="sampled", use=use, candidate=candidates)


def read(
    model: PreTrainedModel, answers: pd.DataFrame, temperature: float, precision: str, progress: str
) -> tuple[list[float], list[float]]:
    """Of each answer the summed log-prob and the mean entropy, at the temperature it was sampled at."""
    texts = answers["input_ids"].tolist(), answers["response_ids"].tolist()
    dial = MemoryDial(MICRO_BATCH_TOKENS, "sample_responses", model.device)
    policy = TokenLogps(model, temperature)
    per_token = dial.run(read_answers, policy, *texts, precision=precision, progress=progress)
    lengths = list(map(len, texts[1]))
    logps, entropies = (values.double().split(lengths) for values in per_token)
    return [float(each.sum()) for each in logps], [float(each.mean()) for each in entropies]


def gallery(
    first: pd.DataFrame, answers: pd.DataFrame, heldout: pd.DataFrame, count: int, seed: int
) -> list[dict]:
    """samples.json: the first prompt, then `count` others of the held-out ones, drawn by `seed`."""
    others = heldout[heldout["prompt"] != FIRST_PROMPT]
    others = others.iloc[draw(len(others), count, seed, "gallery")]
    prompts = [{"prompt": FIRST_PROMPT, "prompt_id": None}, *others[["prompt", "prompt_id"]].to_dict("records")]
    found = {}
    for (model, decoding), own in first.groupby(["model", "decoding"], sort=False):
        measured = answers[(answers["model"] == model) & (answers["decoding"] == decoding)].set_index("prompt_id")
        rows = pd.concat([own, measured.loc[others["prompt_id"]]]).itertuples()
        found[str(model), str(decoding)] = [Answer(row.response_ids, row.text, row.ended) for row in rows]
    return gallery_entries(prompts, found)


def write_table(path: Path, table: pd.DataFrame) -> None:
    types = {"response_ids": pa.list_(pa.int32()), "prompt_id": pa.int64(), "candidate": pa.int64()}
    columns = {name: pa.array(table[name].tolist(), types.get(str(name))) for name in table}
    write_parquet(path, columns)


if __name__ == "__main__":
    run_stage("sample_responses", main, Params)
