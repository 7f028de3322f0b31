"""Make corrupted copies of the chosen answers: pairs in which style says nothing and quality all.

Reads   data/pairs/{train,heldout,judge}.parquet
Writes  data/corrupted/{train,heldout,judge}.parquet    row, prompt_id, kind, prompt, chosen, rejected (the copy),
                                                        messages and tools where pairs have them; train_kinds and
                                                        short pairs, both sides', judge_kinds
        data/corrupted/negatives.parquet                the same; one copy a training pair, for DPO
        data/corrupted/judge_short.parquet              the same; the judge's, with short whole answers
        reports/corrupt_answers/metrics.json            copies made and left out, by table and kind
        reports/corrupt_answers/run.json                seconds, memory, versions

Run     dvc repro corrupt_answers                       (untracked: python -m stages.corrupt_answers)

A copy is left out where a text cannot be spoilt in the way of its kind (one sentence cannot change its order).
Short whole answers keep a preference model from taking length for quality. The reward model learns that a chosen
answer's first sentences beat its rejected answer's, the judge also that they beat the rejected one whole, and that
the whole one beats the rejected one's first sentences.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any, Self

import pyarrow as pa
from pydantic import model_validator

from stages.lib.data.corruptions import CORRUPTIONS, Answer, corrupt, shortened
from stages.lib.data.messages import question_of
from stages.lib.run.artefacts import read_rows, write_json, write_parquet
from stages.lib.run.params import Base, Section
from stages.lib.run.stage import run_stage

Row = dict[str, Any]  # of data/pairs
SCHEMA = pa.schema(
    {
        "row": pa.int64(),
        "prompt_id": pa.int64(),
        "kind": pa.string(),
        "prompt": pa.string(),
        "chosen": pa.string(),
        "rejected": pa.string(),
    }
)


class Params(Section):
    train_kinds: list[str]  # the reward model's, every kind once a training pair
    dpo_kinds: list[str]  # one of them a training pair
    judge_kinds: list[str]  # the judge's

    @model_validator(mode="after")
    def _check_kinds(self) -> Self:
        for name in ("train_kinds", "dpo_kinds", "judge_kinds"):
            kinds = getattr(self, name)
            if not kinds or len(set(kinds)) < len(kinds):
                raise ValueError(f"{name} must name at least one kind, and each once")
            if unknown := [kind for kind in kinds if kind not in CORRUPTIONS]:
                raise ValueError(f"{name}: {unknown[0]!r} is unknown; known kinds: {', '.join(CORRUPTIONS)}")
        return self


def answers_of(rows: list[Row], seed: int) -> dict[int, Answer]:
    """Row number -> its chosen answer, with one drawn from another prompt's if there is another."""
    by_prompt: dict[int, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    prompts = list(by_prompt)
    place_of = {prompt_id: place for place, prompt_id in enumerate(prompts)}
    answers = {}
    for row in rows:
        other = None
        if len(prompts) > 1:
            random = Random(f"other {seed} {row['row']}")
            place = place_of[row["prompt_id"]] + random.randrange(1, len(prompts))
            other = random.choice(by_prompt[prompts[place % len(prompts)]])["chosen"]
        answers[row["row"]] = Answer(row["chosen"], question_of(row), other)
    return answers


def copies_of(
    rows: list[Row], answers: dict[int, Answer], kinds: list[str], seed: int, counts: Counter[tuple[str, str]]
) -> Iterator[Row]:
    """Every kind of copy of every answer; `counts` counts those made and left out."""
    for row in rows:
        answer = answers[row["row"]]
        for kind in kinds:
            text = corrupt(kind, answer, f"{seed} {row['row']}")
            counts[kind, "left_out" if text is None else "made"] += 1
            if text is not None:
                yield row | {"kind": kind, "chosen": answer.text, "rejected": text}


def one_copy_each(
    rows: list[Row], answers: dict[int, Answer], kinds: list[str], seed: int, counts: Counter[tuple[str, str]]
) -> Iterator[Row]:
    """A copy of each answer, of a kind drawn among those that can spoil it."""
    for row in rows:
        order = Random(f"kind {seed} {row['row']}").sample(kinds, len(kinds))
        copies = list(copies_of([row], answers, order, seed, Counter()))
        counts[(copies[0]["kind"], "made") if copies else (order[0], "left_out")] += 1
        yield from copies[:1]


def shortened_answers(answers: dict[int, Answer], seed: int) -> dict[int, Answer]:
    """Those that can be shortened to their first sentences, so shortened."""
    short = {}
    for number, answer in answers.items():
        if (text := shortened(answer.text, Random(f"chosen {seed} {number}"))) is not None:
            short[number] = answer._replace(text=text)
    return short


def short_pairs(
    rows: list[Row],
    short: dict[int, Answer],
    seed: int,
    counts: Counter[tuple[str, str]],
    kinds: Sequence[str] = ("short_chosen", "short_rejected", "short_both"),
) -> Iterator[Row]:
    """Short chosen answers against rejected ones, whole and short, and whole ones against short rejected ones."""
    for row in rows:
        good, bad = short.get(row["row"]), shortened(row["rejected"], Random(f"rejected {seed} {row['row']}"))
        sides = {
            "short_chosen": (good and good.text, row["rejected"]),
            "short_rejected": (row["chosen"], bad),
            "short_both": (good and good.text, bad),
        }
        for kind in kinds:
            chosen, rejected = sides[kind]
            made = chosen is not None and rejected is not None and chosen.split() != rejected.split()
            counts[kind, "made" if made else "left_out"] += 1
            if made:
                yield row | {"kind": kind, "chosen": chosen, "rejected": rejected}


def main(base: Base, params: Params, root: Path = Path(".")) -> dict[str, Any]:
    rows = {split: read_rows(root / f"data/pairs/{split}.parquet") for split in ("train", "heldout", "judge")}
    answers = {split: answers_of(rows[split], base.seed) for split in rows}
    short = {split: shortened_answers(answers[split], base.seed) for split in rows}
    shortened_rows = [row for row in rows["judge"] if row["row"] in short["judge"]]
    every_kind = list(dict.fromkeys(params.train_kinds + params.judge_kinds))

    schema = SCHEMA
    for name in ("messages", "tools"):  # of prompts that are more than a user's turn
        if name in rows["train"][0]:
            schema = schema.append(pa.field(name, pa.string()))
    counts: dict[str, Counter[tuple[str, str]]] = {}

    def write(name: str, *tables: Iterator[Row]) -> None:
        columns: dict[str, list] = {column: [] for column in schema.names}
        for row in (row for table in tables for row in table):
            for column, values in columns.items():
                values.append(row[column])
        write_parquet(root / f"data/corrupted/{name}.parquet", pa.table(columns, schema))

    def counted(name: str) -> tuple[int, Counter[tuple[str, str]]]:
        return base.seed, counts.setdefault(name, Counter())

    for split, kinds in (("train", params.train_kinds), ("heldout", every_kind)):
        both_short = short_pairs(rows[split], short[split], *counted(split), ["short_both"])
        write(split, copies_of(rows[split], answers[split], kinds, *counted(split)), both_short)
    write("judge", copies_of(rows["judge"], answers["judge"], params.judge_kinds, *counted("judge")))
    write("negatives", one_copy_each(rows["train"], answers["train"], params.dpo_kinds, *counted("negatives")))
    write(
        "judge_short",
        short_pairs(rows["judge"], short["judge"], *counted("judge_short")),
        copies_of(shortened_rows, short["judge"], params.judge_kinds, *counted("judge_short")),
    )

    metrics = {
        name: {
            kind: {fate: count[kind, fate] for fate in ("made", "left_out")}
            for kind in dict.fromkeys(kind for kind, _ in count)
        }
        for name, count in counts.items()
    }
    write_json(root / "reports/corrupt_answers/metrics.json", metrics | {"seed": base.seed})
    made = {name: sum(kind["made"] for kind in kinds.values()) for name, kinds in metrics.items()}
    print(f"wrote data/corrupted: {', '.join(f'{count} {name}' for name, count in made.items())}")
    print("wrote reports/corrupt_answers/metrics.json")
    return {}


if __name__ == "__main__":
    run_stage("corrupt_answers", main, Params)
