"""Folders as they go to the Hub: weights linked, the rest copied, replaced as a whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stages.lib.run.artefacts import NoRoomError, is_no_room
from stages.lib.run.errors import UserError

LINKED = ".safetensors"  # half a gigabyte each
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".npy", ".npz"}
ADAPTER = "adapter"  # its folder within a model's
NOT_OURS = {"README.md", ".gitattributes"}  # a trainer's card would stand where ours belongs


@contextmanager
def replaced_folder(target: Path, size: int) -> Iterator[Path]:
    """An empty folder beside `target` that takes its place if the block succeeds, and goes if it does not.

    Args:
        size: bytes that may be needed, for the message when they do not fit.

    Raises:
        NoRoomError: the disk is full; `target` is as it was.
    """
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
    except OSError as error:
        if not is_no_room(error):
            raise
        raise NoRoomError(Path(error.filename2 or error.filename or target), size) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def size_of(folder: Path) -> int:
    """Bytes of all files in it; 0 where there is no such folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def take_model(model: Path, folder: Path) -> None:
    """The model's files: weights as hard links where the disk allows, everything else as copies.

    DVC keeps its outs read-only and may have linked them to its cache. Nothing here opens a link for writing.

    Raises:
        UserError: there are no weights, or a file that may hold a pickle.
    """
    if not (model / "model.safetensors").is_file():
        raise UserError(f"{model}/model.safetensors: not found; run `dvc repro` for the stage that trains it")
    for file in sorted(file for file in model.rglob("*") if file.is_file()):
        if file.suffix in PICKLES:
            raise UserError(f"{file}: may hold a pickle, which is code; only safetensors are published")
        target = folder / file.relative_to(model)
        if file.suffix == LINKED:
            link(file, target)
        elif file.name not in NOT_OURS:
            take(file, target)


def take_adapter(model: Path, folder: Path) -> None:
    """The model's adapter at the top, and its tokenizer; neither weights nor configuration of the whole model."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        take(model / ADAPTER / name, folder / name)
    for file in sorted(model.iterdir()):
        if "token" in file.name or file.suffix == ".jinja":  # tokenizer.json, special_tokens_map.json, ...
            take(file, folder / file.name)


def take(source: Path, target: Path) -> None:
    """A copy of the content alone: that of a read-only file is writable."""
    if not source.is_file():
        raise UserError(f"{source}: not found; run `dvc repro` for the stage that writes it")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def link(source: Path, target: Path) -> None:
    """A second name for the same bytes; a copy where the file system has no such thing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)  # resolved: DVC's cache may be linked symbolically
    except OSError:
        take(source, target)
