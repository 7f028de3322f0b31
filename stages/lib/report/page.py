"""The parts of the report's page, and how numbers are spelt on it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape
from matplotlib.ticker import MaxNLocator

from stages.lib.analysis.stats import Interval
from stages.lib.analysis.wording import ends, estimate, number, percent
from stages.lib.report.charts import Picture


@dataclass(frozen=True)
class Estimate:
    """One line of a forest plot: a measured number or a baseline, with its interval where it has one."""

    label: str
    interval: Interval
    note: str = ""
    kind: Literal["measured", "baseline"] = "measured"


@dataclass(frozen=True)
class Scale:
    """The axis that the lines of one forest plot share."""

    low: float
    high: float
    reference: float | None  # the value that means "nothing there": 0.5 for an AUC, 0 for a difference
    digits: int = 2
    signed: bool = False

    @property
    def ticks(self) -> list[float]:
        ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(self.low, self.high)
        return [float(tick) for tick in ticks if self.low - 1e-9 <= tick <= self.high + 1e-9]

    def place(self, value: float) -> float:
        """Where `value` lies between the ends of the axis, in percent."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(1.0, max(0.0, share)), 2)

    def show(self, interval: Interval) -> str:
        return estimate(interval, self.digits, self.signed)

    def ends(self, interval: Interval) -> str:
        return ends(interval, self.digits, self.signed)

    def tick(self, value: float) -> str:
        return number(float(f"{value:.10g}"), None, self.signed)


@dataclass(frozen=True)
class Forest:
    """Estimates on one scale, under a heading and a sentence that says how to read them."""

    title: str
    intro: str
    estimates: Sequence[Estimate]
    scale: Scale

    @classmethod
    def fitted(
        cls,
        title: str,
        intro: str,
        estimates: Sequence[Estimate],
        reference: float,
        digits: int = 2,
        signed: bool = False,
    ) -> "Forest":
        """A forest whose axis just holds its intervals and the reference."""
        intervals = [estimate.interval for estimate in estimates]
        ends = [reference] + [end for i in intervals for end in (i.mean, i.low, i.high) if end is not None]
        margin = 0.06 * (max(ends) - min(ends)) or 1.0
        return cls(
            title, intro, estimates, Scale(min(ends) - margin, max(ends) + margin, reference, digits, signed)
        )


@dataclass(frozen=True)
class Tile:
    """One number at a glance, with what it means."""

    label: str
    value: str
    interval: str  # '' where there is none
    note: str


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns; every column but the first holds numbers."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str | Markup]]


@dataclass(frozen=True)
class Answer:
    """What one model said to a prompt."""

    greedy: str
    sampled: str
    greedy_ended: bool
    sampled_ended: bool


@dataclass(frozen=True)
class Sample:
    """One prompt and each model's answers, by the model's name."""

    prompt: str
    answers: dict[str, Answer]


@dataclass(frozen=True)
class Page:
    """All that the report shows, in reading order."""

    title: str
    lede: str
    verdict: Markup
    judge: str  # whose verdict it is
    scorecard: Table
    second_judge: Table | None  # where one was asked
    frontier: Picture
    samples: Sequence[Sample]
    corruptions: Table
    corruptions_in_words: str
    tiles: Sequence[Tile]
    answer: Markup
    forests: Sequence[Forest]
    curves: Sequence[Picture]
    pictures: Sequence[Picture]
    setup: Sequence[tuple[str, str]]
    data: Sequence[tuple[str, str]]
    parameters: str
    costs: Table
    provenance: Sequence[tuple[str, str]]


def paragraphs(markdown: str) -> Markup:
    """Paragraphs, `**bold**` and `` `code` `` of a generated Markdown text; all else is shown as it stands."""
    blocks = [block for block in re.split(r"\n\s*\n", markdown.strip()) if not block.startswith("#")]
    text = "".join(f"<p>{escape(block)}</p>\n" for block in blocks)
    text = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)
    return Markup(re.sub(r"`(.+?)`", r"<code>\1</code>", text))


def strong(text: str) -> Markup:
    return Markup("<strong>{}</strong>").format(text)


def percentages(share: float | Interval, digits: int = 0) -> str:
    """As `percent`, with a space that does not break before the sign."""
    return percent(share, digits).replace(" %", "\N{NO-BREAK SPACE}%")


def spell_seconds(seconds: float) -> str:
    """'4.2 s', '3 min 05 s', '1 h 02 min'."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60} h {minutes % 60:02} min"


def sections_of(params: str, names: Sequence[str]) -> str:
    """The named top-level sections of params.yaml as they stand there, comments and all."""
    blocks = re.split(r"^(?=[A-Za-z_]+:)", params, flags=re.MULTILINE)
    return "".join(block for block in blocks if block.split(":")[0] in names).strip()
