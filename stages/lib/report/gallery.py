"""Answers of several models to the same prompts, as Markdown. Prompts and answers are untrusted text."""

from stages.lib.analysis.names import MODELS
from stages.lib.model.generate import Answer
from stages.lib.report.untrusted_text import escape_markdown, without_controls


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


def as_markdown(samples: list[dict]) -> str:
    """samples.json's entries as Markdown: a heading per prompt, under it every answer as a block quote."""
    parts = [
        "# Answers to the same prompts",
        "Each model's greedy answer (the likeliest token each time), then a sampled one, with the same random numbers "
        "for all. “[…]” marks an answer cut at the token limit.",
    ]
    for number, sample in enumerate(samples, start=1):
        parts.append(f"## {number}. {escape_markdown(sample['prompt'])}")
        models = list(sample["answers"])
        for decoding in sample["answers"][models[0]]:
            for model in models:
                text = quoted(sample["answers"][model][decoding]) or "> *(nothing)*"
                cut = "" if sample["ended"][model][decoding] else " […]"
                parts.append(f"**{MODELS.get(str(model), str(model))}, {decoding}**\n\n{text}{cut}")
    return "\n\n".join(parts) + "\n"


def quoted(text: str) -> str:
    """Untrusted text as a block quote that shows it as it was written, line by line; '' where it is blank."""
    lines = [escape_markdown(line) for line in without_controls(text.strip()).split("\n")]
    following = [*lines[1:], ""]
    broken = [  # a backslash keeps a line break that is followed by more of the paragraph
        line + "\\" * bool(line.strip() and after.strip()) for line, after in zip(lines, following, strict=True)
    ]
    return "\n".join(f"> {line}".rstrip() for line in broken) if text.strip() else ""
