"""Rows in every form and files in every format, then damaged: read as they stand, refused by name, or counted."""

import ast
import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.fetch_pairs import Params, main
from stages.lib.run.artefacts import read_json, read_rows
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, load_params
from tests.conftest import REPO

BASE = Base(seed=42, precision="fp32")
SPLITS = ("train", "heldout", "judge")
PACKINGS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}
texts = st.one_of(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=8),
    st.sampled_from([
        "Hi?", "a\n\nHuman: b", "a\r\nb", '"', "';", "NaN", "0", "\ufeffx", "\u2028", "[]", "{}",
        "[{'role': 'user'}]", "🙂", " b ", "null", "\u202e", "e\u0301",
    ]),
)  # fmt: skip


def said(role, text):
    return {"role": role, "content": text}


FORMS = ["plain", "messages", "implicit", "repeated", "dialogue", "written", "parts", "from"]
JSON_ANSWERS = ['{"role": "assistant", "content": "K"}', '{"value": "k"}', '[{"content": "k"}]', '["k"]', '"k"']


@st.composite
def rows(draw, form):
    """A whole row in a form."""
    prompt, chosen, rejected, system = (draw(texts) for _ in range(4))
    prompt += draw(st.uuids()).hex[:6]
    chosen, rejected = f"good {chosen}", f"bad {rejected}"
    user, good, bad = said("user", prompt), said("assistant", chosen), said("assistant", rejected)
    before = draw(
        st.sampled_from([[], [said("system", system)], [said("user", system), said("assistant", chosen)]])
    )
    turns = [*before, user]
    if form == "dialogue":
        return {"chosen": f"\n\nHuman: {prompt}\n\nAssistant: {chosen}",
                "rejected": f"\n\nHuman: {prompt}\n\nAssistant: {rejected}"}  # fmt: skip
    if form == "messages":
        return {"prompt": turns, "chosen": [good], "rejected": draw(st.sampled_from([rejected, bad, [bad]]))}
    if form in ("implicit", "repeated"):
        row = {"chosen": [*turns, good], "rejected": [*turns, bad]}
        return row | ({"prompt": draw(st.sampled_from([prompt, turns]))} if form == "repeated" else {})
    if form == "written":
        write = draw(st.sampled_from([json.dumps, repr]))
        first = draw(st.sampled_from([{}, {"weight": 1}, {"name": None}]))
        lists = {"prompt": turns, "chosen": [good], "rejected": [bad]}
        return {side: write([first | turn for turn in said]) for side, said in lists.items()}
    if form == "parts":
        half = len(prompt) // 2
        parts = [{"type": "text", "text": prompt[:half]}, {"type": "text", "text": prompt[half:]}]
        return {"prompt": [said("user", parts)], "chosen": chosen, "rejected": rejected}
    if form == "from":
        return {
            side: [{"from": "human", "value": prompt}, {"from": "gpt", "value": text}]
            for side, text in (("chosen", chosen), ("rejected", rejected))
        }
    chosen = draw(st.just(chosen) | st.sampled_from(JSON_ANSWERS))
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected, "topic": system}
    return row | draw(st.sampled_from([{}, {"system": system}, {"tools": [{"name": "t"}]}]))


scalars = texts | st.none() | st.booleans() | st.integers() | st.floats()
keys = st.sampled_from(["role", "content", "x"])
anything = st.recursive(
    scalars | st.sampled_from(["", "\x00", "\u200b", "<|im_end|>"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=2),
    max_leaves=4,
)


@st.composite
def damaged(draw, form):
    """A row with something put, taken away or doubled anywhere in it."""
    row = draw(rows(form))
    for _ in range(draw(st.integers(1, 2))):
        holder = row
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(holder[key], dict | list) and holder[key] and draw(st.booleans()):
                holder = holder[key]
                continue
            deed = draw(st.sampled_from(["put", "take", "double"]))
            if deed == "put":
                holder[key] = draw(anything)
            elif deed == "take":
                del holder[key]
            else:
                holder[key] = [holder[key], holder[key]]
            break
    return row


@st.composite
def tables(draw):
    """Whole rows with damaged ones among them, of one form or of several."""
    form = draw(st.sampled_from([*FORMS, None]))
    forms = st.sampled_from(FORMS) if form is None else st.just(form)
    whole = [draw(rows(draw(forms))) for _ in range(draw(st.integers(4, 6)))]
    return draw(st.permutations(whole + [draw(damaged(draw(forms))) for _ in range(draw(st.integers(0, 2)))]))


def cell(value):
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def written(table: list[dict], name: str) -> tuple[bytes, list[dict]] | None:
    """The rows as a file of the format, and as it has them; None where the format cannot hold them."""
    if name == "a.jsonl":
        return "".join(json.dumps(row) + "\n" for row in table).encode(), table
    if name == "a.json":
        return json.dumps(table, indent=1).encode(), table
    if name == "wrapped.json":
        return json.dumps({"data": table}).encode(), table
    columns = list(dict.fromkeys(column for row in table for column in row))
    if name == "a.parquet":
        try:
            file = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist([{c: row.get(c) for c in columns} for row in table]), file)
        except (pa.ArrowException, ValueError, TypeError, OverflowError):
            return None
        content = file.getvalue().to_pybytes()
        return content, pq.read_table(pa.BufferReader(content)).to_pylist()
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if name.endswith("tsv") else ",")
    cells = [[cell(row.get(column)) for column in columns] for row in table]
    writer.writerows([columns, *cells])
    try:
        return text.getvalue().encode(), [dict(zip(columns, row, strict=True)) for row in cells]
    except UnicodeEncodeError:
        return None


def texts_of(value) -> list[str]:
    """Every text in a row, and what a list of text parts says together."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for inner in value.values() for text in texts_of(inner)]
    if isinstance(value, list):
        parts = [
            part if isinstance(part, str) else part.get("text") if isinstance(part, dict) else None
            for part in value
        ]
        joined = ["".join(parts)] if all(isinstance(part, str) for part in parts) else []
        return joined + [text for inner in value for text in texts_of(inner)]
    return []


def is_said(cell) -> bool:
    """Whether a cell is messages: a list, an object, or either as text."""
    return not isinstance(cell, str) or cell.startswith(
        ('[{"role', "[{'role", '{"role": "', '[{"name', '[{"weight')
    )


def expected(row: dict) -> tuple[list[tuple[str, str]], str, str] | None:
    """What a row says, as roles and texts, then the answers; None of a form that this does not read.

    Written apart from the code under test: a cell is a list of messages, such a list written as text, or a text; a
    message alone, as text, is one as a prompt, and as an answer where both answers are messages.
    """
    cells = {}
    for side in ("prompt", "chosen", "rejected"):
        cell = row.get(side)
        if isinstance(cell, str) and cell.startswith("[{"):
            for read in (json.loads, ast.literal_eval):
                try:
                    found = read(cell)
                except (ValueError, SyntaxError, TypeError):
                    continue
                if all(isinstance(turn, dict) and {"role", "content"} <= turn.keys() for turn in found):
                    cell = found
                break
        lone = json.loads(cell) if isinstance(cell, str) and cell.startswith('{"role": "') else None
        if lone and (side == "prompt" or all(is_said(row.get(other)) for other in ("chosen", "rejected"))):
            cell = [lone]
        if isinstance(cell, list):
            if not all(isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in cell):
                return None
            cell = [(turn["role"], turn["content"]) for turn in cell]
        elif not isinstance(cell, str) or "Human:" in cell:
            return None
        cells[side] = cell
    prompt, answers = cells["prompt"], (cells["chosen"], cells["rejected"])
    if any(isinstance(answer, list) and (len(answer) != 1 or answer[0][0] != "assistant") for answer in answers):
        return None
    turns = [("user", prompt)] if isinstance(prompt, str) else prompt
    if isinstance(row.get("system"), str) and row["system"].strip():
        return None
    chosen, rejected = (answer if isinstance(answer, str) else answer[0][1] for answer in answers)
    return turns, chosen, rejected


def is_in(text: str, row: dict) -> bool:
    """Whether the text stands in the row as it is, or as JSON or Python write it."""
    spellings = {text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], repr(text)[1:-1]}
    spellings |= {json.dumps(each)[1:-1] for each in spellings}
    return any(spelling in source for source in texts_of(row) for spelling in spellings)


inputs = dict(
    table=tables(),
    name=st.sampled_from(["a.jsonl", "a.json", "wrapped.json", "a.csv", "a.tsv", "a.parquet"]),
    packing=st.sampled_from(list(PACKINGS)),
    bad=st.sampled_from(["error", "drop", "drop"]),
    damage=st.sampled_from(["none"] * 5 + ["cut", "flip", "insert", "encode"]),
    where=st.floats(0, 1, exclude_max=True),
    noise=st.binary(min_size=1, max_size=4),
)


def was_read(root, table, name, packing, bad, damage, where, noise) -> bool:
    """Whether fetch_pairs took the file, and if so, proves that nothing was lost or altered."""
    found = written(table, name)
    if found is None:
        return False
    content, as_held = found
    packing = "" if name.endswith("parquet") else packing
    if damage == "encode" and not name.endswith("parquet"):
        content = content.decode().encode("utf-16")
    content = PACKINGS[packing](content)
    place = int(where * len(content))
    if damage in ("cut", "flip", "insert"):
        tail = {"cut": b"", "flip": noise[:1] + content[place + 1 :], "insert": noise + content[place:]}[damage]
        content = content[:place] + tail
    (root / f"{name}{packing}").write_bytes(content)
    for other, text in (("unseen.jsonl", '{"prompt": "u", "response": "t"}'), ("more.jsonl", '{"prompt": "m"}')):
        (root / other).write_text(text)
    params = load_params("fetch_pairs", Params, REPO).replace(
        path=f"{name}{packing}", unseen_path="unseen.jsonl", eval_prompts_path="more.jsonl", on_bad_row=bad
    )
    try:
        main(BASE, params, root)
    except UserError as error:
        assert name in str(error) or "distinct prompt" in str(error)
        assert "\n" not in str(error)
        return False
    metrics = read_json(root / "reports/fetch_pairs/metrics.json")
    kept = [row for split in SPLITS for row in read_rows(root / f"data/pairs/{split}.parquet")]
    assert metrics["read"] == metrics["kept"] + sum(metrics["dropped"].values()) and metrics["kept"] == len(kept)
    if damage not in ("none", "encode"):
        return True
    assert metrics["read"] == len(as_held)  # none is lost
    if name in ("a.jsonl", "a.json", "wrapped.json", "a.parquet"):  # where a row's number is its place
        for row in kept:  # none is altered
            source = as_held[row["row"] - 1]
            messages = json.loads(row.get("messages") or "[]") or [{"content": row["prompt"]}]
            said = [message["content"] for message in messages] + [row["chosen"], row["rejected"]]
            assert all(is_in(text, source) for text in said), (said, source)
            if wanted := expected(source):
                turns = [(message.get("role", "user"), message["content"]) for message in messages]
                assert (turns, row["chosen"], row["rejected"]) == wanted, source
    return True


how = dict(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


@settings(max_examples=80, **how)
@given(**inputs)
def test_any_file_is_read_as_it_stands_or_refused_and_the_counts_add_up(tmp_path, **example):
    was_read(tmp_path, **example)


@pytest.mark.slow
def test_two_thousand_files(tmp_path):
    read = []

    @settings(max_examples=2000, **how)
    @given(**inputs)
    def each(**example):
        read.append(was_read(tmp_path, **example))

    each()
    assert len(read) >= 2000 and sum(read) > 500  # many are taken, or the proof above would prove little
