"""The page that shows pairs before anything is trained on them: its parts, and the sentences that warn."""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from stages.lib.analysis.names import RANKER_LABELS
from stages.lib.analysis.pair_profile import NO_LETTERS, TELLING
from stages.lib.analysis.stats import Interval
from stages.lib.data.cuts import cut_warnings
from stages.lib.data.suspicions import SUSPICIONS
from stages.lib.report.charts import Picture, histograms
from stages.lib.report.files import data_license
from stages.lib.report.page import Estimate, Forest, Scale, Table, percentages

MANY = 0.1  # share of rows dropped, of prompts cut, or of answers cut, above which the page warns
REASONS = {  # of dropped rows, in words; others are spelt by their name
    "chosen_is_rejected": "chosen and rejected are the same text",
    "answer_is_prompt": "an answer is only the prompt again",
    "duplicate": "the same as an earlier row",
    "contradiction": "contradicts another row",
    "over_max_pairs": "more than max_pairs",
    "prompt_of_heldout_split": "its prompt is held out",
    "special_token": "holds a special token of the model",
    "chat_template": "the chat template does not render it",
    "equal_after_cut": "equal once cut to the limits",
    "contradiction_after_cut": "contradicts another pair once both are cut",
    "repeated_after_cut": "the same as another pair once both are cut",
}


OTHERS = "unseen texts and evaluation prompts included"


class Lengths(NamedTuple):
    """Tokens of each pair's texts before anything is cut."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    def cut(self, limits: Mapping[str, int | None]) -> "Lengths":
        """What the limits of tokenize_pairs leave."""
        prompt = [_within(n, limits["max_prompt_length"]) for n in self.prompt]
        whole = limits["max_length"]
        rooms = [None if whole is None else whole - n for n in prompt]
        answers = (
            [_within(n, limits["max_completion_length"], room) for n, room in zip(side, rooms, strict=True)]
            for side in (self.chosen, self.rejected)
        )
        return Lengths(prompt, *answers)


class Segment(NamedTuple):
    """A stretch of text as the models see it."""

    text: str
    kind: str  # 'text', 'special' (one special token) or 'cut' (what a limit took away)


@dataclass(frozen=True)
class SeenPair:
    """One pair as the models see it."""

    row: int
    prompt: list[Segment]
    chosen: list[Segment]
    rejected: list[Segment]


@dataclass(frozen=True)
class DataPage:
    """All that the page shows, in reading order."""

    title: str
    lede: str
    warnings: Sequence[str]
    counts: Table
    facts: Sequence[tuple[str, str]]
    charts: Sequence[Picture]
    scripts: Table
    rankers: Forest
    ranker_sentence: str
    pairs: Sequence[SeenPair]


def data_page(
    fetched: Mapping[str, Any],
    tokenized: Mapping[str, Any],
    profile: Mapping[str, Any],
    rankers: Mapping[str, Interval],
    ranker_sentence: str,
    lengths: Lengths,
    limits: Mapping[str, int | None],
    pairs: Sequence[SeenPair],
) -> DataPage:
    """The page from the metrics of fetch_pairs and tokenize_pairs and from what inspect_pairs found.

    Args:
        profile: metrics.json of inspect_pairs.
        rankers: share of pairs that each feature ranks right, the most telling first.
        limits: max_prompt_length, max_completion_length and max_length of tokenize_pairs.
    """
    splits = (("train", "to train on"), ("heldout", "held out"), ("judge", "for the judge"))
    counts = ", ".join(f"{tokenized[f'{split}_pairs']:,} {what}" for split, what in splits)
    looked_at = "" if profile["looked_at"] == profile["pairs"] else (
        f" Lengths, scripts and rankers are of {profile['looked_at']:,} of them, drawn at random."
    )  # fmt: skip
    return DataPage(
        title="The pairs, before training",
        lede=f"{profile['pairs']:,} preference pairs of {fetched['source']}: {counts}.{looked_at}",
        warnings=warnings(fetched, tokenized, profile, rankers, ranker_sentence),
        counts=count_table(fetched, tokenized),
        facts=facts(fetched, profile, lengths.cut(limits)),
        charts=length_charts(lengths, limits),
        scripts=Table(
            ["Script of the chosen answer", "Pairs"], [[k, f"{n:,}"] for k, n in profile["scripts"].items()]
        ),
        rankers=Forest(
            "What one feature says",
            "Share of pairs whose chosen answer has more of it, ties half; 0.5 is guessing. No training: this is what "
            "a model can learn at no cost, and what PPO can chase.",
            [Estimate(RANKER_LABELS[name], share, kind="baseline") for name, share in rankers.items()],
            Scale(0, 1, reference=0.5),
        ),
        ranker_sentence=ranker_sentence,
        pairs=pairs,
    )


def warnings(
    fetched: Mapping[str, Any],
    tokenized: Mapping[str, Any],
    profile: Mapping[str, Any],
    rankers: Mapping[str, Interval],
    ranker_sentence: str,
) -> list[str]:
    """What stands out, a sentence each."""
    found = []
    share = next(iter(rankers.values()))
    if share.low is not None and share.high is not None and (share.low >= TELLING or share.high <= 1 - TELLING):
        found.append(ranker_sentence)
    dropped = sum(fetched["dropped"].values())
    if dropped > MANY * fetched["read"]:
        found.append(
            f"{dropped:,} of {fetched['read']:,} rows ({percentages(dropped / fetched['read'])}) were dropped."
        )
    for name, count in fetched["suspicious"].items():
        if count:
            found.append(f"{count:,} pairs {SUSPICIONS[name]}.")
    cut = cut_warnings(tokenized["cut_of_pairs"], profile["pairs"], {"prompts": MANY, "answers": MANY})
    found += [f"{sentence}." for sentence in cut]
    scripts = [name for name in profile["scripts"] if name != NO_LETTERS]
    if len(scripts) > 1:
        found.append(f"The answers are in several scripts: {', '.join(scripts)}.")
    return found


def count_table(fetched: Mapping[str, Any], tokenized: Mapping[str, Any]) -> Table:
    """Rows read, dropped by reason, and kept."""
    rows = [["Rows read", f"{fetched['read']:,}"]]
    rows += [[f"Dropped: {_reason(name)}", f"{n:,}"] for name, n in fetched["dropped"].items()]
    rows.append(["Pairs left", f"{fetched['kept']:,}"])
    rows += [[f"Then left out, {OTHERS}: {_reason(name)}", f"{n:,}"] for name, n in tokenized["dropped"].items()]
    rows += [[f"Texts cut to {name}, {OTHERS}", f"{n:,}"] for name, n in tokenized["cut"].items() if n]
    return Table(["Rows, pairs, texts", "Number"], rows)


def facts(fetched: Mapping[str, Any], profile: Mapping[str, Any], lengths: Lengths) -> list[tuple[str, str]]:
    """Where the pairs come from, turns, prompts, lengths once cut."""
    repeated = profile["repeated"]
    turns = ", ".join(
        f"{turns} message{'' if turns == '1' else 's'} in {count:,}" for turns, count in fetched["turns"].items()
    )
    several = repeated["with_several_pairs"]
    more = (
        f"; {several:,} have several pairs, one of them {repeated['most_pairs']:,}" if several else ", a pair each"
    )
    found = [
        ("Source", str(fetched["source"])),
        ("Revision", str(fetched["revision"] or f"sha256:{fetched['sha256'][:12]}…")),
        ("Licence", data_license(fetched["license"], fetched["sha256"]) or "not stated"),
        ("Not read", unread(fetched["unread"])),
        ("Prompts have", f"{turns} pairs"),
        ("Different prompts", f"{repeated['prompts']:,}{more}"),
    ]
    for part, sizes in lengths._asdict().items():
        mean = sum(sizes) / len(sizes)
        found.append((f"Tokens, {part}", f"{mean:.0f} on average, {max(sizes):,} at most, after the cut"))
    return found


def unread(counts: Mapping[str, Mapping[str, int]]) -> str:
    """The columns, and the keys inside messages, that are left unread, with the number of rows that have them."""
    parts = []
    for what, names in (("columns", counts["columns"]), ("keys inside messages", counts["message_keys"])):
        if names:
            parts.append(f"{what}: " + ", ".join(f"{name} ({count:,} rows)" for name, count in names.items()))
    return "; ".join(parts) or "nothing: every column is used"


def length_charts(lengths: Lengths, limits: Mapping[str, int | None]) -> list[Picture]:
    """Distributions of lengths before the cut, each with the limit that cuts it."""
    whole = {
        side: [p + a for p, a in zip(lengths.prompt, answers, strict=True)]
        for side, answers in (("chosen", lengths.chosen), ("rejected", lengths.rejected))
    }
    answers = {"chosen": lengths.chosen, "rejected": lengths.rejected}
    return [
        _chart("Prompts", {"prompt": lengths.prompt}, "max_prompt_length", limits, "keeps its end"),
        _chart("Answers", answers, "max_completion_length", limits, "keeps its beginning"),
        _chart("Prompt and answer", whole, "max_length", limits, "loses the answer's end"),
    ]


def _chart(
    title: str, values: dict[str, list[int]], key: str, limits: Mapping[str, int | None], what: str
) -> Picture:
    limit = limits[key]
    if limit is None:
        caption = f"{key} is null: only max_length cuts them."
    else:
        beyond = [n for each in values.values() for n in each if n > limit]
        caption = f"{key} is {limit:,}: what is longer {what} ({len(beyond):,} here)."
    return histograms(title, caption, values, limit, "tokens, before the cut")


def segments(
    ids: Sequence[int], whole: Sequence[int], special: Set[int], decode: Callable[[list[int]], str]
) -> list[Segment]:
    """A text as the models see it: special tokens apart from the others, and a mark where a limit cut it.

    Args:
        ids: what is left of `whole`, its beginning or its end.
    """
    found, run = [], []
    for token in ids:
        if token in special:
            found += [Segment(decode(run), "text")] if run else []
            found.append(Segment(decode([token]), "special"))
            run = []
        else:
            run.append(token)
    found += [Segment(decode(run), "text")] if run else []
    if missing := len(whole) - len(ids):
        mark = Segment(f"{missing:,} tokens cut", "cut")
        found = [*found, mark] if list(ids) == list(whole[: len(ids)]) else [mark, *found]
    return found


def _within(size: int, *limits: int | None) -> int:
    return min(size, *(limit for limit in limits if limit is not None))


def _reason(name: str) -> str:
    return REASONS.get(name, name.replace("_", " "))
