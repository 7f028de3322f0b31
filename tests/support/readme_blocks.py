"""What README.md quotes of the committed run, made from its reports: the text between two comments of a name.

Run     python -m tests.support.readme_blocks     rewrites README.md from the reports in the working tree

A test holds the README equal to this over the reports of the newest commit.
"""

import csv
import json
import re
from collections.abc import Callable
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

REPO = Path(__file__).resolve().parents[2]
COLUMNS = {"base": "base", "dpo": "DPO", "ppo": "PPO", "chosen": "preferred answers"}
ROWS = (  # measure, decoding, label, digits, as a percentage
    ("win_rate", "sampled", "the judge prefers it to the base’s", 0, True),
    ("win_rate_lc", "sampled", "the same at equal length", 0, True),
    ("win_rate_same_end", "sampled", "the same where both ended, or both were cut", 0, True),
    ("score", "sampled", "reward model’s score", 2, False),
    ("objective", "sampled", "PPO’s objective: score less penalties", 2, False),
    ("kl", "sampled", "KL to the base, nats an answer", 1, False),
    ("rep_4", "greedy", "repeated 4-grams, greedy answers", 2, False),
    ("rep_4", "sampled", "repeated 4-grams, sampled answers", 3, False),
    ("tokens", "sampled", "tokens (at most {limit})", 0, False),
    ("ended", "sampled", "ended by itself", 0, True),
    ("has_emoji", "sampled", "has an emoji", 0, True),
    ("emoji", "sampled", "emoji", 2, False),
    ("asks_back", "sampled", "asks back", 0, True),
)
NOT_RUN = "\N{EM DASH}"  # of a stage that is newer than the committed run
REAL = "bench/results/human_like"  # reports of the run on real pairs, without their texts
LONGEST = 300  # characters of an answer that is shown

Read = Callable[[str], str | None]  # a file's text by its path from the root; None where it is not there


def blocks(read: Read) -> dict[str, str]:
    """The text of every block by name."""
    return {
        "judge": judge(read),
        "verdicts": verdicts(read, "reports"),
        "scorecard": scorecard(read, "reports"),
        "real": scorecard(read, REAL),
        "answers": answers(read),
        "likelier": likelier(read),
        "stages": stages(read),
    }


def verdicts(read: Read, reports: str) -> str:
    found = json.loads(read(f"{reports}/score_responses/verdicts.json"))
    lines = [
        f"- **{COLUMNS[model]}: {each['word']}**: {'; '.join(each['reasons'])}." for model, each in found.items()
    ]
    table = csv.DictReader(StringIO(read(f"{reports}/score_responses/scorecard.csv")))
    for row in table:
        if (row["model"], row["measure"]) == ("ppo", "objective"):
            change, low, high = (f"{float(row[name]):+.2f}" for name in ("change", "change_low", "change_high"))
            lines[-1] += (
                f" Its objective, what it maximises, changed by {change} [{low}, {high}] on these prompts."
            )
    return "\n".join([*lines, seeds(read)])


def seeds(read: Read) -> str:
    """With which seeds each model was better, and what may be claimed of it: what holds with every one."""
    table = list(csv.DictReader(StringIO(read("bench/results/seeds.csv"))))
    said, claimed = [], []
    for model in ("dpo", "ppo"):
        of_model = [row for row in table if row["model"] == model]
        better = sum(row["verdict"] == "better" for row in of_model)
        shares = ", ".join(f"{100 * float(row['win_rate']):.0f}" for row in of_model)
        said.append(f"{COLUMNS[model]} is better with {better} of {len(of_model)} (the judge: {shares} %)")
        claimed += [COLUMNS[model]] * (better == len(of_model))
    what = f"that {' and '.join(claimed)} {'is' if len(claimed) == 1 else 'are'} better" if claimed else "nothing"
    return (
        f"- **Three seeds**: {', '.join(said)}. Only what holds with every seed is claimed: {what} "
        "(`recipes/README.md`, Three seeds)."
    )


def judge(read: Read) -> str:
    """Who compares the answers, and what it can tell."""
    found = json.loads(read("reports/train_judge/metrics.json"))
    prompts = json.loads(read("reports/score_responses/metrics.json"))["prompts"]
    return (
        "Answers are compared by **the judge**: a logistic regression on the same base's hidden states, fitted on "
        f"{found['pairs']} pairs that no training saw and on corrupted copies of their answers. It knows the manner "
        "that the data prefer, and hardly whether an answer fits its question: it tells one from the answer to another "
        f"prompt in {100 * found['by_kind']['other_prompt']:.0f} % of pairs. Settings were chosen by it, on prompts "
        f"of its own; these are {prompts} others. Brackets hold 95 % intervals over prompts; the rules are in "
        "`stages/lib/analysis/verdict.py`:"
    )


def scorecard(read: Read, reports: str) -> str:
    table = list(csv.DictReader(StringIO(read(f"{reports}/score_responses/scorecard.csv"))))
    found = {(row["model"], row["decoding"], row["measure"]): row for row in table}
    limit = json.loads(read(f"{reports}/sample_responses/metrics.json"))["max_new_tokens"]
    verdict = json.loads(read(f"{reports}/score_responses/verdicts.json"))
    heads = [
        label + (f": {verdict[model]['word']}" if model in verdict else "") for model, label in COLUMNS.items()
    ]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(COLUMNS)]
    for measure, decoding, label, digits, as_percentage in ROWS:
        cells = []
        for model in COLUMNS:
            row = found.get((model, "data" if model == "chosen" and decoding == "sampled" else decoding, measure))
            cells.append(cell(row, digits, as_percentage) if row else "")
        if not any(cells):  # a measure that is newer than these reports
            continue
        if measure == "emoji" and ("base", "sampled", "has_emoji") in found:  # which tells more in one row
            continue
        lines.append(f"| {label.format(limit=limit)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(row: dict[str, str], digits: int, as_percentage: bool) -> str:
    """'0.52 [0.40, 0.63]', '61 % [55, 67]'"""
    factor = 100 if as_percentage else 1
    mean, low, high = (f"{factor * float(row[n]):.{digits}f}" if row[n] else "" for n in ("mean", "low", "high"))
    unit = " %" if as_percentage else ""
    return f"{mean}{unit}" + (f" [{low}, {high}]" if low else "")


def answers(read: Read) -> str:
    sample = json.loads(read("reports/sample_responses/samples.json"))[1]
    lines = [f"| {plain(sample['prompt'])} | base | DPO | PPO |", "|---|---|---|---|"]
    for decoding in ("greedy", "sampled"):
        texts = [plain(sample["answers"][model][decoding]) for model in ("base", "dpo", "ppo")]
        short = [text if len(text) <= LONGEST else text[:LONGEST].rstrip() + " …" for text in texts]
        lines.append(f"| {decoding} | " + " | ".join(short) + " |")
    return "\n".join(lines)


def likelier(read: Read) -> str:
    found = json.loads(read("reports/analyze_logps/metrics.json"))

    def interval(model: str, key: str) -> str:
        mean, low, high = (f"{found[model][name]:+.3f}" for name in (key, f"{key}_low", f"{key}_high"))
        return f"{mean} [{low}, {high}]"

    def against_heldout(model: str) -> str:
        low, high = found[model]["did_low"], found[model]["did_high"]
        word = "no difference found" if low <= 0 <= high else "more" if low > 0 else "less"
        return f"{interval(model, 'did')} against held-out answers of the same kind: {word}"

    return (
        "Do the trained models find their training data more likely? By so many nats per token more than the base "
        f"does: DPO\n{interval('dpo', 'change_train_chosen')} ({against_heldout('dpo')}), PPO, which never sees these\n"
        f"answers, {interval('ppo', 'change_train_chosen')} ({against_heldout('ppo')}).\n"
        "The whole answer, with AUC, displacement and baselines, is in `reports/analyze_logps/answer.md`."
    )


def plain(text: str) -> str:
    """One line that ends no table cell and opens no markup."""
    return re.sub(r"([\\`*_<>\[\]|#~])", r"\\\1", " ".join(text.split()))


def stages(read: Read) -> str:
    definitions = YAML(typ="safe").load(read("dvc.yaml"))["stages"]
    lines, total = ["| stage | does | time | peak memory |", "|---|---|---|---|"], 0.0
    machine = ""
    del definitions["check_paths"]  # computes nothing
    for name, definition in definitions.items():
        record = read(f"reports/{name}/run.json")
        if record is None:
            lines.append(f"| `{name}` | {definition['desc']} | {NOT_RUN} | {NOT_RUN} |")
            continue
        run = json.loads(record)
        total += run["seconds"]
        machine = f"{run['machine']}, {run['precision']}" if "precision" in run else machine
        seconds = f"{run['seconds']:.0f} s" if run["seconds"] >= 1 else "< 1 s"
        lines.append(f"| `{name}` | {definition['desc']} | {seconds} | {run['peak_memory_mb'] / 1000:.1f} GB |")
    return "\n".join(
        [*lines, "", f"The committed run: {machine}; {total / 60:.0f} minutes in all, installation apart."]
    )


def with_blocks(text: str, found: dict[str, str]) -> str:
    """The README with every block as it should be.

    Raises:
        ValueError: a block's comments are missing.
    """
    for name, block in found.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"README.md: no '<!-- {name} -->' and '<!-- end of {name} -->'")
        text = pattern.sub(lambda match, block=block: match[1] + block + "\n" + match[2], text)
    return text


def main() -> None:
    def read(path: str) -> str | None:
        return (REPO / path).read_text(encoding="utf-8") if (REPO / path).is_file() else None

    readme = REPO / "README.md"
    readme.write_text(with_blocks(readme.read_text(encoding="utf-8"), blocks(read)), encoding="utf-8")
    print("wrote README.md")


if __name__ == "__main__":
    main()
