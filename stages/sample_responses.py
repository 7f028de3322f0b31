"""Answer the same prompts with base, DPO and PPO, greedy and sampled, and measure their style.

Reads   models/base, models/dpo, models/ppo, data/tokenized/prompts_heldout.parquet
Writes  reports/sample_responses/samples.json   every prompt and its six answers
        reports/sample_responses/samples.md     the same, to read side by side
        reports/sample_responses/measures.csv   style and fluency with intervals, and their change from base
        reports/sample_responses/metrics.json   means of the sampled answers
        reports/sample_responses/run.json       seconds, tokens/s, memory, versions

Run     dvc repro sample_responses              (untracked: python -m stages.sample_responses)
"""

from pathlib import Path

from pydantic import Field
from transformers import PreTrainedTokenizerBase

from stages.lib.analysis.style import comparison, measures
from stages.lib.data.chat import text_ids
from stages.lib.model.generate import Answer, answer_prompts, in_precision
from stages.lib.model.loading import freeze, load_causal_lm, load_tokenizer, pick_device, pick_precision
from stages.lib.model.logps import completion_logps
from stages.lib.report.gallery import gallery_entries, side_by_side
from stages.lib.run.artefacts import atomic_path, read_parquet, round_floats, write_history, write_json
from stages.lib.run.draws import draw
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, Section
from stages.lib.run.stage import run_stage

FIRST_PROMPT = "What's your morning routine like?"
MODELS = ("base", "dpo", "ppo")
MICRO_BATCH_TOKENS = 4096
REPORTS = Path("reports/sample_responses")


class Params(Section):
    num_prompts: int = Field(ge=1)  # held-out prompts, after the first, fixed one
    max_new_tokens: int = Field(ge=1)  # for the first prompt
    gallery_max_new_tokens: int = Field(ge=1)  # for the others
    temperature: float = Field(gt=0)
    top_p: float = Field(gt=0, le=1)


def main(base: Base, params: Params, root: Path = Path(".")) -> dict:
    device = pick_device()
    precision = pick_precision(base.precision, device)
    tokenizer = load_tokenizer(root / "models/base")

    # 1. every model answers every prompt
    prompts = choose_prompts(root, tokenizer, params.num_prompts, base.seed)
    prompt_ids = [prompt["input_ids"] for prompt in prompts]
    limits = [params.max_new_tokens] + [params.gallery_max_new_tokens] * (len(prompts) - 1)
    sampled = {"temperature": params.temperature, "top_p": params.top_p, "seed": base.seed}
    decodings = {"greedy": {}, "sampled": sampled}
    answers: dict[tuple[str, str], list[Answer]] = {}
    for name in MODELS:
        model = in_precision(freeze(load_causal_lm(root / "models" / name)), precision).to(device)
        for decoding, how in decodings.items():
            # the same seed for every model, so that samples differ by the model alone
            answers[name, decoding] = answer_prompts(
                model, tokenizer, prompt_ids, limits, precision, **how, progress=f"{name}, {decoding}"
            )

    # 2. how likely the base finds each answer
    ids = [answer.ids for several in answers.values() for answer in several]
    model = freeze(load_causal_lm(root / "models/base", device))
    prompts_of_ids = prompt_ids * len(answers)
    logps = completion_logps(model, prompts_of_ids, ids, MICRO_BATCH_TOKENS, precision, "under base")

    # 3. style and fluency of all but the first prompt, whose answers have a limit of their own
    measured = {
        key: measures(answers[key][1:], row.numpy()[1:])
        for key, row in zip(answers, logps.view(len(answers), -1), strict=True)
    }
    metrics = {"prompts": len(prompts) - 1}
    for name in MODELS:
        metrics[name] = {key: float(values.mean()) for key, values in measured[name, "sampled"].items()}

    samples = gallery_entries(prompts, answers)
    write_json(root / REPORTS / "samples.json", samples)
    with atomic_path(root / REPORTS / "samples.md") as partial:
        partial.write_text(side_by_side(samples), encoding="utf-8")
    write_history(root / REPORTS / "measures.csv", round_floats(comparison(measured, base.seed)))
    write_json(root / REPORTS / "metrics.json", round_floats(metrics))
    print(f"wrote {REPORTS}/samples.json, samples.md: {len(prompts)} prompts, {len(ids)} answers")
    print(f"wrote {REPORTS}/measures.csv, metrics.json")
    return {"tokens": sum(map(len, ids)), "device": device.type, "precision": precision}


def choose_prompts(root: Path, tokenizer: PreTrainedTokenizerBase, count: int, seed: int) -> list[dict]:
    """The fixed first prompt and up to `count` held-out ones drawn by `seed`: prompt, prompt_id, input_ids.

    Raises:
        UserError: there is no held-out prompt but the first.
    """
    columns = read_parquet(root / "data/tokenized/prompts_heldout.parquet")
    heldout = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    heldout = [row for row in heldout if row["prompt"] != FIRST_PROMPT]
    if not heldout:
        raise UserError("no held-out prompt to answer; raise fetch_pairs.holdout_fraction or max_pairs")
    message = [{"role": "user", "content": FIRST_PROMPT}]
    rendered = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    first = {"prompt": FIRST_PROMPT, "prompt_id": None, "input_ids": text_ids(rendered, tokenizer)}
    return [first] + [heldout[i] for i in draw(len(heldout), count, seed, "gallery_prompts")]


if __name__ == "__main__":
    run_stage("sample_responses", main, Params)
