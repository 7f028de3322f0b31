"""Reports as one prompt leaves them: every estimate without the ends of its interval."""

from pathlib import Path
from typing import Any

import pandas as pd

from stages.lib.run.artefacts import read_json, write_json

CLAIMS = ("no difference found", "no clear difference", "more likely than under", "gained more", "gained less",
          "score higher", "score lower", "and nothing else", "and little else", "learnt more than one")  # fmt: skip


def drop_intervals(root: Path) -> None:
    """Empties every <name>_low and <name>_high, low and high under reports/."""
    for path in root.glob("reports/*/metrics.json"):
        write_json(path, _without_ends(read_json(path)))
    path = root / "reports/score_responses/scorecard.csv"
    table = pd.read_csv(path)
    table[[name for name in table if name.endswith(("low", "high"))]] = None
    table.to_csv(path, index=False)


def _without_ends(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {
        name: None if name.endswith(("_low", "_high")) else _without_ends(inner) for name, inner in value.items()
    }
