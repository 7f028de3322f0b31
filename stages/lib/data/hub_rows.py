"""Numbered rows from a data set on the Hub: of one configuration and split, at one commit."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from stages.lib.data.hub_source import card_license, hub_errors, is_public, resolve_revision
from stages.lib.data.rows import Part, Source
from stages.lib.run.errors import UserError


def from_hub(
    hub_id: str,
    revision: str,
    config: str | None = None,
    split: str | None = None,
    heldout_split: str | None = None,
    prefix: str = "",
) -> Source:
    """The rows of a split, then those of `heldout_split`, whose numbers go on (`Source.parts` says from where).

    Args:
        config: None for the only one.
        split: None for 'train', or the only one.
        prefix: of the parameters to name in errors ('' or 'unseen_').

    Raises:
        UserError: what the Hub or the data set does not have, in one line with the true reason.
    """
    import datasets  # two seconds that a local file does not need
    from datasets.exceptions import DatasetsError

    commit = resolve_revision(hub_id, revision, "dataset")
    where = f"{hub_id} at revision {commit}"
    try:
        with hub_errors(hub_id, commit):
            configs = datasets.get_dataset_config_names(hub_id, revision=commit)
            _check_config(where, config, configs, prefix)
            splits = datasets.load_dataset(hub_id, config, revision=commit)
    except (DatasetsError, RuntimeError) as error:
        raise UserError(f"{where}: {_reason(error)}") from error
    there = list(map(str, splits))
    first = _pick(where, split, there, f"{prefix}split")
    names = [first] if heldout_split is None else [first, _pick(where, heldout_split, there, "heldout_split")]
    if len(set(names)) < len(names):
        raise UserError(f"{where}: fetch_pairs.split and heldout_split are both {first!r}; choose two")
    digest = hashlib.sha256()
    for name in names:
        for row in splits[name]:
            digest.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    parts, offset = [], 0
    for name in names:
        place = hub_id if len(names) == 1 else f"{hub_id}, split {name}"
        parts.append(Part(offset, place, ", row ", heldout=name != first))
        offset += len(splits[name])
    origin = {"source": hub_id, "revision": commit, "license": card_license(hub_id, commit, "dataset")}
    origin["public"] = is_public(hub_id, commit)
    if config is not None:
        origin["config"] = config
    if split is not None or heldout_split is not None:
        origin["split"] = ", ".join(names)
    rows = _rows(splits[name] for name in names)
    return Source(hub_id, ", row ", rows, origin | {"sha256": digest.hexdigest()}, parts)


def _rows(tables: Iterator[Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for table in tables:
        for row in table:
            number += 1
            yield number, row


def _check_config(where: str, config: str | None, configs: list[str], prefix: str) -> None:
    if config is None and len(configs) > 1:
        raise UserError(
            f"{where}: has several configurations ({', '.join(configs)}); "
            f"set fetch_pairs.{prefix}config to one of them, such as {configs[0]}"
        )
    if config is not None and config not in configs:
        raise UserError(
            f"{where}: has no configuration {config!r}, only {', '.join(configs)}; set fetch_pairs.{prefix}config"
        )


def _pick(where: str, split: str | None, splits: list[str], key: str) -> str:
    if split is None:
        split = "train" if "train" in splits or len(splits) > 1 else splits[0]
    if split not in splits:
        raise UserError(f"{where}: has no split {split!r}, only {', '.join(splits)}; set fetch_pairs.{key} to one")
    return split


def _reason(error: BaseException) -> str:
    """What went wrong, in one line: the innermost reason, not 'an error occurred while generating the dataset'."""
    if "scripts are no longer supported" in str(error):
        return (
            "is made by a loading script, and code from the Hub is not run; take its parquet branch, if it has one "
            "(fetch_pairs.revision: refs/convert/parquet), or download and save it as a file"
        )
    inner = error
    while (cause := inner.__cause__ or inner.__context__) and str(cause).strip():
        inner = cause
    reason = " ".join(str(inner).split()) or type(inner).__name__
    return f"cannot be read: {reason[:600]}; choose another split or configuration, or save it as one file"
