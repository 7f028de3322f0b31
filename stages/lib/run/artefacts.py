"""How stages write files: whole or not at all, and the same bytes for the same content."""

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib.run.errors import UserError


class NoRoomError(UserError):
    """The disk is full, or a quota is used up."""

    def __init__(self, path: Path, num_bytes: int):
        free = shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free
        super().__init__(
            f"{path}: no room to write it: it needs {num_bytes / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free "
            "(a quota may allow less). Make room, then run dvc repro: finished stages are not run again"
        )


def is_no_room(error: BaseException) -> bool:
    """Whether a failed write, Python's or a library's, means a full disk, a used-up quota or a file size limit."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    # safetensors 0.8 carries the system's message only; torch.save 2.13 says but that fewer bytes arrived
    return any(
        text in str(error) for text in ("(os error 28)", "(os error 122)", "(os error 27)", "unexpected pos")
    )


def require_room(path: Path, num_bytes: int) -> None:
    """Refuses a large write before it begins.

    Raises:
        NoRoomError: the file system of `path` has less free.
    """
    if shutil.disk_usage(next(folder for folder in path.absolute().parents if folder.exists())).free < num_bytes:
        raise NoRoomError(path, num_bytes)


@contextmanager
def atomic_path(path: Path, num_bytes: int | None = None) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it (fsync, rename) if the block succeeds.

    Args:
        path: what is to be written.
        num_bytes: its size if known, for the message when it does not fit.

    Raises:
        NoRoomError: the disk is full; `path` is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except Exception as error:
        if not is_no_room(error):
            raise
        raise NoRoomError(path, num_bytes or partial.stat().st_size) from error
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Indented UTF-8 JSON in insertion order; NaN and infinity raise ValueError, since JSON has neither."""
    text = json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with atomic_path(path, len(text.encode())) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def write_parquet(path: Path, columns: dict[str, Any] | pa.Table) -> None:
    """A parquet file whose bytes depend on its content alone (no pandas metadata, no timestamps)."""
    table = pa.table(columns) if isinstance(columns, dict) else columns
    with atomic_path(path, table.nbytes) as partial:
        pq.write_table(table, partial, compression="zstd")


def read_parquet(path: Path) -> dict[str, list]:
    """Columns as Python lists; token id columns as lists of lists of int."""
    return pq.read_table(path).to_pydict()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """A parquet file's rows."""
    return pq.read_table(path).to_pylist()


def write_history(path: Path, rows: list[dict[str, Any]]) -> None:
    """One CSV row per logged step, floats at full precision, columns in the first row's order.

    Raises:
        ValueError: a row has other columns than the first.
    """
    for row in rows:
        if row.keys() != rows[0].keys():
            raise ValueError(f"history columns {list(row)} differ from {list(rows[0])}")
    text = pd.DataFrame(rows).to_csv(index=False, lineterminator="\n")
    with atomic_path(path, len(text.encode())) as partial:
        partial.write_text(text, encoding="utf-8", newline="")


def round_floats(values: Any, digits: int = 6) -> Any:
    """For metrics: floats to `digits` significant digits, in nested dicts and lists too."""
    if isinstance(values, dict):
        return {key: round_floats(value, digits) for key, value in values.items()}
    if isinstance(values, list):
        return [round_floats(value, digits) for value in values]
    if isinstance(values, float) and math.isfinite(values):
        return float(f"{values:.{digits}g}")
    return values


def sha256_of_file(path: Path) -> str:
    """Read once in a process for as long as the file stays what it is: models are large and asked for often."""
    found = path.stat()
    return _sha256(path.resolve(), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@lru_cache(maxsize=1024)
def _sha256(path: Path, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
