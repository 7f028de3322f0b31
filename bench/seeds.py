"""The pipeline over several seeds: does what it says of DPO and PPO hold for another split and another training?

The seed changes everything that is drawn: the held-out prompts, the corrupted copies, the order of training and the
samples. Each run is a DVC experiment in a folder of its own and leaves the workspace alone.

Run     python -m bench.seeds               (seeds 1 and 2 beside the committed run; a default run of time each)
"""

import argparse
import csv
import json
import subprocess
from typing import Any

from bench.measure import REPO
from stages.lib.run.artefacts import write_history
from stages.lib.run.params import read_params
from stages.score_responses import TRAINED

RESULT = REPO / "bench/results/seeds.csv"
METRICS = "reports/score_responses/metrics.json"
SCORECARD = "reports/score_responses/scorecard.csv"
#: measure of the scorecard, decoding, and whether its change from the base is meant
FIGURES = (
    ("win_rate", "sampled", False),
    ("win_rate_lc", "sampled", False),
    ("score", "sampled", True),
    ("kl", "sampled", False),
    ("rep_4", "greedy", True),
    ("rep_4", "sampled", True),
    ("tokens", "sampled", False),
    ("ended", "sampled", False),
    ("emoji", "sampled", False),
)


def run(seed: int) -> str:
    """The Git revision of the experiment with this seed, which is run if it is not there."""
    name = f"seed-{seed}"
    if not (revision := _revision_of(name)):
        command = ["dvc", "exp", "run", "--temp", "--name", name, "-S", f"base.seed={seed}"]
        subprocess.run(command, cwd=REPO, check=True)
        revision = _revision_of(name)
    return revision


def _revision_of(experiment: str) -> str:
    refs = _git("for-each-ref", "--format=%(refname)", "refs/exps").splitlines()
    return next((ref for ref in refs if ref.endswith(f"/{experiment}")), "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=REPO, check=True, capture_output=True, text=True).stdout


def rows_of(seed: int, metrics: dict[str, Any], scorecard: list[dict[str, str]]) -> list[dict[str, Any]]:
    """A row per trained model: its verdict, and its figures with the ends of their intervals."""
    found = {(row["model"], row["decoding"], row["measure"]): row for row in scorecard}
    rows = []
    for model in TRAINED:
        row: dict[str, Any] = {"seed": seed, "model": model, "verdict": metrics[model]["verdict"]}
        for measure, decoding, of_change in FIGURES:
            name = f"{'greedy_' if decoding == 'greedy' else ''}{measure}{'_change' if of_change else ''}"
            cells = found[model, decoding, measure]
            columns = ("change", "change_low", "change_high") if of_change else ("mean", "low", "high")
            for end, column in zip(("", "_low", "_high"), columns, strict=True):
                row[name + end] = float(cells[column]) if cells[column] else None
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    revisions = {read_params(REPO)["base"]["seed"]: "HEAD"} | {seed: run(seed) for seed in options.seeds}
    rows = []
    for seed, revision in revisions.items():
        scorecard = list(csv.DictReader(_git("show", f"{revision}:{SCORECARD}").splitlines()))
        rows += rows_of(seed, json.loads(_git("show", f"{revision}:{METRICS}")), scorecard)
    write_history(RESULT, rows)
    for row in rows:
        print(
            f"seed {row['seed']}, {row['model']}: {row['verdict']}, judge {row['win_rate']:.2f}, KL {row['kl']:.1f}"
        )
    print(f"wrote {RESULT.relative_to(REPO)}")


if __name__ == "__main__":
    main()
