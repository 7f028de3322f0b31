"""Numbered rows from files (jsonl, json, csv, tsv, parquet; one, or a folder of shards), or from the Hub."""

import bz2
import codecs
import csv
import difflib
import fnmatch
import gzip
import hashlib
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass, field
from itertools import chain, groupby, islice
from pathlib import Path
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib.data.messages import BadRow
from stages.lib.run.artefacts import sha256_of_file
from stages.lib.run.errors import UserError

FORMATS = "jsonl, json, csv, tsv (each may be .gz, .zst, .xz or .bz2) or parquet"
BOMS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
WRONG_KINDS = {  # by a text file's first bytes: what it is, and what to do
    b"\x1f\x8b": "compressed by gzip; let its name end in .gz",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; let its name end in .zst",
    b"\xfd7zXZ\x00": "compressed by xz; let its name end in .xz",
    b"PAR1": "a parquet file; let its name end in .parquet",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as CSV",
    b"version https://git-lfs": "a pointer of Git LFS, not the data; run git lfs pull",
    b"<!DOCTYPE": "a web page, not data; the download went wrong",
    b"<html": "a web page, not data; the download went wrong",
}
DELIMITERS = ",;\t|"
SPLIT_NAMES = re.compile(r"(?:^|[-_.])(train|test|validation|valid|dev|eval|heldout)(?=[-_.])", re.IGNORECASE)
TEXT_COLUMNS = {"prompt", "chosen", "rejected", "response"}
OPTIONAL_COLUMNS = ("system", "tools")
NUM_FIRST_ROWS = 100  # that are read before any is judged: a fault of nearly all is the file's, not a row's
NEARLY_ALL = 0.9

Row = dict[str, Any]
Numbered = Iterator[tuple[int, Row | BadRow]]
Reader = Callable[[IO[bytes], Path], tuple[str, Numbered]]


class Part(NamedTuple):
    """A file of a source, in which rows begin to count anew."""

    offset: int  # what the numbers of its rows are ahead of its own
    name: str
    separator: str  # between name and number: file.jsonl:17, but file.parquet, row 17
    heldout: bool = False  # of those to hold out whole


@dataclass(frozen=True)
class Source:
    """Rows with their numbers, and where they come from."""

    name: str  # in errors: the path or the hub id
    separator: str  # between name and number where `parts` knows nothing else
    rows: Numbered
    origin: dict[str, Any]  # source, revision, license, sha256, of the Hub public: for metrics.json
    parts: list[Part] = field(default_factory=list)  # the files begun so far
    columns_key: str | None = None  # the parameter that maps its columns
    columns: dict[str, str] = field(default_factory=dict)  # and its value: our names to the data's

    def where(self, number: int) -> str:
        if part := self.part_of(number):
            return f"{part.name}{part.separator}{number - part.offset}"
        return f"{self.name}{self.separator}{number}"

    def part_of(self, number: int) -> Part | None:
        return next((part for part in reversed(self.parts) if number > part.offset), None)

    @property
    def heldout_from(self) -> int:
        """The number above which rows are those to hold out whole. Known once all are read."""
        return min(part.offset for part in self.parts if part.heldout)

    def renamed(self, columns: dict[str, str], columns_key: str | None) -> "Source":
        """The same rows with columns under our names: `columns` maps ours to the data's."""
        rows = _renamed(self, columns, f"fetch_pairs.{columns_key}")
        return Source(self.name, self.separator, rows, self.origin, self.parts, columns_key, columns)


def written_places(source: Source) -> dict[str, Any]:
    """What `read_places` needs, as JSON. Known once all rows are read."""
    return {"name": source.name, "separator": source.separator, "parts": [list(part) for part in source.parts]}


def read_places(written: dict[str, Any]) -> Callable[[int], str]:
    """The place of a row's number, file and line, of a source whose rows were read by an earlier stage."""
    parts = [Part(*part) for part in written["parts"]]
    return Source(written["name"], written["separator"], iter(()), {}, parts).where


def from_path(path: Path, files: str | None = None, heldout_files: str | None = None) -> Source:
    """A file, or all files of a folder whose names match `files`, in the order of their names.

    Row numbers count from 1: lines in jsonl and csv (where a row starts), elements or rows elsewhere; in further
    files they go on where the one before ended, and `where` says file and place.

    Args:
        files: a pattern; None where no parameter has one: all.
        heldout_files: a pattern of those to hold out whole, which come last; None: none.

    Raises:
        UserError: missing, of no known format, or unreadable; while iterating, where the damage is in the
            file rather than in one row (a truncated archive, an open quote).
    """
    if path.is_dir():
        return _from_folder(path, files, heldout_files)
    if problem := path_problem(path):
        raise UserError(f"{path}: {problem}")
    if heldout_files is not None:
        raise UserError(f"{path}: is one file, and fetch_pairs.heldout_files needs a folder of files")
    _format_of(path)
    parts: list[Part] = []
    origin = {"source": path.name, "revision": None, "license": None, "sha256": sha256_of_file(path)}
    return Source(str(path), ":", _rows_of([path], parts), origin, parts)


def path_problem(path: Path) -> str | None:
    """Why there is neither file nor folder at a path from params.yaml, with a remedy; None where there is one."""
    if path.exists():
        return None
    if set("*?[") & set(path.name) and path.parent.is_dir():
        return (
            "is a pattern, and DVC follows files and folders; give the folder alone (of fetch_pairs.path, the pattern "
            "goes into fetch_pairs.files)"
        )
    return f"no such file{_similar(path)}; the path is relative to the root of the project"


def json_rows(file: IO[bytes], path: Path) -> tuple[str, Numbered]:
    """One JSON object a line; an array of objects; such an array inside an object; an object of columns.

    Blank lines are no rows. Objects may run over several lines.

    Returns:
        What stands between the file's name and a row's number, and the numbered rows.
    """
    number, line = next(((i, line) for i, line in enumerate(file, 1) if line.strip()), (0, b""))
    if not line:
        return ":", iter(())
    first = _json_object(line)
    if isinstance(first, dict) and _rows_inside(first, path) is None:
        return ":", _json_lines(chain([(number, line)], enumerate(file, number + 1)))
    content = line + file.read()
    return _json_document(content, number, path) or (":", _json_lines(enumerate(io.BytesIO(content), number)))


def csv_rows(file: IO[bytes], path: Path) -> tuple[str, Numbered]:
    """Separated by comma, semicolon, tab or bar, with a header line; quotes are doubled inside quoted fields."""
    return ":", _csv_rows(file, path)


def parquet_rows(path: Path) -> Numbered:
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
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a parquet file that can be read, maybe cut off: {reason}") from None


READERS: dict[str, Reader] = {
    ".jsonl": json_rows,
    ".ndjson": json_rows,
    ".json": json_rows,
    ".csv": csv_rows,
    ".tsv": csv_rows,
}
PACKINGS: dict[str, tuple[str, Callable[[Path], Any]]] = {  # files of bytes, each of a class of its own
    ".gz": ("gzip", lambda path: gzip.open(path)),
    ".zst": ("zstd", lambda path: io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))),
    ".xz": ("xz", lambda path: lzma.open(path)),
    ".bz2": ("bzip2", lambda path: bz2.open(path)),
}


def _from_folder(folder: Path, pattern: str | None, heldout_pattern: str | None) -> Source:
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    heldout = _shards(folder, names, heldout_pattern) if heldout_pattern is not None else []
    names = [name for name in names if name not in heldout]
    shards = _shards(folder, names, pattern or "*")
    choose = "let fetch_pairs.files say which to read" if pattern else "keep them in a folder each, or name one"
    if len(kinds := {_kind_of(Path(name)): name for name in shards}) > 1:
        few = " and ".join(sorted(kinds.values())[:2])
        raise UserError(f"{folder}: holds {few}; {choose}{', such as *.jsonl' if pattern else ''}")
    if len(splits := sorted({found[1].lower() for name in shards if (found := SPLIT_NAMES.search(name))})) > 1:
        such = f", such as '*{splits[-1]}*', and heldout_files which to hold out" if pattern else ""
        raise UserError(f"{folder}: its files are of several splits ({', '.join(splits)}); {choose}{such}")
    others = [name for name in names if name not in shards and fnmatch.fnmatchcase(name, pattern or "*")]
    if others:
        print(f"ignored files of {folder}: {', '.join(others[:10])}")
    digest = hashlib.sha256()
    for name in shards + heldout:
        digest.update(f"{name} {sha256_of_file(folder / name)}\n".encode())
    origin: dict[str, Any] = {"source": f"{folder.name}/{pattern or '*'}", "revision": None, "license": None}
    origin |= {"sha256": digest.hexdigest(), "files": len(shards + heldout)}
    parts: list[Part] = []
    rows = _rows_of([folder / name for name in shards + heldout], parts, set(heldout))
    return Source(str(folder), ", row ", rows, origin, parts)


def _shards(folder: Path, names: list[str], pattern: str) -> list[str]:
    """The names that match and have a format read here.

    Raises:
        UserError: there are none.
    """
    shards = [name for name in names if fnmatch.fnmatchcase(name, pattern) and _kind_of(Path(name))]
    if not shards:
        found = ", ".join(names[:10]) or "nothing"
        inner = [path for path in sorted(folder.rglob("*")) if path.is_file() and _kind_of(path)]
        below = list(dict.fromkeys(str(path.parent) for path in inner if path.parent != folder))
        remedy = f"; such files are in {', '.join(below[:5])}: give that folder as the path" if below else ""
        raise UserError(f"{folder}: no file {pattern!r} in a format read here ({FORMATS}); found: {found}{remedy}")
    return shards


def _rows_of(paths: list[Path], parts: list[Part], heldout: Set[str] = frozenset()) -> Numbered:
    """The rows of all files; each is noted in `parts` when it is begun.

    Args:
        heldout: names of the files to hold out whole.
    """
    offset = 0
    for path in paths:
        number = offset
        for own, row in _file_rows(path, parts, offset, path.name in heldout):
            number = offset + own
            yield number, row
        offset = number


def _file_rows(path: Path, parts: list[Part], offset: int, heldout: bool) -> Numbered:
    suffix, packing = _format_of(path)
    if suffix == ".parquet":
        parts.append(Part(offset, str(path), ", row ", heldout))
        yield from parquet_rows(path)
        return
    kind, opener = PACKINGS[packing] if packing else ("", lambda path: open(path, "rb"))
    try:
        with opener(path) as file:
            separator, rows = READERS[suffix](_as_utf8(file, path), path)
            parts.append(Part(offset, str(path), separator, heldout))
            yield from rows
    except (EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        if not packing:
            raise
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a complete {kind} file ({reason}); fetch it again") from None


def _format_of(path: Path) -> tuple[str, str | None]:
    """The format's suffix and the compression's, by the file's name."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    packing = suffixes.pop() if suffixes and suffixes[-1] in PACKINGS else None
    suffix = suffixes[-1] if suffixes else ""
    if suffix in READERS or (suffix == ".parquet" and packing is None):
        return suffix, packing
    raise UserError(f"{path}: the name ends in none of the formats read here: {FORMATS}")


def _kind_of(path: Path) -> str | None:
    try:
        suffix, _ = _format_of(path)
    except UserError:
        return None
    return "jsonl" if suffix == ".ndjson" else suffix[1:]


def _similar(path: Path) -> str:
    if not path.parent.is_dir():
        return f" (there is no folder {path.parent})"
    names = [other.name for other in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f" (did you mean {path.with_name(close[0])}?)" if close else ""


def _as_utf8(file: IO[bytes], path: Path) -> IO[bytes]:
    """The file's content in UTF-8, by its byte order mark, and with line ends that have a line feed.

    Raises:
        UserError: its first bytes say that it is no text, or it is not in the encoding they announce.
    """
    head = file.peek(8192)  # type: ignore[attr-defined]  # every file opened here can
    for mark, what in WRONG_KINDS.items():
        if head.startswith(mark):
            raise UserError(f"{path}: is {what}")
    if head.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
        head = head[len(codecs.BOM_UTF8) :]
    for mark, encoding in BOMS.items():
        if head.startswith(mark):
            try:
                text = file.read()[len(mark) :].decode(encoding)
                return io.BytesIO(_with_line_feeds(text.encode("utf-8")))
            except UnicodeError as error:
                raise UserError(
                    f"{path}: begins as {encoding.upper()} and is not ({error}); save as UTF-8"
                ) from None
    if len(head) > 8 and not any(head[1:9:2]) and all(head[:8:2]):
        raise UserError(f"{path}: seems to be UTF-16 without its byte order mark; save it as UTF-8")
    if b"\r" in head and b"\n" not in head:
        return io.BytesIO(_with_line_feeds(file.read()))
    return file


def _with_line_feeds(content: bytes) -> bytes:
    """Where every line ends in a bare carriage return, a line feed in its place."""
    return content if b"\n" in content else content.replace(b"\r", b"\n")


def _json_lines(lines: Iterable[tuple[int, bytes]]) -> Numbered:
    return ((number, _json_object(line)) for number, line in lines if line.strip())


def _json_document(content: bytes, start: int, path: Path) -> tuple[str, Numbered] | None:
    """The rows of a file that is no object a line but one array, one object, or objects over several lines each.

    Args:
        start: the number of the content's first line.

    Returns:
        As `json_rows`; None where it is none of them, but lines of which the first is bad.

    Raises:
        UserError: it is meant to be such a document, and broken.
    """
    meant = content.lstrip()[:1] == b"[" and _format_of(path)[0] == ".json"
    meant = meant or content.split(b"\n", 1)[0].strip() in (b"[", b"{")  # a line that only opens a document
    try:
        text = content.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_without_duplicate_keys)
    except UnicodeDecodeError as error:
        if not meant:
            return None
        line = content.count(b"\n", 0, error.start) + start
        raise UserError(f"{path}:{line}: not UTF-8; save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        if objects := _objects_in(text, start):
            return ":", iter(objects)
        if not meant:
            return None
        where = f"{path}:{error.lineno + start - 1}"
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno}); mend the file") from None
    except (ValueError, RecursionError) as error:
        if not meant:
            return None
        raise UserError(f"{path}: not JSON that can be read: {error}") from None
    if isinstance(value, dict):
        rows = _rows_inside(value, path)
        if rows is None:
            return ":", iter([(start, value)])
        value = rows
    if isinstance(value, list):
        rows = (item if isinstance(item, dict | BadRow) else _not_an_object(item) for item in value)
        return ", row ", enumerate(rows, 1)
    return ":", iter([(start, value if isinstance(value, BadRow) else _not_an_object(value))])


def _objects_in(text: str, start: int) -> list[tuple[int, Row | BadRow]] | None:
    """Objects of which each begins on a line of its own, with the numbers of these lines; None if it is else."""
    decoder = json.JSONDecoder(object_pairs_hook=_without_duplicate_keys)
    found: list[tuple[int, Row | BadRow]] = []
    place, line = 0, start
    while rest := re.compile(r"\s*").match(text, place):
        line += text.count("\n", place, rest.end())
        if rest.end() == len(text):
            return found
        if found and "\n" not in rest[0]:
            return None
        try:
            value, place = decoder.raw_decode(text, rest.end())
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict | BadRow):
            return None
        found.append((line, value))
        line += text.count("\n", rest.end(), place)
    return None


def _rows_inside(value: Row, path: Path) -> list[Any] | None:
    """The rows of an object that holds a list of them, or is a table by column; None of an object that is a row.

    Raises:
        UserError: it holds several such lists.
    """
    lists = {name: inner for name, inner in value.items() if _is_table(inner)}
    if lists and not TEXT_COLUMNS & value.keys():
        if len(lists) > 1:
            names = ", ".join(repr(name)[:40] for name in lists)
            raise UserError(
                f"{path}: holds several lists of rows ({names}); save one of them as a file of its own"
            )
        return next(iter(lists.values()))
    columns = list(value.values())
    if any(columns) and all(isinstance(column, dict) and all(map(str.isdigit, column)) for column in columns):
        columns = [list(column.values()) for column in columns]  # as pandas writes a table
    elif (
        not any(columns) or not all(isinstance(column, list) for column in columns) or any(map(_is_talk, columns))
    ):
        return None
    if len({len(column) for column in columns}) > 1:
        return None
    return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]


def _is_table(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, dict) for row in value)
        and not _is_talk(value)
    )


def _is_talk(value: list[Any]) -> bool:
    """Whether a list is a conversation, not a column of a table."""
    return bool(value) and all(isinstance(item, dict) and ("role" in item or "from" in item) for item in value)


def _csv_rows(file: IO[bytes], path: Path) -> Numbered:
    csv.field_size_limit(sys.maxsize)  # a completion may be longer than the default of 128 KiB
    lines = _decoded_lines(file, path)
    head = next(lines, "")
    skipped = 0
    if named := re.fullmatch(r"sep=(.)\s*", head):  # a spreadsheet's own first line
        delimiter, head, skipped = named[1], next(lines, ""), 1
    else:
        delimiter = _delimiter_of(head, path)
    reader = csv.reader(chain([head], lines), strict=True, delimiter=delimiter)
    try:
        header = next(reader, [])
        named = [name for name in header if name]  # a spreadsheet's column of row numbers has no name
        if len(set(named)) < len(named):
            raise UserError(f"{path}:1: a column name appears twice: {', '.join(header)}")
        start = reader.line_num + 1 + skipped
        for fields in reader:
            if len(fields) == len(header):
                yield start, {name: text for name, text in zip(header, fields, strict=True) if name}
            elif fields:  # a blank line is no row
                message = f"has {len(fields)} fields, the header has {len(header)}"
                yield start, BadRow("malformed", message)
            start = reader.line_num + 1 + skipped
    except csv.Error as error:
        line = reader.line_num + skipped
        raise UserError(f"{path}:{line}: not valid CSV ({error}); mend the quotes") from None


def _delimiter_of(header: str, path: Path) -> str:
    """What separates most columns of the header; a comma if nothing does."""
    counts = {}
    for delimiter in DELIMITERS:
        try:
            counts[delimiter] = len(next(csv.reader([header], delimiter=delimiter), []))
        except csv.Error:
            counts[delimiter] = 1
    best = max(counts, key=lambda delimiter: counts[delimiter])
    if counts[best] == 1:
        return "\t" if _format_of(path)[0] == ".tsv" else ","
    return best


def _decoded_lines(file: IO[bytes], path: Path) -> Iterator[str]:
    for number, line in enumerate(file, 1):
        try:
            yield line.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{path}:{number}: not UTF-8; save the file as UTF-8") from None


def _json_object(line: bytes) -> Row | BadRow:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_without_duplicate_keys)
    except UnicodeDecodeError:
        return BadRow("not_utf8", "not UTF-8; save the file as UTF-8")
    except json.JSONDecodeError as error:
        return BadRow("malformed", f"not valid JSON ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, a list 100,000 deep
        return BadRow("malformed", f"not JSON that can be read: {error}")
    return value if isinstance(value, dict | BadRow) else _not_an_object(value)


def _without_duplicate_keys(pairs: list[tuple[str, Any]]) -> Row | BadRow:
    values = dict(pairs)
    if len(values) == len(pairs):
        return values
    names = [name for name, _ in pairs]
    twice = next(name for name in names if names.count(name) > 1)
    return BadRow("duplicate_key", f"the key {twice[:40]!r} appears twice")


def _not_an_object(value: Any) -> BadRow:
    return BadRow("not_an_object", f"expected an object with columns, found {type(value).__name__}")


def _renamed(source: Source, columns: dict[str, str], key: str) -> Numbered:
    """A source's rows with the columns named in `columns` (ours: theirs) under our names.

    Warns of an optional column that only some of the files have.

    Raises:
        UserError: the first rows of a file lack a column that `columns` names, or one of texts that the file before
            has under our names.
    """
    files: dict[str, set[str]] = {}  # our columns of each file
    for part, rows in groupby(source.rows, lambda numbered: source.part_of(numbered[0])):
        begin = list(islice(rows, NUM_FIRST_ROWS))
        names = list(dict.fromkeys(name for _, row in begin if isinstance(row, dict) for name in row))
        if names:
            file = part.name if part else source.name
            found = f"(found: {', '.join(repr(name)[:40] for name in names[:10])})"
            if missing := [theirs for theirs in columns.values() if theirs not in names]:
                there = "not there" if len(begin) < NUM_FIRST_ROWS else f"not in the first {NUM_FIRST_ROWS} rows"
                same = [f", though {_base(other)} has it; the files' columns must be the same" for other in files]
                raise UserError(
                    f"{file}: {key} names the column {missing[0]!r}, which is {there} {found}{''.join(same[:1])}"
                )
            ours = {name for name in names if name not in columns.values()} | columns.keys()
            for other, its in files.items():
                if missing := sorted((its - ours) & TEXT_COLUMNS):
                    raise UserError(
                        f"{file}: has no column {missing[0]!r}, which {_base(other)} has {found}; "
                        "the files' columns must be the same"
                    )
            files[file] = ours
        for number, row in chain(begin, rows):
            yield number, _under_our_names(row, columns) if isinstance(row, dict) else row
    for name in OPTIONAL_COLUMNS:
        without = [_base(file) for file, ours in files.items() if name not in ours]
        if without and len(without) < len(files):
            print(
                f"warning: {len(without)} of {len(files)} files of {source.name} have no column {name!r} "
                f"({', '.join(without[:5])}): their rows are trained on without"
            )


def _under_our_names(row: Row, columns: dict[str, str]) -> Row:
    others = {name: value for name, value in row.items() if name not in (*columns, *columns.values())}
    return others | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def _base(file: str) -> str:
    return file.rpartition("/")[2]
