"""Gather every number, curve, picture and sample into one page that opens without a network.

Reads   reports/<stage>/metrics.json, history.csv, heldout.csv, scorecard.csv, verdicts.json, samples.json,
        answer.md, *.png
        reports/<stage>/run.json                 if there; no dep, since it differs from run to run
        params.yaml
Writes  reports/index.html                       the report, self-contained
        reports/build_report/run.json            seconds, memory, versions

Run     dvc repro build_report                   (untracked: python -m stages.build_report)
"""

from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

from stages.lib.analysis.names import MODELS
from stages.lib.report import numbers, sections
from stages.lib.report.files import ReportFiles
from stages.lib.report.page import Page, paragraphs, sections_of, strong
from stages.lib.report.render import render
from stages.lib.run.artefacts import atomic_path
from stages.lib.run.params import Base, Section, read_params
from stages.lib.run.stage import run_stage


class Params(Section):
    title: str  # heading of the page
    gallery_rows: int = Field(ge=1)  # prompts shown in the sample gallery

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.title.strip():
            raise ValueError("title must not be empty")
        return self


def main(base: Base, params: Params, root: Path = Path(".")) -> dict[str, Any]:
    files, settings = ReportFiles(root), read_params(root)
    confidence = settings["analyze_logps"]["confidence"]
    pictures = {picture.title: picture for picture in sections.pictures(root)}
    page = Page(
        title=params.title,
        lede=sections.lede(files),
        verdict=paragraphs(sections.verdict_paragraphs(files)),
        judge=sections.judge(files),
        scorecard=sections.scorecard(files, mark_change=strong),
        second_judge=sections.second_judge(files),
        frontier=pictures.pop("frontier"),
        samples=sections.gallery(files, params.gallery_rows),
        corruptions=numbers.corruptions(files, confidence),
        corruptions_in_words=numbers.corruptions_in_words(files, confidence),
        tiles=[*numbers.tiles(files), sections.cost_tile(files)],
        answer=paragraphs(files.text("analyze_logps", "answer.md")),
        forests=numbers.forests(files),
        curves=sections.training_curves(files),
        pictures=list(pictures.values()),
        setup=[*sections.setup(files, settings), ("Seed, precision", f"{base.seed}, {base.precision}")],
        data=sections.data_counts(files),
        parameters=sections_of((root / "params.yaml").read_text(encoding="utf-8"), sections.PARAMETERS),
        costs=sections.costs(files),
        provenance=sections.provenance(files),
    )
    html = render(page).encode("utf-8", errors="replace")  # a model may emit half a surrogate pair
    with atomic_path(root / "reports/index.html") as partial:
        partial.write_bytes(html)
    print(f"wrote reports/index.html: {len(html) / 1e6:.1f} MB")
    for model, (word, reasons) in files.verdicts().items():
        print(f"{MODELS[model]}: {word}: {reasons}")
    return {}


if __name__ == "__main__":
    run_stage("build_report", main, Params)
