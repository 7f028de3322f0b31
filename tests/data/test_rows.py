import bz2
import csv
import gzip
import io
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.lib.data.messages import BadRow
from stages.lib.data.rows import from_path
from stages.lib.run.errors import UserError

ROWS = [{"prompt": "Hi?", "chosen": 'Hey, "you"\u2028 🙂', "rejected": "Hello.\nGood day."}, {"prompt": "b"}]


PACKINGS = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


def read(path):
    return list(from_path(path).rows)


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
        "a.ndjson": "\n\n" + as_lines(rows),
        "b.jsonl": json.dumps(rows),
        "pretty.jsonl": "\n".join(json.dumps(row, indent=2) for row in rows),
        "a.json": json.dumps(rows),
        "b.json": as_lines(rows),
        "pretty.json": json.dumps(rows, indent=2),
        "wrapped.json": json.dumps({"version": 1, "data": rows}, indent=1),
        "columns.json": json.dumps({name: [row[name] for row in rows] for name in rows[0]}),
        "pandas.json": json.dumps({name: {str(i): row[name] for i, row in enumerate(rows)} for name in rows[0]}),
        "a.csv": table.getvalue(),
    }
    for name, delimiter in (("semicolon.csv", ";"), ("tab.csv", "\t"), ("a.tsv", "\t"), ("bar.csv", "|")):
        table = io.StringIO()
        writer = csv.DictWriter(table, list(ROWS[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        files[name] = table.getvalue()
    files["sep.csv"] = "sep=;\n" + files["semicolon.csv"]
    for name, content in files.items():
        write(tmp_path, name, content)
        for suffix, packing in PACKINGS.items():
            write(tmp_path, name + suffix, packing(content.encode()))
        for encoding in ("utf-8-sig", "utf-16", "utf-32"):
            write(tmp_path, f"{encoding}_{name}", content.encode(encoding))
        write(tmp_path, f"big_{name}", "\ufeff".encode("utf-16-be") + content.encode("utf-16-be"))
        if name.endswith("json"):  # JSON has no bare line end in its texts
            write(tmp_path, f"cr_{name}", content.replace("\n", "\r"))
    found = {path.name: [row for _, row in read(path)] for path in tmp_path.iterdir()}
    assert len(found) == 16 * 9 + 7 + 1
    assert all(value == rows for value in found.values()), found


def test_numbers_are_lines_or_elements(tmp_path):
    jsonl = write(tmp_path, "a.jsonl", '{"a": 1}\n\n  \n{"a": 2}\n')
    # the first row's text has a line break, so the second row starts on line 4
    table = write(tmp_path, "a.csv", 'a,b\n"x\ny",1\nz,2\n')
    array = write(tmp_path, "a.json", '[{"a": 1},\n{"a": 2}]')
    assert [number for number, _ in read(jsonl)] == [1, 4]
    assert [number for number, _ in read(table)] == [2, 4]
    assert [number for number, _ in read(array)] == [1, 2]
    for path, place in ((jsonl, ":4"), (array, ", row 4")):
        source = from_path(path)
        assert list(source.rows) and source.where(4) == f"{path}{place}"


@pytest.mark.parametrize(
    ("line", "reason", "words"),
    [
        ('{"a": ', "malformed", "not valid JSON"),
        ('{"a": 1} {"a": 2}', "malformed", "column 10"),
        ('{"a": 1, "a": 2}', "duplicate_key", "'a' appears twice"),
        ("[1, 2]", "not_an_object", "found list"),
        ("null", "not_an_object", "found NoneType"),
        (b'{"a": "\xe9"}', "not_utf8", "not UTF-8"),
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
    with pytest.raises(UserError, match="no such file;"):
        read(tmp_path / "none.jsonl")
    write(tmp_path, "pairs.jsonl", "{}")
    with pytest.raises(UserError, match=r"no such file \(did you mean .*pairs.jsonl"):
        read(tmp_path / "paris.jsonl")
    with pytest.raises(UserError, match="there is no folder"):
        read(tmp_path / "none/pairs.jsonl")


def test_csv_row_of_another_width_is_a_bad_row(tmp_path):
    rows = read(write(tmp_path, "a.csv", "a,b\n1\n1,2,3\n\n1,2\n"))
    assert [row.reason if isinstance(row, BadRow) else row for _, row in rows] == [
        "malformed",
        "malformed",
        {"a": "1", "b": "2"},
    ]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.xz", "a.jsonl.zst", "a.jsonl.bz2", "a.parquet"])
def test_truncated_anywhere_is_refused(tmp_path, name):
    rows = [{"a": f"text {i} 🙂"} for i in range(200)]
    path = tmp_path / name
    if packing := PACKINGS.get(path.suffix):
        path.write_bytes(packing(as_lines(rows).encode()))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    content = path.read_bytes()
    for size in range(1, len(content), len(content) // 20):
        path.write_bytes(content[:size])
        with pytest.raises(UserError, match="gzip|xz|zstd|bzip2|parquet"):
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


def test_carriage_returns_alone_end_lines(tmp_path):
    for name in ("a.jsonl", "a.csv"):
        content = '{"a": 1, "b": 2}\r{"a": 3, "b": 4}\r' if name == "a.jsonl" else "a,b\r1,2\r3,4\r"
        rows = [{key: int(value) for key, value in row.items()} for _, row in read(write(tmp_path, name, content))]
        assert rows == [{"a": 1, "b": 2}, {"a": 3, "b": 4}]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", gzip.compress(b"{}", mtime=0), "compressed by gzip; let its name end in .gz"),
        ("a.jsonl", b"PK\x03\x04", "a zip archive or a spreadsheet"),
        ("a.csv", b"PAR1", "a parquet file"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("a.jsonl", b"<!DOCTYPE html>", "a web page"),
        ("a.jsonl", '{"a": 1}\n'.encode("utf-16-le"), "UTF-16 without its byte order mark"),
        ("a.jsonl", b"\xff\xfea", "begins as UTF-16-LE and is not"),
        ("a.json", '{\n "a": 1\n "b": 2\n}', "a.json:3: not valid JSON"),
        ("a.jsonl", '{\n "a": 1\n "b": 2\n}', "a.jsonl:3: not valid JSON"),
        ("a.json", '{"train": [{"a": 1}], "test": [{"a": 2}]}', r"several lists of rows \('train', 'test'\)"),
    ],
)
def test_a_file_that_is_something_else_is_refused_by_its_true_kind(tmp_path, name, content, words):
    with pytest.raises(UserError, match=words):
        read(write(tmp_path, name, content))


def test_a_folder_is_read_in_the_order_of_names_and_errors_name_the_file(tmp_path, capsys):
    write(tmp_path, "b.jsonl", '{"prompt": 3}\n\n{"prompt": 4}\n')
    write(tmp_path, "a.jsonl.gz", gzip.compress(b'{"prompt": 1}\n{"prompt": 2, "more": 0}\n'))
    write(tmp_path, "c.jsonl", '[{"prompt": 5}]')
    write(tmp_path, "README.md", "text")
    write(tmp_path, ".hidden.jsonl", "{")
    source = from_path(tmp_path)
    rows = list(source.rows)
    assert [row["prompt"] for _, row in rows] == [1, 2, 3, 4, 5]
    assert [number for number, _ in rows] == [1, 2, 3, 5, 6]  # the third line of b.jsonl after the second of a
    places = [source.where(number).removeprefix(f"{tmp_path}/") for number, _ in rows]
    assert places == ["a.jsonl.gz:1", "a.jsonl.gz:2", "b.jsonl:1", "b.jsonl:3", "c.jsonl, row 1"]
    assert source.origin["files"] == 3 and "README.md" in capsys.readouterr().out
    assert [row["prompt"] for _, row in from_path(tmp_path, "b*").rows] == [3, 4]
    assert [row["prompt"] for _, row in from_path(tmp_path, "[ab].*").rows] == [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"alone \(of fetch_pairs.path, the pattern goes into fetch_pairs.files"):
        read(tmp_path / "[ab].*")


def test_files_to_hold_out_come_last_and_are_known(tmp_path):
    for name, prompts in (("a-train", (1, 2)), ("b-test", (3, 4)), ("c-train", (5,))):
        write(tmp_path, f"{name}.jsonl", as_lines([{"prompt": i} for i in prompts]))
    source = from_path(tmp_path, "*", "*test*")
    rows = list(source.rows)
    assert [row["prompt"] for _, row in rows] == [1, 2, 5, 3, 4]
    assert [row["prompt"] for number, row in rows if number > source.heldout_from] == [3, 4]
    assert source.where(rows[-1][0]) == f"{tmp_path}/b-test.jsonl:2" and source.origin["files"] == 3
    with pytest.raises(UserError, match="no file '\\*valid\\*' in a format"):
        from_path(tmp_path, "*", "*valid*")
    with pytest.raises(UserError, match="a-train.jsonl: is one file, and fetch_pairs.heldout_files"):
        from_path(tmp_path / "a-train.jsonl", "*", "*test*")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"a.txt": ""}, "no file '\\*' in a format read here"),
        ({"a.jsonl": "{}", "a.csv": "a"}, "holds a.csv and a.jsonl; let fetch_pairs.files"),
        ({"train-0.jsonl": "{}", "test-0.jsonl": "{}"}, "several splits .test, train.; .* such as '\\*train\\*'"),
        (
            {"README.md": "", "data/a.parquet": "", "data/.x/b": ""},
            "found: README.md; such files are in .*/data: give",
        ),
    ],
)
def test_folders_that_are_no_shards_are_refused(tmp_path, files, words):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path, name, content)
    with pytest.raises(UserError, match=words):
        list(from_path(tmp_path, "*").rows)
    with pytest.raises(UserError) as caught:  # of a source that has no such parameter
        read(tmp_path)
    assert "fetch_pairs.files" not in str(caught.value)


def test_renamed_columns(tmp_path):
    source = from_path(write(tmp_path, "a.jsonl", '{"q": 1, "prompt": 2, "x": 3}\n')).renamed(
        {"prompt": "q"}, "columns"
    )
    assert list(source.rows) == [(1, {"prompt": 1, "x": 3})]
    with pytest.raises(UserError, match="columns names the column 'p', which is not there .found: 'q', 'prompt'"):
        list(from_path(tmp_path / "a.jsonl").renamed({"prompt": "p"}, "columns").rows)


@pytest.mark.parametrize(
    ("columns", "first", "second", "words"),
    [
        ({}, {"prompt": 1}, {"question": 1}, "b.jsonl: has no column 'prompt', which a.jsonl has"),
        ({"prompt": "q"}, {"q": 1}, {"question": 1}, "b.jsonl: .*'q', which is not there .*though a.jsonl has it"),
        ({"system": "sys"}, {"sys": 1}, {"sys_prompt": 1}, "b.jsonl: .*'sys', which is not there"),
    ],
)
def test_files_whose_columns_differ_are_refused_by_name(tmp_path, columns, first, second, words):
    for name, own in (("a", first), ("b", second)):
        write(tmp_path, f"{name}.jsonl", as_lines([own | {"chosen": 1, "rejected": 2}] * 3))
    with pytest.raises(UserError, match=words):
        list(from_path(tmp_path).renamed(columns, "columns").rows)


def test_columns_are_compared_under_our_names(tmp_path):
    write(tmp_path, "a.jsonl", as_lines([{"prompt": "old", "q": 1}]))
    write(tmp_path, "b.jsonl", as_lines([{"q": 2}]))
    rows = from_path(tmp_path).renamed({"prompt": "q"}, "columns").rows
    assert [row for _, row in rows] == [{"prompt": 1}, {"prompt": 2}]


def test_an_optional_column_of_some_files_or_rows(tmp_path, capsys):
    (tmp_path / "some").mkdir()
    write(tmp_path / "some", "a.jsonl", as_lines([{"prompt": 1, "system": 2}]))
    write(tmp_path / "some", "b.jsonl", as_lines([{"prompt": 1}]))
    assert len(list(from_path(tmp_path / "some").renamed({}, "columns").rows)) == 2
    assert "1 of 2 files of" in (printed := capsys.readouterr().out) and "no column 'system' (b.jsonl)" in printed
    for place in (1, 99):  # of a hundred rows, this one alone has it
        rows = [{"prompt": i} | ({"sys": "s"} if i == place else {}) for i in range(100)]
        read = list(
            from_path(write(tmp_path, "c.jsonl", as_lines(rows))).renamed({"system": "sys"}, "columns").rows
        )
        assert [row.get("system") for _, row in read] == [None] * place + ["s"] + [None] * (99 - place)
    assert capsys.readouterr().out == ""
