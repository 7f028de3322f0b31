"""Answers of several models side by side, as Markdown. Prompts and answers are untrusted text."""

from stages.lib.analysis.names import MODELS
from stages.lib.model.generate import Answer
from stages.lib.report.untrusted_text import escape_markdown


def gallery_entries(prompts: list[dict], answers: dict[tuple[str, str], list[Answer]]) -> list[dict]:
    """samples.json: per prompt the text of each answer by model and decoding, and whether it ended by itself.

    Args:
        prompts: each with prompt and prompt_id.
        answers: by model and decoding, each in the order of the prompts.
    """
    entries = []
    for i, prompt in enumerate(prompts):
        entry = {"prompt": prompt["prompt"], "prompt_id": prompt["prompt_id"], "answers": {}, "ended": {}}
        for (model, decoding), several in answers.items():
            entry["answers"].setdefault(model, {})[decoding] = several[i].text
            entry["ended"].setdefault(model, {})[decoding] = several[i].ended
        entries.append(entry)
    return entries


def side_by_side(samples: list[dict]) -> str:
    """samples.json's entries as Markdown: a heading and a table per prompt, a column per model."""
    parts = [
        "# Answers side by side",
        "The same prompts answered by each model: greedy (the likeliest token each time) and sampled with the "
        "same random numbers for all. “[…]” marks an answer cut at the token limit.",
    ]
    for number, sample in enumerate(samples, start=1):
        models = list(sample["answers"])
        rows = [
            f"## {number}. {escape_markdown(sample['prompt'])}",
            "",
            "| | " + " | ".join(MODELS.get(str(model), str(model)) for model in models) + " |",
            "|---|" + "---|" * len(models),
        ]
        for decoding in sample["answers"][models[0]]:
            cells = []
            for model in models:
                text = escape_markdown(sample["answers"][model][decoding].strip()) or "*(nothing)*"
                cells.append(text if sample["ended"][model][decoding] else f"{text} […]")
            rows.append(f"| {decoding} | " + " | ".join(cells) + " |")
        parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"
