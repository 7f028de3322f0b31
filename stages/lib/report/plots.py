"""Pictures of the analysis as PNG: the same numbers give the same bytes.

Colours are Okabe and Ito's, which colour-blind readers tell apart; line styles and markers say the same again.
"""

import io
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator, PercentFormatter
from matplotlib.typing import RcKeyType
from scipy.stats import gaussian_kde

from stages.lib.analysis.names import MODELS, RANKER_LABELS
from stages.lib.analysis.stats import Interval
from stages.lib.analysis.wording import CAPTIONS, number

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#5f6b7a"
INK = "#1f2933"
GROUPS = {  # colour says whether it was trained on, the line which answer it is
    "train_chosen": ("training, chosen", BLUE, "-"),
    "train_rejected": ("training, rejected", BLUE, "--"),
    "heldout_chosen": ("held-out, chosen", ORANGE, "-"),
    "heldout_rejected": ("held-out, rejected", ORANGE, "--"),
    "unseen": ("unseen, another kind", GREEN, "-."),
}
STAGE_OF = {"scores": "score_responses", "frontier": "score_responses"}  # who draws it; else analyze_logps
STYLE: dict[RcKeyType, Any] = {
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8893a3",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e8ee",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "lines.linewidth": 1.9,
    "figure.facecolor": "white",
}
WIDTH = 8.4  # inches; at README width a 10-point letter then stays legible
DPI = 150


def densities(texts: pd.DataFrame) -> bytes:
    """Distribution of per-token log-probs, a panel per model and a curve per group.

    Args:
        texts: a row per text: group, and per-token log-probs (nats) under base, dpo and ppo.
    """
    with matplotlib.rc_context(STYLE):
        figure = _figure(6.6)
        panels = figure.subplots(len(MODELS), 1, sharex=True)
        values = texts[list(MODELS)].to_numpy()
        grid = np.linspace(*_span(values, 0.08), 400)
        for axes, (model, label) in zip(panels, MODELS.items(), strict=True):
            for group, (name, colour, line) in GROUPS.items():
                curve = _density(texts.loc[texts["group"] == group, model].to_numpy(), grid)
                axes.plot(grid, curve, line, color=colour, label=name)
            axes.set(title=label, ylabel="density", ylim=(0, None))
            axes.yaxis.set_major_locator(MaxNLocator(3))
        panels[-1].set_xlabel("log-prob per token (nats)")
        _legend(figure, panels[0], columns=3)
        return _png(figure, "How likely each model finds each kind of text", "densities")


def ecdf(texts: pd.DataFrame) -> bytes:
    """Cumulative distribution of the change of per-token log-prob from base, a panel for DPO and for PPO."""
    with matplotlib.rc_context(STYLE):
        figure = _figure(4.4)
        panels = figure.subplots(1, 2, sharey=True)
        for axes, model in zip(panels, ("dpo", "ppo"), strict=True):
            change = texts[model] - texts["base"]
            span = _span(change.to_numpy(), 0.04)
            for group, (name, colour, line) in GROUPS.items():
                axes.ecdf(change[texts["group"] == group], label=name, color=colour, linestyle=line)
            axes.axvline(0, color=GREY, linestyle=":", linewidth=1.2)
            axes.set(
                title=MODELS[model],
                xlabel="change from base (nats per token)",
                xlim=span,
            )
            axes.xaxis.set_major_locator(MaxNLocator(5))
        panels[0].set_ylabel("share of texts")
        panels[0].yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        _legend(figure, panels[0], columns=3)
        return _png(figure, "How far training moved each text", "ecdf")


def displacement(pairs: pd.DataFrame) -> bytes:
    """Change of the chosen against change of the rejected answer's log-prob, a panel for DPO and for PPO.

    Args:
        pairs: split ('train', 'heldout'), and dpo/chosen, dpo/rejected, ppo/chosen, ppo/rejected: changes of the
            summed log-prob from base (nats).
    """
    looks = {"train": ("training", BLUE, "o", 16), "heldout": ("held-out", ORANGE, "^", 30)}
    with matplotlib.rc_context(STYLE):
        figure = _figure(5.6)
        panels = figure.subplots(1, 2)
        for axes, model in zip(panels, ("dpo", "ppo"), strict=True):
            part = pairs[["split"]].assign(chosen=pairs[f"{model}/chosen"], rejected=pairs[f"{model}/rejected"])
            low, high = _span(np.append(part[["chosen", "rejected"]].to_numpy(), 0.0), 0.24)
            axes.plot([low, high], [low, high], "--", color=GREY, linewidth=1)
            axes.axhline(0, color=GREY, linewidth=1)
            axes.axvline(0, color=GREY, linewidth=1)
            for split, (name, colour, marker, size) in looks.items():
                points = part[part["split"] == split]
                look = {"s": size, "c": colour, "marker": marker, "alpha": 0.6, "linewidths": 0}
                axes.scatter(points["rejected"], points["chosen"], label=name, **look)
            axes.set(
                title=MODELS[model],
                xlabel="rejected answer, change (nats)",
                xlim=(low, high),
                ylim=(low, high),
                aspect="equal",
            )
            axes.xaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_locator(MaxNLocator(5))
            _quadrants(axes, part)
        panels[0].set_ylabel("chosen answer, change (nats)")
        _legend(figure, panels[0], columns=2)
        return _png(figure, "Which answer training made more likely", "displacement")


def rankers(estimates: Mapping[str, Interval], trained: Sequence[str]) -> bytes:
    """Pair accuracies with intervals, best first; the `trained` ones stand out."""
    order = sorted(estimates, key=lambda name: (estimates[name].mean, name))
    with matplotlib.rc_context(STYLE):
        figure = _figure(1.9 + 0.32 * len(order))
        axes = figure.subplots()
        axes.axvline(0.5, color=GREY, linestyle=":", linewidth=1.2)
        for y, name in enumerate(order):
            interval, colour = estimates[name], BLUE if name in trained else GREY
            low, high = (interval.mean if end is None else end for end in (interval.low, interval.high))
            axes.plot([low, high], [y, y], color=colour, linewidth=3.2 if name in trained else 2, alpha=0.75)
            axes.plot(interval.mean, y, "D" if name in trained else "o", color=colour, markersize=7)
            axes.annotate(
                f"{100 * interval.mean:.0f} %",
                (1.02, y),
                xycoords=("axes fraction", "data"),
                va="center",
                color=colour,
                weight="bold" if name in trained else "normal",
            )
        axes.set(xlabel="held-out pairs ranked right", xlim=(-0.02, 1.02), ylim=(-0.7, len(order) - 0.3))
        axes.set_yticks(range(len(order)), [RANKER_LABELS.get(name, name) for name in order])
        for tick, name in zip(axes.get_yticklabels(), order, strict=True):
            tick.set(weight="bold" if name in trained else "normal")
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        axes.grid(axis="y", visible=False)
        return _png(figure, "Trained rankers (bold) beside counting one feature", "rankers")


def margins(history: pd.DataFrame, heldout: pd.DataFrame) -> bytes:
    """DPO's implicit reward margin and accuracy over optimizer steps (columns as in train_dpo's CSV files)."""
    curves = ((history, "training batch", BLUE, "-", "o"), (heldout, "held-out pairs", ORANGE, "--", "^"))
    titles = {"rewards/margins": "Margin, chosen less rejected", "rewards/accuracies": "Pairs ranked right"}
    with matplotlib.rc_context(STYLE):
        figure = _figure(3.9)
        panels = figure.subplots(1, 2)
        for axes, (column, title) in zip(panels, titles.items(), strict=True):
            for table, name, colour, line, marker in curves:
                axes.plot(
                    table["step"], table[column], line, color=colour, label=name, marker=marker, markersize=4
                )
            axes.set(title=title, xlabel="optimizer step")
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panels[0].set_ylabel("implicit reward")
        panels[1].yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))
        panels[1].set_ylim(-0.03, 1.03)
        _legend(figure, panels[0], columns=2)
        return _png(figure, "DPO: implicit rewards over training", "margins")


def frontier(points: pd.DataFrame) -> bytes:
    """Score gained and the judge's win rate against distance from the base (columns as in frontier.py's rows)."""
    looks = {
        "best of n": (PURPLE, "s", ":"),
        "DPO's course": (ORANGE, "^", "--"),
        "PPO's course": (GREEN, "o", "-"),
        MODELS["base"]: (GREY, "D", "None"),
        "DPO": (ORANGE, "D", "None"),
        "PPO": (GREEN, "D", "None"),
    }
    titles = {
        "score_gain": "Reward-model score gained over the base",
        "win_rate": "Judge's win rate over the base",
    }
    with matplotlib.rc_context(STYLE):
        figure = _figure(5.2)
        panels = figure.subplots(1, 2)
        for axes, (measure, title) in zip(panels, titles.items(), strict=True):
            for series, (colour, marker, line) in looks.items():
                part = points.query("series == @series")
                finished = line == "None"
                name = f"{series}, as evaluated" if finished and series != MODELS["base"] else series
                axes.plot(
                    part["sqrt_kl"],
                    part[measure],
                    linestyle=line,
                    color=colour,
                    marker=marker,
                    markersize=9 if finished else 5,
                    markeredgecolor="white" if finished else colour,
                    alpha=1 if finished else 0.75,
                    label=f"{name} ({part['prompts'].iloc[0]:.0f} prompts)" if len(part) else None,
                    zorder=3 if finished else 2,
                )
                bars = part.dropna(subset=[f"{measure}_low", f"{measure}_high"])
                ends = bars[f"{measure}_low"], bars[f"{measure}_high"]
                width, alpha = (1.6, 1.0) if finished else (0.8, 0.4)
                axes.vlines(bars["sqrt_kl"], *ends, color=colour, linewidth=width, alpha=alpha, zorder=1)
                if series == "best of n":
                    for _, point in part[part["step"] > 1].iterrows():  # of one is the base
                        axes.annotate(
                            f"{point['step']:.0f}",
                            (point["sqrt_kl"], point[measure]),
                            xytext=(-4, 5),  # beside its bar, which would strike it through
                            textcoords="offset points",
                            ha="right",
                            fontsize=8.5,
                            color=colour,
                        )
            axes.set(title=title, xlabel="√KL to the base (nats per answer)")
            axes.margins(0.08)
        for axes, nothing in zip(panels, (0.0, 0.5), strict=True):
            axes.axhline(nothing, color=GREY, linestyle=":", linewidth=1.2)
        panels[1].yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        panels[1].yaxis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=" %"))
        _legend(figure, panels[0], columns=2)
        return _png(figure, "What was gained, and how far from the base", "frontier")


def scores(pairs: pd.DataFrame, answers: pd.DataFrame) -> bytes:
    """Reward-model scores of held-out pairs, and of the models' answers to the same prompts.

    Args:
        pairs: chosen_score, rejected_score.
        answers: base, dpo, ppo.
    """
    panels_of = (
        (
            "Held-out answers of the data",
            pairs,
            (("chosen_score", "chosen", BLUE), ("rejected_score", "rejected", PURPLE)),
        ),
        (
            "Generated answers",
            answers,
            (("base", MODELS["base"], GREY), ("dpo", MODELS["dpo"], ORANGE), ("ppo", MODELS["ppo"], GREEN)),
        ),
    )
    with matplotlib.rc_context(STYLE):
        figure = _figure(4.1)
        panels = figure.subplots(1, 2, sharex=True)
        everything = [
            table[[column for column, *_ in series]].to_numpy().ravel() for _, table, series in panels_of
        ]
        grid = np.linspace(*_span(np.concatenate(everything), 0.15), 300)
        for axes, (title, table, series) in zip(panels, panels_of, strict=True):
            for (column, name, colour), line, row in zip(series, ("-", "--", "-."), range(3), strict=False):
                values = table[column].to_numpy()
                curve = _density(values, grid)
                axes.plot(grid, curve, line, color=colour, label=f"{name}, mean {number(values.mean())}")
                axes.fill_between(grid, curve, color=colour, alpha=0.13, linewidth=0)
                # every score as a tick below the axis' zero, so that few texts do not look like many
                axes.plot(
                    values,
                    np.full(len(values), -0.04 - 0.045 * row),
                    "|",
                    color=colour,
                    markersize=8,
                    transform=axes.get_xaxis_transform(),
                    clip_on=False,
                )
            axes.set(title=title, ylim=(0, None))
            axes.set_xlabel("reward-model score", labelpad=4)
            axes.tick_params(axis="x", pad=28)  # below three rows of ticks
            axes.yaxis.set_major_locator(MaxNLocator(3))
            axes.legend(loc="upper left", bbox_to_anchor=(0, 1))
            axes.set_ylim(0, axes.get_ylim()[1] * 1.35)
        panels[0].set_ylabel("density")
        return _png(figure, "Reward-model scores", "scores")


def _figure(height: float) -> Figure:
    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, alignment="left")


def _png(figure: Figure, title: str, name: str) -> bytes:
    """With the title above and the caption below; no date and no version, which would change the bytes."""
    if figure.legends:  # a suptitle would lie on top of the figure's legend
        figure.legends[0].set_title(title, prop=FontProperties(size=13.5, weight="bold"))
    else:
        figure.suptitle(title, x=0.008, ha="left", size=13.5, weight="bold")
    caption = textwrap.fill(CAPTIONS[name], 116)
    figure.supxlabel(caption, x=0.008, ha="left", fontsize=9.5, color="#3c4757")
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _quadrants(axes: Axes, pairs: pd.DataFrame) -> None:
    """The share of training and held-out pairs in each quadrant, in its corner."""
    corners = {  # signs of the changes of rejected and chosen: where the words stand, and the words
        (-1, 1): (0.02, 0.98, "as meant"),
        (1, 1): (0.98, 0.98, "both rose"),
        (-1, -1): (0.02, 0.02, "both fell"),
        (1, -1): (0.98, 0.02, "wrong way"),
    }
    for (rejected, chosen), (x, y, words) in corners.items():
        lines = [words]
        for split, name in (("train", "training"), ("heldout", "held-out")):
            part = pairs[pairs["split"] == split]
            inside = (np.sign(part["rejected"]) == rejected) & (np.sign(part["chosen"]) == chosen)
            lines.append(f"{100 * inside.mean():.0f} % {name}")
        axes.annotate(
            "\n".join(lines),
            (x, y),
            xycoords="axes fraction",
            ha="left" if x < 0.5 else "right",
            va="top" if y > 0.5 else "bottom",
            fontsize=9,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1.5},
        )


def _span(values: Sequence[float] | np.ndarray, margin: float) -> tuple[float, float]:
    """Lowest and highest value with a margin, never of width zero."""
    low, high = float(np.min(values)), float(np.max(values))
    room = margin * (high - low) or 0.5
    return low - room, high + room


def _density(values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Gaussian kernel density; nothing where the values do not spread."""
    if len(values) < 2 or np.ptp(values) == 0:
        return np.full_like(grid, np.nan)
    return gaussian_kde(values)(grid)
