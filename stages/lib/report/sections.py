"""What surrounds the report's key numbers: what was done, how training went, what the models say, what it cost."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from stages.lib.analysis.names import MODELS
from stages.lib.analysis.wording import CAPTIONS, estimate
from stages.lib.report.charts import Picture, Points, curves, picture
from stages.lib.report.files import ReportFiles, data_license
from stages.lib.report.page import Answer, Sample, Table, Tile, percentages, spell_seconds
from stages.lib.report.plots import STAGE_OF
from stages.lib.run.errors import UserError

DATA_STAGES = (
    "fetch_base",
    "fetch_pairs",
    "corrupt_answers",
    "tokenize_pairs",
    "inspect_pairs",
    "reference_logps",
)
MODEL_STAGES = (
    "train_dpo",
    "train_reward",
    "train_judge",
    "train_ppo",
    "sample_responses",
    "score_responses",
    "judge_responses",
    "analyze_logps",
)
STAGES = (*DATA_STAGES, *MODEL_STAGES, "publish_hub")
PARAMETERS = ("base", "lora", *DATA_STAGES, *MODEL_STAGES)  # the sections that the numbers depend on
NONE = "\N{EM DASH}"
BACKBONES = {
    "frozen": "the frozen base",
    "lora": "the base with trained adapters",
    "full": "the base, all trained",
}
JUDGED = ("dpo", "ppo")  # against the base
MAY_LACK = (
    "objective",  # is of another reference than the base, where PPO started from DPO
    "win_rate_same_end",  # where no prompt has two answers that both ended or both were cut
)

COLUMNS = {**MODELS, "chosen": "Preferred answers"}
MEASURES = {  # of scorecard.csv: decoding, label, digits, as a percentage
    "win_rate": ("sampled", "Preferred to the base’s by the judge", 0, True),
    "win_rate_lc": ("sampled", "The same at equal length", 0, True),
    "win_rate_same_end": ("sampled", "The same where both ended or both were cut", 0, True),
    "score": ("sampled", "Reward-model score", 2, False),
    "objective": ("sampled", "PPO’s objective: score less penalties", 2, False),
    "kl": ("sampled", "KL to the base (nats per answer)", 1, False),
    "rep_4": ("sampled", "Repeated 4-grams within an answer", 2, False),
    "greedy rep_4": ("greedy", "The same of greedy answers", 2, False),
    "ended": ("sampled", "Ended by itself", 0, True),
    "tokens": ("sampled", "Length (tokens)", 0, False),
    "distinct_2": ("sampled", "Distinct 2-grams over answers", 2, False),
    "entropy": ("sampled", "Entropy (nats per token)", 2, False),
    "base_logp_per_token": ("sampled", "Log-prob per token under the base (nats)", 2, False),
    "has_emoji": ("sampled", "Has an emoji", 0, True),
    "emoji": ("sampled", "Emoji per answer", 2, False),
    "exclamations": ("sampled", "Exclamation marks per answer", 2, False),
    "asks_back": ("sampled", "Has a question", 0, True),
    "disclaimer": ("sampled", "“As an AI” phrase", 0, True),
}


def lede(files: ReportFiles) -> str:
    """What was trained on what, and on what it was checked."""
    name = (files.metric("fetch_base", "hub_id") or "A local model").split("/")[-1]
    size = files.metric("fetch_base", "parameters") / 1e6
    train, heldout = (files.metric("fetch_pairs", f"{split}_pairs") for split in ("train", "heldout"))
    met = files.metric("train_dpo", "pairs_met")
    some = "" if met == train else f", which met {met:,} of them"
    return (
        f"{name} ({size:.4g} million parameters), trained on {train:,} preference pairs of "
        f"{files.metric('fetch_pairs', 'source')}: directly (DPO{some}), and on the score of a reward model "
        f"learnt from the same pairs (PPO). Answers are judged on {files.metric('score_responses', 'prompts'):,} "
        f"prompts, rankings on {heldout:,} pairs; no training saw any of them."
    )


def setup(files: ReportFiles, params: dict[str, Any]) -> list[tuple[str, str]]:
    """Models, data and trainings, a line or two each."""
    keys = ("hub_id", "model_type", "parameters", "license", "revision")
    hub_id, model_type, size, license, revision = (files.metric("fetch_base", key) for key in keys)
    keys = ("source", "license", "revision", "sha256")
    source, stated, data_revision, checksum = (files.metric("fetch_pairs", key) for key in keys)
    dpo, reward, ppo = (params[stage] for stage in ("train_dpo", "train_reward", "train_ppo"))
    dpo_steps, reward_steps = (files.metric(stage, "steps") for stage in ("train_dpo", "train_reward"))
    keys = ("episodes", "updates", "kept_update", "stopped_early")
    episodes, updates, kept_update, stopped_early = (files.metric("train_ppo", key) for key in keys)
    keys = ("pairs", "corrupted", "layer", "strength", "cv_accuracy")
    judge_pairs, judge_copies, layer, strength, cv_accuracy = (files.metric("train_judge", key) for key in keys)
    heldout_accuracy = files.metric("train_judge", "heldout", "accuracy")
    met, copies = (files.metric("train_dpo", key) for key in ("pairs_met", "hard_negatives_met"))
    lora, adapters = params["lora"], f"; adapters of rank {params['lora']['rank']} were trained"
    stopped = f" Stopped early at {stopped_early}." if stopped_early else ""
    return [
        (
            "Base model",
            f"{hub_id or 'a local model'} ({model_type}, {size:,} parameters), licence {license or 'not stated'}, "
            f"revision {_short(revision)}",
        ),
        (
            "Preference pairs",
            f"{source}, licence {data_license(stated, checksum) or 'not stated'}, "
            f"revision {_short(data_revision or f'sha256:{checksum}')}",
        ),
        (
            "DPO",
            f"{dpo['loss']} loss, beta {dpo['beta']:g}, learning rate {_rate(dpo['learning_rate'])}, "
            f"{_times(dpo_steps, 'step')} of {dpo['batch_size']} pairs: {met:,} of the preference pairs and {copies:,} "
            f"corrupted copies were met{adapters if lora['rank'] else ''}",
        ),
        (
            "Reward model",
            f"linear head on {BACKBONES[reward['backbone']]}, learning rate {_rate(reward['learning_rate'])}, "
            f"{_times(reward['epochs'], 'epoch')}: {_times(reward_steps, 'step')} of {reward['batch_size']} pairs",
        ),
        (
            "Judge",
            f"logistic regression (C {strength:g}) on the base’s mean hidden state after layer {layer}, both chosen by "
            f"cross-validation (right in {percentages(cv_accuracy)}, the mean over kinds of pairs), fitted on "
            f"{_times(judge_pairs, 'pair')} of its own and {judge_copies:,} with corrupted or shortened copies; "
            f"right in {percentages(heldout_accuracy)} of the held-out pairs; it compares a sampled answer with "
            f"{params['sample_responses']['opponents']} of the base’s to the same prompt",
        ),
        (
            "PPO",
            f"from the {'base' if ppo['policy'] == 'base' else 'DPO'} model, {_times(episodes, 'episode')} in "
            f"{_times(updates, 'update')}, answers of up to {ppo['response_length']} tokens, "
            f"KL price {ppo['kl_coef']:g}, learning rate {_rate(ppo['learning_rate'])}; the policy of update "
            f"{kept_update} was kept{adapters if lora['rank'] else ''}.{stopped}",
        ),
    ]


def data_counts(files: ReportFiles) -> list[tuple[str, str]]:
    """Everything read, kept, dropped and cut."""

    def sizes(split: str) -> str:
        pairs, prompts = (files.metric("fetch_pairs", f"{split}_{what}") for what in ("pairs", "prompts"))
        return f"{_times(pairs, 'pair')} over {_times(prompts, 'prompt')}"

    unseen, source = files.metric("fetch_pairs", "unseen_texts"), files.metric("fetch_pairs", "unseen", "source")
    cuts = {limit: count for limit, count in files.metric("tokenize_pairs", "cut").items() if count}
    lengths = files.metric("tokenize_pairs", "lengths")
    return [
        ("Pairs read", f"{files.metric('fetch_pairs', 'read'):,}"),
        ("Kept", f"{files.metric('fetch_pairs', 'kept'):,}"),
        ("Dropped", _reasons(files.metric("fetch_pairs", "dropped"))),
        ("Dropped when tokenized", _reasons(files.metric("tokenize_pairs", "dropped"))),
        ("Trained on", sizes("train")),
        ("Held out", f"{sizes('heldout')}, none of them trained on"),
        ("The judge’s", f"{sizes('judge')}: it is fitted on them, and settings were chosen on their prompts"),
        ("Unseen texts", f"{unseen:,} of another kind, from {source}"),
        ("Cut to a limit", _reasons(cuts)),
        (
            "Mean (longest), in tokens",
            ", ".join(f"{kind} {row['mean']:.0f} ({row['max']:,})" for kind, row in lengths.items()),
        ),
    ]


def training_curves(files: ReportFiles) -> list[Picture]:
    """The histories of the three trainings."""

    def line(stage: str, name: str, x: str, y: str) -> Points:
        x_values, y_values = files.columns(stage, name, x, y)
        return x_values, y_values

    def dpo(title: str, column: str, unit: str, caption: str) -> Picture:
        lines = {
            "training batch": line("train_dpo", "history.csv", "step", column),
            "held-out pairs": line("train_dpo", "heldout.csv", "step", column),
        }
        return curves(title, caption, lines, "optimizer step", unit)

    def reward(title: str, column: str, unit: str, caption: str) -> Picture:
        lines = {
            "training pairs": line("train_reward", "history.csv", "step", column),
            "held-out pairs": line("train_reward", "history.csv", "step", f"eval_{column}"),
        }
        return curves(title, caption, lines, "optimizer step", unit)

    def ppo(title: str, column: str, heldout_column: str | None, unit: str, caption: str) -> Picture:
        lines = {"training batch": line("train_ppo", "history.csv", "episode", column)}
        if heldout_column and files.text("train_ppo", "evaluations.csv").strip():
            lines["judge's prompts"] = line("train_ppo", "evaluations.csv", "episode", heldout_column)
        return curves(title, caption, lines, "episodes", unit)

    sides = {side: line("train_dpo", "heldout.csv", "step", f"logps/{side}") for side in ("chosen", "rejected")}
    falling = "A falling chosen line is likelihood displacement."
    return [
        dpo("DPO: loss", "loss", "loss", "Starts at ln 2 = 0.693; near 0 the pairs are told apart."),
        dpo(
            "DPO: pairs ranked right",
            "rewards/accuracies",
            "share of pairs",
            "By the implicit reward. Training batches hold corrupted copies, too, so a gap alone says nothing; "
            "a held-out line that falls again is overfitting.",
        ),
        dpo(
            "DPO: reward margin",
            "rewards/margins",
            "implicit reward",
            "Implicit reward of the chosen less that of the rejected answer.",
        ),
        curves("DPO: held-out log-probs", falling, sides, "optimizer step", "nats per answer"),
        reward("Reward model: loss", "loss", "loss", "ln 2 = 0.693 is guessing."),
        reward("Reward model: pairs ranked right", "accuracy", "share of pairs", "0.5 is guessing."),
        ppo(
            "PPO: reward-model score",
            "objective/raw_scores",
            "score",
            "mean score",
            "What PPO is paid for. A rise on prompts that it is not trained on is what counts.",
        ),
        ppo("PPO: KL to the start", "objective/kl", "kl", "nats per answer", "How far the policy has travelled."),
        ppo("PPO: entropy", "objective/entropy", None, "nats per answer", "Near 0 all answers would be the same."),
    ]


def pictures(root: Path) -> list[Picture]:
    """All pictures with their captions."""
    paths = {}
    for name in CAPTIONS:
        stage = STAGE_OF.get(name, "analyze_logps")
        paths[name] = root / f"reports/{stage}/{name}.png"
        if not paths[name].is_file():
            raise UserError(f"reports/{stage}/{name}.png: not found; run `dvc repro {stage}`")
    return [picture(path, name.replace("_", " "), CAPTIONS[name]) for name, path in paths.items()]


def gallery(files: ReportFiles, rows: int) -> list[Sample]:
    """The first prompts of samples.json with every model's answers."""
    samples = []
    for number, entry in enumerate(files.json("sample_responses", "samples.json")[:rows], 1):
        try:
            answers = {label: _answer(entry, model) for model, label in MODELS.items()}
            samples.append(Sample(entry["prompt"], answers))
        except (KeyError, TypeError) as error:
            where = f"reports/sample_responses/samples.json: sample {number}"
            raise UserError(f"{where}: {error} is missing; run `dvc repro -f sample_responses`") from error
    return samples


def scorecard(files: ReportFiles, mark_change: Callable[[str], str] | None = None) -> Table:
    """Every measure of the models' answers and of the data's preferred ones, with intervals.

    Args:
        mark_change: makes a cell stand out; called where the change from the base's answers to the same prompts
            is clear of zero.
    """
    rows = []
    for key, (decoding, label, digits, as_percentage) in MEASURES.items():
        measure, cells = key.removeprefix("greedy "), [label]
        for model in COLUMNS:
            how = "data" if model == "chosen" else decoding
            interval = None if (how, decoding) == ("data", "greedy") else files.scored(model, measure, how)
            if interval is None:
                cells.append(NONE)
                continue
            cell = percentages(interval, digits) if as_percentage else estimate(interval, digits)
            change = files.scored(model, measure, how, change=True)
            if mark_change and change is not None and not change.covers(0):
                cell = mark_change(cell)
            cells.append(cell)
        if cells[1:] == [NONE] * len(COLUMNS):
            if measure in MAY_LACK:
                continue
            where = "reports/score_responses/scorecard.csv"
            raise UserError(f"{where}: no {measure}; run `dvc repro -f score_responses`")
        rows.append(cells)
    return Table(["Answers", *COLUMNS.values()], rows)


def second_judge(files: ReportFiles) -> Table | None:
    """What the language model of judge_responses prefers, beside the judge; None where the stage is off."""
    if not files.metric("judge_responses", "on"):
        return None
    name = files.metric("judge_responses", "model")
    rows = {
        "win_rate": f"Preferred to the base’s by {name}",
        "win_rate_lc": "The same at equal length",
        "consistent": "Same verdict in both orders",
        "prefers_first": "For the answer that stood first (50 %: no bias)",
    }
    cells = [["Preferred to the base’s by the judge"]]
    cells[0] += [percentages(win) if (win := files.scored(model, "win_rate")) else NONE for model in JUDGED]
    for key, label in rows.items():
        cells.append([label, *(percentages(files.interval("judge_responses", model, key)) for model in JUDGED)])
    for key, label in (
        ("counted_prompts", "Prompts with two verdicts"),
        ("unparsed_replies", "Replies with none"),
    ):
        cells.append([label, *(f"{files.metric('judge_responses', model, key):,}" for model in JUDGED)])
    return Table(["A second judge", *(MODELS[model] for model in JUDGED)], cells)


def verdict_paragraphs(files: ReportFiles) -> str:
    """The verdict on each trained model, as the Markdown of an answer."""
    return "\n\n".join(
        f"**{MODELS[model]}: {word}.** {reasons[0].upper()}{reasons[1:]}."
        for model, (word, reasons) in files.verdicts().items()
    )


def judge(files: ReportFiles) -> str:
    """Who compares the answers, and what it can tell."""
    pairs, copies, kinds = (files.metric("train_judge", name) for name in ("pairs", "corrupted", "by_kind"))
    told = ""
    if "other_prompt" in kinds:
        told = (
            " It judges manner more than relevance: it tells a held-out answer from one to another prompt in "
            f"{percentages(kinds['other_prompt'])} of cases."
        )
    return (
        "The judge is a logistic regression on the same base’s hidden states, fitted on "
        f"{_times(pairs, 'pair')} of its own and {copies:,} with corrupted or shortened copies of their answers. "
        f"It took no part in training, but settings were chosen on its own prompts.{told}"
    )


def cost_tile(files: ReportFiles) -> Tile:
    """Time and memory at a glance."""
    runs = read_runs(files)
    if not runs:
        return Tile("Cost", "not recorded", "", "No run.json here: the stages ran elsewhere.")
    peak = max(run["peak_memory_mb"] for run in runs.values()) / 1000
    missing = [stage for stage in STAGES if stage not in runs]
    note = f" Not recorded: {', '.join(missing)}." if missing else ""
    seconds = sum(run["seconds"] for run in runs.values())
    machines = _distinct(run["machine"] for run in runs.values())
    return Tile(
        "Cost of all stages", spell_seconds(seconds), "", f"Peak memory {peak:.1f} GB, on {machines}.{note}"
    )


def costs(files: ReportFiles) -> Table:
    """Time, throughput and peak memory of every stage."""
    runs, rows = read_runs(files), []
    for stage in STAGES:
        run = runs.get(stage)
        if run is None:
            rows.append([stage, "not recorded", NONE, NONE, NONE])
            continue
        speed = f"{run['tokens_per_second']:,.0f}" if "tokens_per_second" in run else NONE
        where = ", ".join(str(run[key]) for key in ("device", "precision") if key in run) or NONE
        rows.append([stage, spell_seconds(run["seconds"]), speed, f"{run['peak_memory_mb'] / 1000:.1f} GB", where])
    return Table(["Stage", "Time", "Tokens/s", "Peak memory", "Ran on"], rows)


def provenance(files: ReportFiles) -> list[tuple[str, str]]:
    """Machine, versions and Git revision; where stages ran under different ones, all of them."""
    runs = read_runs(files).values()
    names = dict.fromkeys(name for run in runs for name in run["versions"])
    versions = (f"{name} {_distinct(run['versions'].get(name) for run in runs)}" for name in names)
    return [
        ("Machine", _distinct(run["machine"] for run in runs)),
        ("Versions", ", ".join(versions) or NONE),
        ("Git revision", _distinct(run["git_revision"] for run in runs)),
    ]


def read_runs(files: ReportFiles) -> dict[str, dict[str, Any]]:
    """run.json of each stage that left one."""
    runs = {stage: files.run(stage) for stage in STAGES}
    return {stage: run for stage, run in runs.items() if run is not None}


def _answer(entry: dict[str, Any], model: str) -> Answer:
    texts, ended = entry["answers"][model], entry["ended"][model]
    return Answer(texts["greedy"], texts["sampled"], ended["greedy"], ended["sampled"])


def _short(revision: str) -> str:
    """'sha256:0123456789ab…' or the like; all of it stands in metrics.json."""
    kind, _, digits = revision.rpartition(":")
    return (f"{kind}:" if kind else "") + (f"{digits[:12]}…" if len(digits) > 12 else digits)


def _rate(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


def _times(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} ({reason.replace('_', ' ')})" for reason, count in counts.items()) or "none"


def _distinct(values: Iterable[Any]) -> str:
    return " / ".join(dict.fromkeys(str(value) for value in values if value is not None)) or NONE
