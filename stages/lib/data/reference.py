"""Reading and writing the reference's log-probs together with what they were computed from."""

from pathlib import Path

import pyarrow as pa

from stages.lib.run.artefacts import read_json, read_parquet, sha256_of_file, write_json, write_parquet
from stages.lib.run.errors import UserError

FOLDER = Path("data/reference_logps")
NEGATIVES = "negatives"  # corrupted copies of training pairs
SPLITS = ("train", "heldout", NEGATIVES)


def fingerprint(root: Path, precision: str) -> dict[str, str]:
    """SHA-256 of the base's weights and configuration and of each split's token ids, and the precision.

    The token ids stand for tokenizer, template and truncation: any change of those changes them.
    """
    files = ["models/base/model.safetensors", "models/base/config.json"]
    files += [f"data/tokenized/pairs_{split}.parquet" for split in SPLITS]
    return {name: sha256_of_file(root / name) for name in files} | {"precision": precision}


def write_reference_logps(root: Path, logps: dict[str, dict[str, list]], source: dict[str, str]) -> None:
    """One parquet per split (row, prompt_id, chosen_logps, rejected_logps as float32) and the fingerprint."""
    for split, columns in logps.items():
        table = pa.table(columns)
        for name in ("chosen_logps", "rejected_logps"):
            position = table.schema.get_field_index(name)
            table = table.set_column(position, name, table[name].cast(pa.float32()))
        write_parquet(root / FOLDER / f"pairs_{split}.parquet", table)
    write_json(root / FOLDER / "fingerprint.json", source)


def other_precision(root: Path, precision: str) -> str | None:
    """A warning in words where the log-probs were computed in another precision than this run's; else None.

    `base.precision: auto` is one parameter on all machines: those of a machine with bf16 are taken over by one without.
    """
    recorded = read_json(root / FOLDER / "fingerprint.json")["precision"]
    if recorded == precision:
        return None
    return (
        f"{FOLDER} is of {recorded}, this run of {precision}: rewards do not begin at 0, but at what rounding makes of "
        "an answer (up to 0.4 nats). For the same on both sides name base.precision, or run `dvc repro -f "
        "reference_logps` first"
    )


def read_reference_logps(root: Path, split: str) -> dict[str, list]:
    """The columns row, prompt_id, chosen_logps and rejected_logps (nats) of `split` ('train', 'heldout').

    Raises:
        UserError: they were computed from another model or from other token ids than are here now.
    """
    recorded = read_json(root / FOLDER / "fingerprint.json")
    current = fingerprint(root, recorded["precision"])
    if changed := [name for name, digest in current.items() if recorded.get(name) != digest]:
        raise UserError(f"{FOLDER}: computed from another {changed[0]}; run: dvc repro reference_logps")
    return read_parquet(root / FOLDER / f"pairs_{split}.parquet")
