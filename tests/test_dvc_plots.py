"""`dvc plots show` and `dvc metrics show` on the declared plots and metrics: offline, complete, nothing twice."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from ruamel.yaml import YAML

from tests.support.example_reports import REPO, write_example_reports

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


def pipeline() -> dict:
    return YAML(typ="safe", pure=True).load((REPO / "dvc.yaml").read_text(encoding="utf-8"))


def plots() -> list[str | dict]:
    """What reports/dvc.yaml says `dvc plots show` shall show."""
    return YAML(typ="safe", pure=True).load((REPO / "reports/dvc.yaml").read_text(encoding="utf-8"))["plots"]


def charts() -> dict[str, dict]:
    """Every chart by its title, with its display properties: those of reports/dvc.yaml and the stages' own."""
    shown = {name: chart for entry in plots() if isinstance(entry, dict) for name, chart in entry.items()}
    entries = [entry for stage in pipeline()["stages"].values() for entry in stage.get("plots", [])]
    for path, chart in (item for entry in entries for item in entry.items()):
        assert chart["title"] not in shown
        shown[chart["title"]] = chart | {"y": {path.removeprefix("reports/"): chart["y"]}}
    return shown


def pictures() -> list[str]:
    """Every picture's path from reports/."""
    return [entry for entry in plots() if isinstance(entry, str)]


def columns_drawn() -> list[tuple[str, str]]:
    """(file under reports/, y column) of every chart."""
    drawn = []
    for chart in charts().values():
        for path, columns in chart["y"].items():
            drawn += [(path, column) for column in ([columns] if isinstance(columns, str) else columns)]
    return drawn


def outs() -> set[str]:
    """Every path that a stage writes, but for metrics."""
    entries = [
        entry for stage in pipeline()["stages"].values() for entry in stage["outs"] + stage.get("plots", [])
    ]
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """A Git repository with this pipeline's declarations and made-up reports."""
    root = write_example_reports(tmp_path_factory.mktemp("project"))
    shutil.copy(REPO / "dvc.yaml", root)
    shutil.copy(REPO / "reports/dvc.yaml", root / "reports")
    shutil.copytree(REPO / ".dvc", root / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp", "config.local"))
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    return root


@pytest.fixture(scope="module")
def page(project) -> Path:
    """The page that `dvc plots show` writes."""
    shown = dvc(project, "plots", "show")
    assert "failed" not in shown.stderr and "WARNING" not in shown.stderr, shown.stderr
    return project / "dvc_plots/index.html"


def dvc(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)


def specs(page: Path) -> list[dict]:
    """The Vega-Lite charts of the page."""
    found = re.findall(r"^ *var spec = (\{.*\});$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [json.loads(spec) for spec in found]


def test_plots_page_needs_no_network():
    class Loaders(HTMLParser):
        def handle_starttag(self, tag, attributes):
            assert not {"src", "href"} & dict(attributes).keys(), (tag, attributes)
            seen.append(tag)

    seen: list[str] = []
    html = (REPO / ".dvc/plots.html").read_text(encoding="utf-8")
    Loaders().feed(html)
    assert seen.count("script") == 4  # vega, vega-lite, vega-embed, and how we call them
    assert html.count("{plot_divs}") == html.count("{refresh_tag}") == 1
    assert "{scripts}" not in html  # DVC would put the CDN's script tags there
    assert "default-src 'none'" in html
    assert html.count("Copyright") >= 10  # the notices of what is bundled


def test_no_column_and_no_picture_is_drawn_twice():
    assert [entry for entry, count in Counter(columns_drawn() + pictures()).items() if count > 1] == []


def test_what_is_drawn_is_what_stages_write():
    drawn = {f"reports/{path}" for path, _ in columns_drawn()} | {f"reports/{path}" for path in pictures()}
    assert drawn <= outs()
    assert {path for path in outs() if path.endswith(".png")} <= drawn


def test_every_chart_says_what_it_shows():
    for name, chart in charts().items():
        assert {"x", "y", "template"} <= chart.keys(), name
        assert "title" in chart or {"x_label", "y_label"} <= chart.keys(), name
        assert len(chart.get("y_label", "")) <= 26, name  # a longer one than the axis squeezes the chart flat


def test_the_charts_asked_for_are_there():
    wanted = {
        "train_dpo/history.csv": {
            "loss",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
        },
        "train_dpo/heldout.csv": {
            "loss",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
        },
        "train_reward/history.csv": {"loss", "accuracy"},
        "train_ppo/history.csv": {"objective/scores", "objective/kl", "objective/entropy"},
    }
    drawn = columns_drawn()
    for name, columns in wanted.items():
        assert columns <= {column for path, column in drawn if path == name}, name


def test_plots_show_draws_every_chart_with_its_data(page):
    drawn = specs(page)
    assert sorted(chart["title"]["text"] for chart in drawn) == sorted(charts())
    assert all(chart["data"]["values"] for chart in drawn)
    assert "<DVC_METRIC" not in page.read_text(encoding="utf-8")  # no placeholder is left


def test_what_orders_a_line_is_read_as_a_number(page):
    """DVC hands over a CSV file's cells as text, and as text 12 comes before 4: a course would be a zigzag."""
    ordered = 0
    for chart in specs(page):
        for layer in (chart, *chart.get("layer", [])):
            if order := layer.get("encoding", {}).get("order"):
                assert chart["data"]["format"]["parse"][order["field"]] == "number", chart["title"]["text"]
                ordered += 1
                colours = chart["encoding"]["color"]["scale"]["domain"]
                assert {row["series"] for row in chart["data"]["values"]} == set(colours)
    assert ordered == 2  # the frontier's


def test_plots_show_draws_every_picture_once(page):
    html = page.read_text(encoding="utf-8")
    assert pictures()
    for path in pictures():
        file = f"static/workspace_reports_{path.replace('/', '_')}"
        assert html.count(f'<img src="{file}">') == 1
        assert (page.parent / file).is_file()


def test_no_title_ends_the_script_that_draws_it(page):
    """DVC writes a chart's id, its title, between single quotes in a script: an apostrophe leaves the chart empty."""
    ids = re.findall(r'<div id\s*=\s*"?([^"> ]+)', page.read_text(encoding="utf-8"))
    assert len(ids) >= len(specs(page)) and not [each for each in ids if "'" in each]


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_the_charts_offline(page, tmp_path):
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--no-first-run", "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path}"]
    command += ["--virtual-time-budget=5000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    assert dom.count("<canvas") == len(specs(page))


def test_diff_overlays_two_revisions(project):
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "add", "-A"], cwd=project, check=True)
    subprocess.run([*git, "commit", "-qm", "before"], cwd=project, check=True)
    path = project / "reports/train_dpo/history.csv"
    before = path.read_bytes()
    pd.read_csv(path).assign(loss=0.5).to_csv(path, index=False)
    dvc(project, "plots", "diff", "HEAD", "--out", "compared")
    path.write_bytes(before)
    drawn = {chart["title"]["text"]: chart["data"]["values"] for chart in specs(project / "compared/index.html")}
    rows = drawn["DPO: loss"]
    assert {row["rev"] for row in rows} == {"workspace", "HEAD"}
    assert {row["filename"] for row in rows} == {"history.csv", "heldout.csv"}
    values = {row["loss"] for row in rows if row["rev"] == "workspace" and row["filename"] == "history.csv"}
    assert values == {"0.5"}


def test_metrics_show_has_every_run_record(project):
    (revision,) = json.loads(
        dvc(project, "metrics", "show", "--json").stdout
    ).values()  # workspace, or HEAD if equal
    shown = revision["data"]
    stages = pipeline()["stages"].keys() - {"check_paths"}  # which computes nothing
    runs = {f"reports/{stage}/run.json" for stage in stages}
    assert runs <= shown.keys()
    assert shown["reports/train_dpo/run.json"]["data"]["tokens_per_second"] == 655.2


def test_run_records_are_neither_deps_nor_outs():
    for name, stage in pipeline()["stages"].items():
        sections = (stage.get(section, []) for section in ("deps", "outs", "metrics", "plots"))
        paths = [entry if isinstance(entry, str) else next(iter(entry)) for each in sections for entry in each]
        assert not [path for path in paths if path.endswith("run.json")], name
