"""What the stages left under reports/, read with errors that name the file, the key and the stage to run."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from stages.lib.analysis.stats import Interval
from stages.lib.run.errors import UserError

EMBEDDED_PAIRS = (
    "f8c44a541f7971c88ab2c3b6f24422ab43dd9cb9434e0c18dc6112e1cb72cb30"  # SHA-256, data/pairs_embedded.jsonl
)


def data_license(stated: str | None, sha256: str) -> str | None:
    """The pairs' licence: as stated where they come from, or this project's own where they come with it."""
    return stated or ("mit" if sha256 == EMBEDDED_PAIRS else None)


class ReportFiles:
    """Read access to reports/<stage>/ under one project root."""

    def __init__(self, root: Path):
        self.root = root

    def text(self, stage: str, name: str) -> str:
        path = self.root / "reports" / stage / name
        try:
            return path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(f"reports/{stage}/{name}: not found; run `dvc repro {stage}`") from None

    def json(self, stage: str, name: str = "metrics.json") -> Any:
        try:
            return json.loads(self.text(stage, name))
        except json.JSONDecodeError as error:
            raise UserError(f"reports/{stage}/{name}: not JSON ({error}); run `dvc repro -f {stage}`") from None

    def metric(self, stage: str, *keys: str) -> Any:
        """The value under nested `keys` of the stage's metrics.json."""
        value = self.json(stage)
        for depth, key in enumerate(keys, 1):
            if not isinstance(value, dict) or key not in value:
                path = " > ".join(keys[:depth])
                raise UserError(f"reports/{stage}/metrics.json: no '{path}'; run `dvc repro -f {stage}`")
            value = value[key]
        return value

    def interval(self, stage: str, *keys: str) -> Interval:
        """The estimate under `keys`, with the interval that stands beside it as <name>_low and <name>_high."""
        *parents, name = keys
        mean, low, high = (self.metric(stage, *parents, name + end) for end in ("", "_low", "_high"))
        return Interval(mean, low, high)

    def table(self, stage: str, name: str, *columns: str) -> pd.DataFrame:
        """The named columns of a CSV file."""
        path = f"reports/{stage}/{name}"
        if not (self.root / path).is_file():
            raise UserError(f"{path}: not found; run `dvc repro {stage}`")
        try:
            table = pd.read_csv(self.root / path)
        except ValueError as error:  # pandas' parser errors are ValueErrors
            raise UserError(f"{path}: {error}; run `dvc repro -f {stage}`") from error
        if missing := [column for column in columns if column not in table]:
            raise UserError(f"{path}: no column '{missing[0]}'; run `dvc repro -f {stage}`")
        return table.filter(list(columns))

    def scored(self, model: str, measure: str, decoding: str = "sampled", change: bool = False) -> Interval | None:
        """A measure of one model's answers, or its change from the base's; None where the scorecard has none."""
        ends = ("change", "change_low", "change_high") if change else ("mean", "low", "high")
        table = self.table("score_responses", "scorecard.csv", "model", "decoding", "measure", *ends)
        key = {"model": model, "decoding": decoding, "measure": measure}
        found = table[(table[list(key)] == pd.Series(key)).all(axis=1)]
        if found.empty:
            return None
        mean, low, high = (None if pd.isna(value) else float(value) for value in found.iloc[0][list(ends)])
        return None if mean is None else Interval(mean, low, high)

    def verdicts(self) -> dict[str, tuple[str, str]]:
        """The verdict on DPO and on PPO: a word, and the figures it rests on."""
        found = self.json("score_responses", "verdicts.json")
        try:
            return {model: (found[model]["word"], "; ".join(found[model]["reasons"])) for model in ("dpo", "ppo")}
        except (KeyError, TypeError) as error:
            where = "reports/score_responses/verdicts.json"
            raise UserError(f"{where}: {error} is missing; run `dvc repro -f score_responses`") from error

    def columns(self, stage: str, name: str, *columns: str) -> list[list[float]]:
        """Columns of a CSV file, as lists of numbers."""
        table = self.table(stage, name, *columns)
        return [table[column].astype(float).tolist() for column in columns]

    def run(self, stage: str) -> dict[str, Any] | None:
        """The stage's run.json, which a clone without the runs may lack."""
        path = self.root / "reports" / stage / "run.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
