"""Pictures: reproducible bytes, no overlap of texts, and data that would break a plot."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from stages.lib.analysis.stats import Interval
from stages.lib.report import plots
from tests.support.example_reports import example_tables

GROUPS = list(plots.GROUPS)


def texts(spread=0.3, size=12):
    rng = np.random.default_rng(0)
    base = rng.normal(-2, spread, (5 * size,))
    table = pd.DataFrame({"group": np.repeat(GROUPS, size), "base": base})
    return table.assign(dpo=base - 1 + spread * rng.normal(size=len(base)), ppo=base)


def pairs(size=20):
    values = np.random.default_rng(1).normal(0, 50, (size, 4))
    table = pd.DataFrame(values, columns=["dpo/chosen", "dpo/rejected", "ppo/chosen", "ppo/rejected"])
    return table.assign(split=["train", "heldout"] * (size // 2))


STEPS = pd.DataFrame({"step": [1, 2], "rewards/margins": [0.0, 3.0], "rewards/accuracies": [0.5, 1.0]})
SCORES = pd.DataFrame({"chosen_score": [1.0, 2.0, 2.5], "rejected_score": [-1.0, 0.0, 1.0]})
ANSWERS = pd.DataFrame({"base": [-1.0, 0.0], "dpo": [0.1, 0.3], "ppo": [0.5, 0.7]})
FRONTIER = pd.DataFrame(example_tables()["score_responses/frontier.csv"])
ACCURACIES = {
    "emoji": Interval(1.0, 0.9, 1.0),
    "dpo": Interval(0.97, 0.85, 0.99),
    "ppo": Interval(0.5, None, None),
}
PICTURES = {
    "densities": lambda: plots.densities(texts()),
    "ecdf": lambda: plots.ecdf(texts()),
    "displacement": lambda: plots.displacement(pairs()),
    "rankers": lambda: plots.rankers(ACCURACIES, ("dpo", "ppo")),
    "margins": lambda: plots.margins(STEPS, STEPS.iloc[1:]),
    "scores": lambda: plots.scores(SCORES, ANSWERS),
    "frontier": lambda: plots.frontier(FRONTIER),
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_same_numbers_give_the_same_bytes_without_metadata(name):
    first = PICTURES[name]()
    assert first == PICTURES[name]()
    image = Image.open(io.BytesIO(first))
    assert image.width == round(plots.WIDTH * plots.DPI)
    assert set(image.info) <= {"dpi"}


@pytest.mark.parametrize("name", PICTURES)
def test_no_two_texts_of_a_figure_overlap(name, monkeypatch):
    """Titles, labels, captions, legends and annotations each have a place of their own, within the picture."""
    kept = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (kept.append(self), real(self, *a, **k))[1])
    PICTURES[name]()
    (figure,) = kept
    renderer = FigureCanvasAgg(figure).get_renderer()
    parts = [figure._suptitle, figure._supxlabel, *figure.legends]
    for axes in figure.axes:
        parts += [axes.xaxis.label, axes.yaxis.label, axes._left_title, axes.get_legend(), *axes.texts]
        for axis in (axes.xaxis, axes.yaxis):  # a tick beyond the limits is not drawn
            low, high = sorted(axis.get_view_interval())
            parts += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    boxes = []
    for part in parts:
        text = getattr(part, "get_text", lambda: "legend")() if part and part.get_visible() else ""
        if text:
            box = part.get_window_extent(renderer)
            assert figure.bbox.padded(1).containsx(box.x0) and figure.bbox.padded(1).containsx(box.x1), text
            assert figure.bbox.padded(1).containsy(box.y0) and figure.bbox.padded(1).containsy(box.y1), text
            boxes.append((text, box))
    for i, (first, box) in enumerate(boxes):
        for second, other in boxes[i + 1 :]:
            width = min(box.x1, other.x1) - max(box.x0, other.x0)
            height = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert width < 1.5 or height < 1.5, f"{first!r} overlaps {second!r}"


def test_every_picture_has_a_caption():
    assert set(plots.CAPTIONS) == set(PICTURES)


def test_values_that_do_not_spread_still_draw():
    flat = texts(spread=0.0, size=1)
    same = pd.DataFrame({"chosen_score": [1.0, 1.0], "rejected_score": [1.0, 1.0]})
    for draw in (
        lambda: plots.densities(flat),
        lambda: plots.ecdf(flat),
        lambda: plots.displacement(pairs(2) * [0, 0, 0, 0, 1]),
        lambda: plots.scores(same, ANSWERS.iloc[:1]),
        lambda: plots.margins(STEPS.iloc[:1], STEPS.iloc[:1]),
    ):
        assert draw().startswith(b"\x89PNG")
