"""Numbered rows from a jsonl, json, csv or parquet file, or from a data set on the Hub."""

import csv
import gzip
import hashlib
import io
import json
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib.data.hub_source import card_license, hub_errors, resolve_revision
from stages.lib.run.artefacts import sha256_of_file
from stages.lib.run.errors import UserError

FORMATS = "jsonl, json, csv (each may be .gz) or parquet"


@dataclass(frozen=True)
class BadRow:
    """Stands where a row should be, or answers a check: a countable reason and a sentence for people."""

    reason: str
    message: str


@dataclass(frozen=True)
class Source:
    """Rows with their numbers, and where they come from."""

    name: str  # in errors: the path or the hub id
    separator: str  # between name and number: file.jsonl:17, but file.parquet, row 17
    rows: Iterator[tuple[int, dict[str, Any] | BadRow]]
    origin: dict[str, Any]  # source, revision, license, sha256: for metrics.json

    def where(self, number: int) -> str:
        return f"{self.name}{self.separator}{number}"


def open_source(hub_id: str | None, revision: str, path: Path) -> Source:
    """The Hub's data set where `hub_id` is given, else the file.

    Row numbers count from 1: lines in jsonl and csv (where a row starts), elements or rows elsewhere.

    Raises:
        UserError: missing, of no known format, or unreadable; while iterating, where the damage is in the
            file rather than in one row (a truncated archive, an open quote).
    """
    return from_hub(hub_id, revision) if hub_id is not None else from_file(path)


def from_hub(hub_id: str, revision: str) -> Source:
    """The train split, or the only one, of a data set at one commit."""
    import datasets  # two seconds that a local file does not need

    commit = resolve_revision(hub_id, revision, "dataset")
    try:
        with hub_errors(hub_id, commit):
            splits = datasets.load_dataset(hub_id, revision=commit)
    except datasets.exceptions.DatasetsError as error:
        raise UserError(f"{hub_id} at revision {commit}: cannot be read: {error}") from error
    if "train" not in splits and len(splits) > 1:
        raise UserError(f"{hub_id}: has no split 'train', only {', '.join(splits)}; save one of them as a file")
    rows = splits["train"] if "train" in splits else next(iter(splits.values()))
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    origin = {"source": hub_id, "revision": commit, "license": card_license(hub_id, commit, "dataset")}
    return Source(hub_id, ", row ", enumerate(rows, 1), origin | {"sha256": digest.hexdigest()})


def from_file(path: Path) -> Source:
    """A file, read by the format its name ends in."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; the path is relative to the root of the project")
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packed = suffixes[-1:] == [".gz"]
    suffix = (suffixes[:-1] if packed else suffixes)[-1:]
    readers = {".jsonl": json_lines, ".ndjson": json_lines, ".json": json_file, ".csv": csv_rows}
    if suffix == [".parquet"] and not packed:
        rows = parquet_rows(path)
    elif suffix and suffix[0] in readers:
        rows = _open_rows(readers[suffix[0]], path, packed)
    else:
        raise UserError(f"{path}: the name ends in none of the formats read here: {FORMATS}")
    origin = {"source": path.name, "revision": None, "license": None, "sha256": sha256_of_file(path)}
    by_line = suffix[0] != ".parquet" and not (suffix == [".json"] and _is_json_array(path, packed))
    return Source(str(path), ":" if by_line else ", row ", rows, origin)


def json_lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """One JSON object a line; blank lines are no rows."""
    for number, line in enumerate(file, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")  # a byte order mark
        if line.strip():
            yield number, _json_object(line)


def json_file(file: IO[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """An array of objects, or lines of them."""
    content = file.read().removeprefix(b"\xef\xbb\xbf")
    if content.lstrip()[:1] != b"[":
        yield from json_lines(io.BytesIO(content), path)
        return
    try:
        items = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicate_keys)
    except json.JSONDecodeError as error:
        message = f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno}); mend the file"
        raise UserError(message) from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON that can be read: {error}") from None
    yield from enumerate((item if isinstance(item, dict | BadRow) else _not_an_object(item) for item in items), 1)


def csv_rows(file: IO[bytes], path: Path) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    """Comma-separated with a header line; quotes are doubled inside quoted fields."""
    csv.field_size_limit(sys.maxsize)  # a completion may be longer than the default of 128 KiB
    reader = csv.reader(_decoded_lines(file, path), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}:1: a column name appears twice: {', '.join(header)}")
        start = reader.line_num + 1
        for fields in reader:
            if len(fields) == len(header):
                yield start, dict(zip(header, fields, strict=True))
            elif fields:  # a blank line is no row
                message = f"has {len(fields)} fields, the header has {len(header)}"
                yield start, BadRow("malformed", message)
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV ({error}); mend the quotes") from None


def parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        file = pq.ParquetFile(path)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise UserError(f"{path}: a column name appears twice: {', '.join(names)}")
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            batch.validate(full=True)
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a parquet file that can be read, maybe cut off: {error}") from None


def _open_rows(reader, path: Path, packed: bool) -> Iterator[tuple[int, dict[str, Any] | BadRow]]:
    with gzip.open(path) if packed else open(path, "rb") as file:
        try:
            yield from reader(file, path)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{path}: not a complete gzip file ({error}); fetch it again") from None


def _is_json_array(path: Path, packed: bool) -> bool:
    try:
        with gzip.open(path) if packed else open(path, "rb") as file:
            return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
    except (EOFError, OSError, zlib.error):
        return False  # the reader says what is wrong


def _decoded_lines(file: IO[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from None


def _json_object(line: bytes) -> dict[str, Any] | BadRow:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_without_duplicate_keys)
    except UnicodeDecodeError:
        return BadRow("not_utf8", "not UTF-8; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadRow("malformed", f"not valid JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a list 100,000 deep
        return BadRow("malformed", f"not JSON that can be read: {error}")
    return value if isinstance(value, dict | BadRow) else _not_an_object(value)


def _without_duplicate_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any] | BadRow:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    return BadRow("duplicate_key", f"the key {twice[:40]!r} appears twice")


def _not_an_object(value: Any) -> BadRow:
    return BadRow("not_an_object", f"expected an object with columns, found {type(value).__name__}")
