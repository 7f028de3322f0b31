"""Ask a language model behind an OpenAI-compatible endpoint which answer is better: DPO's or PPO's, or the base's.

Reads   data/answers.parquet                         the sampled answers to the prompts to measure on
        data/tokenized/prompts_{heldout,eval}.parquet
        params.yaml: analyze_logps.confidence
        the environment: OPENAI_BASE_URL, OPENAI_API_KEY
Keeps   data/judge_cache                             every request and its reply; no out, so no run asks twice
Writes  reports/judge_responses/comparisons.csv      model, prompt_id, which answer stood first, what the model's
                                                     answer got (1, 1/2 at a tie, 0, empty without a verdict), and
                                                     the name of the reply in data/judge_cache
        reports/judge_responses/metrics.json         win rates with intervals, position bias, replies without verdict
        reports/judge_responses/run.json             seconds, requests, memory, versions

Off unless judge_responses.model is set: it then needs no network, and says in metrics.json that it is off.

Run     dvc repro judge_responses                    (untracked: python -m stages.judge_responses)
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from stages.lib.analysis.names import MODELS
from stages.lib.analysis.pairwise import outcome, question, tally
from stages.lib.analysis.wording import percent
from stages.lib.model.chat_endpoint import Endpoint, Reply, ask
from stages.lib.run.artefacts import atomic_path, read_parquet, round_floats, write_json
from stages.lib.run.draws import draw
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, Section, load_param
from stages.lib.run.stage import run_stage

TRAINED = ("dpo", "ppo")
COLUMNS = ("model", "prompt_id", "first", "won", "reply")
CACHE = Path("data/judge_cache")
REPORTS = Path("reports/judge_responses")


class Params(Section):
    model: str | None = Field(min_length=1)  # as the endpoint names it; null: the stage is off
    prompts: int | None = Field(ge=1)  # evaluation prompts, drawn by seed, four requests each; null: all
    temperature: float | None = Field(ge=0, le=2)  # of its replies; null: not sent
    parallel: int = Field(ge=1, le=64)  # requests at a time
    retries: int = Field(ge=0, le=20)  # of a request after a passing fault
    timeout: float = Field(gt=0, le=3600)  # seconds without a byte


def main(base: Base, params: Params, root: Path = Path(".")) -> dict[str, Any]:
    if params.model is None:
        write_comparisons(root, [])
        write_json(root / REPORTS / "metrics.json", {"on": False})
        print("off: judge_responses.model is null")
        return {}
    confidence = load_param("analyze_logps", "confidence", float, root)
    pairs = pairs_of_answers(root, params.prompts, base.seed)

    # 1. Ask about every pair of answers, in both orders
    how: dict[str, Any] = {"model": params.model}
    if params.temperature is not None:
        how |= {"temperature": params.temperature}
    requests = []
    for pair in pairs:
        for answers in ((pair["text"], pair["base_text"]), (pair["base_text"], pair["text"])):
            requests.append(how | {"messages": question(pair["prompt"], *answers)})
    endpoint = Endpoint.from_environment(params.retries, params.timeout)
    replies, asked = ask(requests, endpoint, root / CACHE, params.parallel, f"ask {params.model}")

    # 2. Parse: a reply without a verdict counts as that, and for nobody
    rows = []
    for pair, *both in zip(pairs, replies[::2], replies[1::2], strict=True):
        for first, reply in zip((pair["model"], "base"), both, strict=True):
            got = outcome(reply.text)  # by the answer that stood first
            won = got if got is None or first != "base" else 1 - got
            values = (pair["model"], pair["prompt_id"], first, won, reply.path.stem)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
    write_comparisons(root, rows)

    # 3. Count
    metrics = {"on": True, "model": params.model, "answered_by": sorted({r.model for r in replies if r.model})}
    metrics |= {"prompts": len(pairs) // len(TRAINED), "confidence": confidence}
    for model in TRAINED:
        own = [row for row in rows if row["model"] == model]
        longer = [pair["longer"] for pair in pairs if pair["model"] == model]
        metrics[model] = figures(own, longer, model, confidence, params.model)
    write_json(root / REPORTS / "metrics.json", round_floats(metrics))
    print(f"wrote {REPORTS}/comparisons.csv, metrics.json: {len(replies)} replies, {asked} of them asked for now")
    for model in TRAINED:
        print(f"{MODELS[model]}: {params.model} prefers its answers to the base's in {spelt(metrics[model])}")
    report_unparsed(replies)
    return {"requests": asked, "replies": len(replies)}


def pairs_of_answers(root: Path, count: int | None, seed: int) -> list[dict[str, Any]]:
    """DPO's, then PPO's answers beside the base's: model, prompt_id, prompt, text, base_text, longer (in tokens).

    Raises:
        UserError: an answer has no prompt, or a model no answer to a prompt that the base has one to.
    """
    columns = ["prompt_id", "prompt"]
    prompts = {}
    for split in ("heldout", "eval"):
        table = read_parquet(root / f"data/tokenized/prompts_{split}.parquet")
        prompts |= dict(zip(*(table[name] for name in columns), strict=True))
    answers = pd.DataFrame(read_parquet(root / "data/answers.parquet"))
    sampled = answers[answers["decoding"] == "sampled"]
    by_model = {model: own.set_index("prompt_id") for model, own in sampled.groupby("model")}
    asked = sorted(by_model["base"].index)
    asked = [asked[i] for i in draw(len(asked), count, seed, "prompts of judge_responses")]
    pairs = []
    for model in TRAINED:
        for prompt_id in asked:
            try:
                said, by_base = by_model[model].loc[prompt_id], by_model["base"].loc[prompt_id]
                prompt = prompts[prompt_id]
            except KeyError:
                raise UserError(
                    f"data/answers.parquet: prompt {prompt_id} is not that of every model and of data/tokenized; "
                    "run `dvc repro -f sample_responses`"
                ) from None
            longer = len(said["response_ids"]) - len(by_base["response_ids"])
            texts = {"prompt": prompt, "text": said["text"], "base_text": by_base["text"]}
            pairs.append({"model": model, "prompt_id": prompt_id, "longer": longer} | texts)
    return pairs


def figures(
    rows: list[dict[str, Any]], longer: list[int], model: str, confidence: float, judge: str
) -> dict[str, float | int | None]:
    """What metrics.json says of one model.

    Args:
        rows: its comparisons, a prompt's two orders one after the other, its own answer first in the former.
        longer: tokens of its answer less those of the base's, for each prompt.

    Raises:
        UserError: no prompt has a verdict in both orders.
    """
    won = np.array([row["won"] for row in rows], np.float64).reshape(-1, 2)  # NaN without a verdict
    counted, unparsed = int(np.isfinite(won).all(axis=1).sum()), int(np.isnan(won).sum())
    if not counted:
        raise UserError(
            f"{judge}: none of {len(won)} prompts of {model} has a verdict in both orders ({unparsed} of "
            f"{won.size} replies have none). Read some of {CACHE}, named in {REPORTS}/comparisons.csv, and "
            "choose another judge_responses.model"
        )
    found: dict[str, float | int | None] = {"counted_prompts": counted, "unparsed_replies": unparsed}
    for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0)):
        found[name] = int((won == value).sum())  # replies
    for name, interval in tally(won[:, 0], won[:, 1], longer, confidence).items():
        found |= interval.as_metrics(name)
    return found


def spelt(found: dict[str, Any]) -> str:
    """'61 % (58 % of replies for the first answer, 3 without verdict)'"""
    share, first = percent(found["win_rate"]), percent(found["prefers_first"])
    return f"{share} ({first} of replies for the first answer, {found['unparsed_replies']} without a verdict)"


def report_unparsed(replies: list[Reply]) -> None:
    unparsed = [reply for reply in replies if outcome(reply.text) is None]
    if unparsed:
        example = " ".join(unparsed[0].text.split())[:120]
        print(f"{len(unparsed)} of {len(replies)} replies have no verdict; {unparsed[0].path} says '{example}'")


def write_comparisons(root: Path, rows: list[dict[str, Any]]) -> None:
    text = pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(index=False, lineterminator="\n")
    with atomic_path(root / REPORTS / "comparisons.csv") as partial:
        partial.write_text(text, encoding="utf-8", newline="")


if __name__ == "__main__":
    run_stage("judge_responses", main, Params)
