import csv
import gzip
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data.rows import BadRow, open_source
from stages.lib.run.errors import UserError

ROWS = [{"prompt": "Hi?", "chosen": 'Hey, "you"\u2028 🙂', "rejected": "Hello.\nGood day."}, {"prompt": "b"}]


def read(path):
    return list(open_source(None, "main", path).rows)


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def test_every_format_gives_the_same_rows(tmp_path):
    rows = [ROWS[0], ROWS[0] | {"prompt": "second"}]
    table = io.StringIO()
    writer = csv.DictWriter(table, list(ROWS[0]))
    writer.writeheader()
    writer.writerows(rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    files = {
        "a.jsonl": as_lines(rows),
        "a.json": json.dumps(rows),
        "b.json": as_lines(rows),
        "a.csv": table.getvalue(),
    }
    for name, content in files.items():
        write(tmp_path, name, content)
        write(tmp_path, name + ".gz", gzip.compress(content.encode()))
        write(tmp_path, "bom_" + name, "\ufeff" + content)
    found = {path.name: [row for _, row in read(path)] for path in tmp_path.iterdir()}
    assert len(found) == 13
    assert all(value == rows for value in found.values()), found


def test_numbers_are_lines_or_elements(tmp_path):
    jsonl = write(tmp_path, "a.jsonl", '{"a": 1}\n\n  \n{"a": 2}\n')
    # the first row's text has a line break, so the second row starts on line 4
    table = write(tmp_path, "a.csv", 'a,b\n"x\ny",1\nz,2\n')
    array = write(tmp_path, "a.json", '[{"a": 1},\n{"a": 2}]')
    assert [number for number, _ in read(jsonl)] == [1, 4]
    assert [number for number, _ in read(table)] == [2, 4]
    assert [number for number, _ in read(array)] == [1, 2]
    assert open_source(None, "main", jsonl).where(4) == f"{jsonl}:4"
    assert open_source(None, "main", array).where(2) == f"{array}, row 2"


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        ('{"a": ', "malformed", "not valid JSON"),
        ('{"a": 1} {"a": 2}', "malformed", "column 10"),
        ('{"a": 1, "a": 2}', "duplicate_key", "'a' appears twice"),
        ("[1, 2]", "not_an_object", "found list"),
        ("null", "not_an_object", "found NoneType"),
        (b'{"a": "\xe9"}', "not_utf8", "not UTF-8"),
        ('{"a": "x"}'.encode("utf-16"), "not_utf8", "not UTF-8"),
        ("[" * 200_000, "malformed", "cannot be read"),
        ("9" * 5_000, "malformed", "cannot be read"),
        ("\x00", "malformed", "not valid JSON"),
    ],
)
def test_a_bad_line_is_one_bad_row_and_the_next_is_read(tmp_path, line, reason, words):
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, "a.jsonl", line.replace(b"\n", b"") + b'\n{"a": 3}\n')
    (_, bad), (number, good) = read(path)
    assert isinstance(bad, BadRow) and bad.reason == reason
    assert words.replace("cannot", "not JSON that can") in bad.message or words in bad.message
    assert (number, good) == (2, {"a": 3})


def test_a_million_characters_in_one_line(tmp_path):
    text = "ab \u00e9" * 250_000
    for path in (
        write(tmp_path, "a.jsonl", json.dumps({"a": text}) + "\n"),
        write(tmp_path, "a.csv", f"a\n{text}\n"),
    ):
        ((_, row),) = read(path)
        assert row == {"a": text}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", "x", "formats"),
        ("a", "x", "formats"),
        ("a.parquet.gz", "x", "formats"),
        ("a.json", '[{"a": 1},\n{"a" 2}]', "a.json:2: not valid JSON"),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', "a.json:2: not UTF-8"),
        ("a.json", "[" * 200_000, "not JSON that can be read"),
        ("a.csv", 'a\n"open\n', "not valid CSV"),
        ("a.csv", b"a\n\xff\n", "a.csv:2: not UTF-8"),
        ("a.csv", "a,b,a\n1,2,3\n", "appears twice"),
        ("a.parquet", "PAR1 no", "not a parquet file"),
        ("a.parquet", "", "not a parquet file"),
        ("a.jsonl.gz", "plain", "not a complete gzip"),
    ],
)
def test_damage_to_the_file_is_refused_by_name(tmp_path, name, content, words):
    with pytest.raises(UserError, match=words):
        read(write(tmp_path, name, content))


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(UserError, match="no such file"):
            read(path)


def test_csv_row_of_another_width_is_a_bad_row(tmp_path):
    rows = read(write(tmp_path, "a.csv", "a,b\n1\n1,2,3\n\n1,2\n"))
    assert [row.reason if isinstance(row, BadRow) else row for _, row in rows] == [
        "malformed",
        "malformed",
        {"a": "1", "b": "2"},
    ]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_truncated_anywhere_is_refused(tmp_path, name):
    rows = [{"a": f"text {i} 🙂"} for i in range(200)]
    path = tmp_path / name
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(as_lines(rows).encode()))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    content = path.read_bytes()
    for size in range(1, len(content), len(content) // 20):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="gzip|parquet"):
            read(path)


def test_parquet_with_broken_utf8_is_refused(tmp_path):
    broken = pa.array([b"\xff\xfe"]).cast(pa.binary()).view(pa.string())
    pq.write_table(pa.table({"a": broken}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="parquet"):
        read(tmp_path / "a.parquet")


@given(
    content=st.binary(max_size=300),
    name=st.sampled_from(["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"]),
)
def test_any_bytes_are_rows_or_a_user_error(tmp_path_factory, content, name):
    path = write(tmp_path_factory.mktemp("any"), name, content)
    try:
        rows = read(path)
    except UserError as error:
        assert path.name in str(error)
        return
    numbers = [number for number, _ in rows]
    assert numbers == sorted(set(numbers))
    assert all(isinstance(row, dict | BadRow) for _, row in rows)
