"""Captions and numbers, as report, cards, pictures, README and messages spell them."""

from stages.lib.analysis.stats import Interval

CAPTIONS = {  # picture -> what to look for
    "densities": "Look for a gap between training (blue) and held-out (orange) of the same line style that was "
    "not there under the base: that would be memorising. Both moving together is a change of style.",
    "ecdf": "Each text against itself under the base. Right of the dotted line it became more likely. Where blue "
    "lies right of orange, training raised its own texts more than others like them.",
    "displacement": "One point per pair. Above the diagonal the implicit reward ranks the pair right. Lower left: "
    "both answers became less likely, the chosen one included (likelihood displacement).",
    "rankers": "Share of held-out pairs whose chosen answer comes first; bars are confidence intervals, the "
    "dotted line is chance. A trained ranker that does no better than counting has shown style, not more.",
    "margins": "Held-out pairs follow the training batches as long as what is learnt carries over. Training batches "
    "hold corrupted copies too, held-out pairs do not: only training that pulls further and further ahead is "
    "overfitting.",
    "scores": "Left: the further apart, the surer the reward model. Right: the same prompts answered by each "
    "model; a shift to the right is what PPO was trained for. A tick below is one answer.",
    "frontier": "Up is better, right is further from the base; a course runs as training goes on. Each series is on "
    "prompts of its own, in number as stated, and is compared with the base's answers to those very prompts. A score "
    "that rises while the win rate does not may be the reward model deceived, but single looks scatter by as much as "
    "their bars, which are confidence intervals. Best of n, the base's answer that the reward model likes most of n, "
    "shows what that model buys without training, at a KL of at most log n − (n − 1)/n.",
}


NO_DIFFERENCE = "no difference found"
NO_FINDING = "no finding, for there is no interval"  # one prompt allows none, nor does a constant


def finding(interval: Interval, nothing: float, above: str, below: str) -> str:
    """What an interval allows to say: on which side of `nothing` it lies, if on one."""
    if not interval.has_ends:
        return NO_FINDING
    if interval.covers(nothing):
        return NO_DIFFERENCE
    return above if interval.mean > nothing else below


def number(value: float, digits: int | None = 2, signed: bool = False) -> str:
    """'−1,234.50' with a real minus sign; `digits` after the point, or as many as it needs; 0 has no sign."""
    text = f"{abs(value):,.{digits}f}" if digits is not None else f"{abs(value):,g}"
    zero = float(text.replace(",", "")) == 0
    return ("" if zero or (value > 0 and not signed) else "+" if value > 0 else "\N{MINUS SIGN}") + text


def estimate(value: float | Interval, digits: int | None = 2, signed: bool = False) -> str:
    """'−1.20 [−1.31, −1.09]', or the number alone where there is no interval."""
    if not isinstance(value, Interval):
        return number(value, digits, signed)
    return f"{number(value.mean, digits, signed)} {ends(value, digits, signed)}".strip()


def percent(share: float | Interval, digits: int = 0) -> str:
    """'97 %' or '97 % [85, 99]'."""
    mean = share.mean if isinstance(share, Interval) else share
    interval = ends(share, digits, scale=100) if isinstance(share, Interval) else ""
    return f"{number(100 * mean, digits)} % {interval}".strip()


def ends(interval: Interval, digits: int | None = 2, signed: bool = False, scale: float = 1) -> str:
    """'[0.62, 0.80]', or nothing where there is no interval."""
    if interval.low is None or interval.high is None:
        return ""
    low, high = (number(scale * end, digits, signed) for end in (interval.low, interval.high))
    return f"[{low}, {high}]"
