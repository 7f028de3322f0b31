"""Answer the same prompts with base, DPO and PPO, greedy and sampled, and read how likely each answer was.

Generation only: what the answers are worth is score_responses' to say.

Reads   models/base, models/dpo, models/ppo
        data/tokenized/prompts_{heldout,eval,judge}.parquet
        data/courses/{dpo,ppo}.parquet          which of the judge's prompts training looked at
Writes  data/answers.parquet                    model, decoding, prompt_id, split, response_ids, text, ended, logp,
                                                base_logp, entropy
        data/best_of_n.parquet                  several answers of the base to a few held-out prompts
        reports/sample_responses/samples.json   the first prompts and their six answers
        reports/sample_responses/samples.md     the same, to read side by side
        reports/sample_responses/metrics.json   counts, limits, and how long answers are
        reports/sample_responses/run.json       seconds, tokens/s, memory, versions

Sampling is plain, without top-p: logp (the model's) and base_logp (the base's), in nats and summed over an answer,
are of the very distribution that was drawn from, logits divided by the temperature, and their mean difference is a
KL divergence. entropy is the mean over an answer's tokens. Sampled: every held-out and evaluation prompt, and by
the base those of the judge's prompts that training looked at; greedy: the held-out prompts.

Run     dvc repro sample_responses              (untracked: python -m stages.sample_responses)
"""

from pathlib import Path

import pandas as pd
import pyarrow as pa
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.lib.analysis.names import MODELS
from stages.lib.data.chat import text_ids
from stages.lib.model.generate import Answer, answer_prompts, in_precision
from stages.lib.model.loading import freeze, load_causal_lm, load_tokenizer, pick_device, pick_precision
from stages.lib.model.logps import TokenLogps, read_answers
from stages.lib.report.gallery import gallery_entries, side_by_side
from stages.lib.run.artefacts import atomic_path, read_parquet, round_floats, write_json, write_parquet
from stages.lib.run.draws import draw, generator
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, Section
from stages.lib.run.stage import run_stage

FIRST_PROMPT = "What's your morning routine like?"
CANDIDATES = 17  # answers of the base to each best-of-n prompt: one more than the largest n, as its opponent
MICRO_BATCH_TOKENS = 4096
REPORTS = Path("reports/sample_responses")


class Params(Section):
    max_new_tokens: int = Field(ge=1)  # of every answer that is measured
    temperature: float = Field(gt=0)
    best_of_n_prompts: int = Field(ge=1)  # held-out prompts that the base answers 17 times
    gallery_prompts: int = Field(ge=1)  # held-out prompts shown, after the first, fixed one
    first_max_new_tokens: int = Field(ge=1)  # for the first prompt, always answered in full


def main(base: Base, params: Params, root: Path = Path(".")) -> dict:
    device = pick_device()
    precision = pick_precision(base.precision, device)
    tokenizer = load_tokenizer(root / "models/base")
    prompts = read_prompts(root)
    heldout, judged = prompts[prompts["split"] == "heldout"], prompts[prompts["split"] == "judge"]
    measured = prompts[prompts["split"] != "judge"]
    first = [first_prompt(tokenizer)]
    plain = {"temperature": params.temperature}
    reader = freeze(load_causal_lm(root / "models/base", device))

    # 1. every model answers; the same seed for all, so that samples differ by the model alone
    tables, first_answers = [], {}
    for name in MODELS:
        model = reader if name == "base" else freeze(load_causal_lm(root / "models" / name, device))
        sampler = in_precision(model, precision)
        todo = [("greedy", {}, heldout, base.seed), ("sampled", plain, measured, base.seed)]
        if name == "base":
            todo.append(("sampled", plain, judged, seed_of(base.seed, "answers to the judge's prompts")))
        for decoding, how, asked, seed in todo:
            ids, progress = asked["input_ids"].tolist(), f"{name}, {decoding}"
            how = {"seed": seed, "progress": progress} | how
            found = answer_prompts(sampler, tokenizer, ids, params.max_new_tokens, precision, **how)
            tables.append(as_table(asked, found).assign(model=name, decoding=decoding))
            # 2. how likely the answers were, and how likely the base finds them
            reading = read(model, tables[-1], params.temperature, precision, f"{name} reads")
            tables[-1]["logp"], tables[-1]["entropy"] = reading
            if name != "base":
                reading = read(reader, tables[-1], params.temperature, precision, "base reads")
            tables[-1]["base_logp"] = reading[0]
        for decoding, how in (("greedy", {}), ("sampled", plain | {"seed": base.seed})):
            limit = params.first_max_new_tokens
            first_answers[name, decoding] = answer_prompts(sampler, tokenizer, first, limit, precision, **how)
    answers = pd.concat(tables, ignore_index=True)

    # 3. many answers of the base to a few prompts
    few = heldout.iloc[draw(len(heldout), params.best_of_n_prompts, base.seed, "best of n")]
    few = few.loc[few.index.repeat(CANDIDATES)]
    how = plain | {"seed": seed_of(base.seed, "best of n"), "progress": "base, best of n"}
    sampler = in_precision(reader, precision)
    found = answer_prompts(sampler, tokenizer, few["input_ids"].tolist(), params.max_new_tokens, precision, **how)
    candidates = as_table(few, found).assign(candidate=list(range(CANDIDATES)) * (len(few) // CANDIDATES))

    write_table(root / "data/answers.parquet", answers)
    write_table(root / "data/best_of_n.parquet", candidates)
    samples = gallery(answers, heldout, first_answers, params.gallery_prompts, base.seed)
    write_json(root / REPORTS / "samples.json", samples)
    with atomic_path(root / REPORTS / "samples.md") as partial:
        partial.write_text(side_by_side(samples), encoding="utf-8")
    metrics = {"heldout_prompts": len(heldout), "eval_prompts": len(measured) - len(heldout)}
    metrics |= {"judge_prompts": len(judged), "max_new_tokens": params.max_new_tokens}
    for name in MODELS:
        own = answers[
            (answers["model"] == name) & (answers["decoding"] == "sampled") & (answers["split"] != "judge")
        ]
        lengths = own["response_ids"].map(len)
        metrics[name] = {"tokens": float(lengths.mean()), "ended": float(own["ended"].mean())}
    write_json(root / REPORTS / "metrics.json", round_floats(metrics))
    print(f"wrote data/answers.parquet: {len(answers)} answers; data/best_of_n.parquet: {len(candidates)}")
    print(f"wrote {REPORTS}/samples.json, samples.md, metrics.json")
    tokens = sum(len(ids) for table in (answers, candidates) for ids in table["response_ids"])
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


def seed_of(seed: int, purpose: str) -> int:
    """A seed for the sampler's own generator."""
    return int(generator(seed, purpose).integers(2**32))


def as_table(asked: pd.DataFrame, answers: list[Answer]) -> pd.DataFrame:
    """`asked` with response_ids, text and ended."""
    columns = {"response_ids": [answer.ids for answer in answers], "text": [answer.text for answer in answers]}
    return asked.assign(**columns, ended=[answer.ended for answer in answers]).reset_index(drop=True)


def read(
    model: PreTrainedModel, answers: pd.DataFrame, temperature: float, precision: str, progress: str
) -> tuple[list[float], list[float]]:
    """Of each answer the summed log-prob and the mean entropy, at the temperature it was sampled at."""
    texts = answers["input_ids"].tolist(), answers["response_ids"].tolist()
    per_token = read_answers(TokenLogps(model, temperature), *texts, MICRO_BATCH_TOKENS, precision, progress)
    lengths = list(map(len, texts[1]))
    logps, entropies = (values.double().split(lengths) for values in per_token)
    return [float(each.sum()) for each in logps], [float(each.mean()) for each in entropies]


def gallery(
    answers: pd.DataFrame,
    heldout: pd.DataFrame,
    first_answers: dict[tuple[str, str], list[Answer]],
    count: int,
    seed: int,
) -> list[dict]:
    """samples.json: the first prompt, then `count` others of the held-out ones, drawn by `seed`."""
    others = heldout[heldout["prompt"] != FIRST_PROMPT]
    others = others.iloc[draw(len(others), count, seed, "gallery")]
    prompts = [{"prompt": FIRST_PROMPT, "prompt_id": None}, *others[["prompt", "prompt_id"]].to_dict("records")]
    found = {}
    for (model, decoding), first in first_answers.items():
        own = answers[(answers["model"] == model) & (answers["decoding"] == decoding)].set_index("prompt_id")
        rows = own.loc[others["prompt_id"]].itertuples()
        found[model, decoding] = [*first, *(Answer(row.response_ids, row.text, row.ended) for row in rows)]
    return gallery_entries(prompts, found)


def write_table(path: Path, table: pd.DataFrame) -> None:
    columns = {name: table[name].tolist() for name in table if name not in ("prompt", "input_ids")}
    types = {"response_ids": pa.list_(pa.int32()), "prompt_id": pa.int64()}
    write_parquet(path, {name: pa.array(values, types.get(name)) for name, values in columns.items()})


if __name__ == "__main__":
    run_stage("sample_responses", main, Params)
