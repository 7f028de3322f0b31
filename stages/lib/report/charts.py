"""Curves and histograms as small SVG pictures, inlined into a page."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from matplotlib.typing import RcKeyType

from stages.lib.report.plots import BLUE, GREEN, INK, ORANGE, PURPLE, STYLE

COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
SVG_STYLE: dict[RcKeyType, Any] = {
    **STYLE,
    "font.size": 9,
    "legend.fontsize": 9,
    "svg.fonttype": "none",  # text stays text: a tenth of the size, drawn in the reader's own font
    "svg.hashsalt": "report",  # ids from content alone, so that the same curve is the same bytes
}


@dataclass(frozen=True)
class Picture:
    """An image with all its bytes inside, and the words around it."""

    title: str
    caption: str
    source: str  # data: URI


Points = tuple[Sequence[float], Sequence[float]]  # x and y of one line


def curves(title: str, caption: str, lines: Mapping[str, Points], x_label: str, y_label: str) -> Picture:
    """One chart of several lines, each under its name; a line of a single point is drawn as that point."""
    with matplotlib.rc_context(SVG_STYLE):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10], integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        for (name, (x, y)), colour in zip(lines.items(), COLOURS, strict=False):
            axes.plot(x, y, label=name, color=colour, linewidth=1.8, marker="o", markersize=3)
        if len(lines) > 1:
            axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=len(lines))
        return Picture(title, caption, _svg(figure))


def histograms(
    title: str, caption: str, series: Mapping[str, Sequence[int]], limit: int | None, x_label: str
) -> Picture:
    """Distributions over one axis, and a dashed line at the limit, if there is one."""
    longest = max(max(values) for values in series.values())
    bins = np.linspace(0, max(longest, 1), 41).tolist()
    with matplotlib.rc_context(SVG_STYLE):
        figure = Figure(figsize=(4.6, 3.0), layout="constrained")
        axes = figure.add_subplot(xlabel=x_label, ylabel="pairs")
        for (name, values), colour in zip(series.items(), COLOURS, strict=False):
            axes.hist(values, bins, label=name, color=colour, histtype="stepfilled", alpha=0.45)
        if limit is not None:
            axes.axvline(limit, color=INK, linestyle="--", linewidth=1.2, label=f"limit, {limit:,}")
        axes.set_xlim(left=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
        return Picture(title, caption, _svg(figure))


def _svg(figure: Figure) -> str:
    """The figure as a data: URI, the same bytes for the same figure."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return data_uri(file.getvalue(), "image/svg+xml")


def picture(path: Path, title: str, caption: str) -> Picture:
    """A PNG file, inlined."""
    return Picture(title, caption, data_uri(path.read_bytes(), "image/png"))


def data_uri(content: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"
