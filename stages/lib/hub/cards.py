"""Model cards: metadata the Hub accepts, numbers out of the reports, untrusted text made harmless.

Every number is looked up in a report at the moment of rendering; a key that is not there is an error, not a
blank. Whatever a template prints is escaped for Markdown and HTML alike unless it says otherwise, because
prompts, answers and file names come from data and models.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump
from jinja2 import UndefinedError
from markupsafe import Markup

from stages.lib.analysis import wording
from stages.lib.analysis.stats import Interval
from stages.lib.hub.card_facts import SUFFIXES, CardError, Facts, Kind
from stages.lib.report.plots import STAGE_OF
from stages.lib.report.untrusted_text import escape_markdown, without_controls
from stages.lib.run.templates import environment

# the Hub's list (https://huggingface.co/docs/hub/repositories-licenses); 'other' would need a name and a text
LICENSES = frozenset(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research
    lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql
    ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2
    llama3 llama3.1 llama3.2 llama3.3 llama4 gemma unknown""".split()
)
LANGUAGE = re.compile("[a-z]{2,3}")  # ISO 639-1, or 639-3 where a language has no shorter code


@dataclass(frozen=True)
class Picture:
    """A picture of a report, copied beside the card."""

    source: str  # path under the project's root
    title: str
    caption: str  # what to look for

    @property
    def file(self) -> str:
        return Path(self.source).name


def _pictures(**titles: str) -> list[Picture]:
    return [
        Picture(f"reports/{STAGE_OF.get(name, 'analyze_logps')}/{name}.png", title, wording.CAPTIONS[name])
        for name, title in titles.items()
    ]


_RANKERS = "What orders held-out pairs, the models beside one-feature rankers"
_FRONTIER = "Score gained and win rate against distance from the base"
_MOVES = "How far training moved each text"
PICTURES: dict[Kind, list[Picture]] = {
    "dpo": _pictures(
        frontier=_FRONTIER,
        margins="Reward margins over the steps of training",
        rankers=_RANKERS,
        ecdf=_MOVES,
        displacement="Change of the chosen against change of the rejected answer",
    ),
    "reward": _pictures(
        scores="Scores of chosen and rejected answers, and of each model's answers", rankers=_RANKERS
    ),
    "ppo": _pictures(
        frontier=_FRONTIER,
        scores="Scores of chosen and rejected answers, and of each model's answers",
        ecdf=_MOVES,
    ),
}


def render_card(kind: Kind, facts: Facts, weights_sha256: str) -> str:
    """README.md of one repository: YAML block and Markdown.

    Raises:
        CardError: a report lacks what the card quotes.
    """
    block = yaml_dump(metadata(kind, facts), sort_keys=False)
    context = dict(
        kind=kind,
        suffix=SUFFIXES[kind],
        facts=facts,
        repository=facts.repository(kind),
        adapter=facts.adapters[kind],
        pictures=PICTURES[kind],
        weights_file=facts.weights_file(kind),
        weights_sha256=weights_sha256,
        settings=_settings(kind, facts.params),
        samples=facts.shown(kind),
        hides_texts=facts.hides_texts(kind),
    )
    return f"---\n{block}---\n\n" + _render(f"card_{kind}.md.jinja", context)


def render_run(runs: dict[str, dict[str, Any]]) -> str:
    """run.md: machine, versions, Git revision, time and memory of every stage that left a run.json."""
    return _render("card_run.md.jinja", dict(runs=runs))


def metadata(kind: Kind, facts: Facts) -> dict[str, Any]:
    """The YAML block; only what the Hub documents, and only what is known."""
    adapter = facts.adapters[kind]
    alone = adapter is not None and adapter.alone
    data: dict[str, Any] = {
        "license": facts.license,
        "language": facts.language,
        "library_name": "peft" if alone else "transformers",
        "pipeline_tag": "text-classification" if kind == "reward" else "text-generation",
    }
    if facts.base_id:
        data |= {"base_model": facts.base_id, "base_model_relation": "adapter" if alone else "finetune"}
    if facts.data_id:
        data["datasets"] = [facts.data_id]
    data["tags"] = {
        "dpo": ["dpo", "preference-optimization", "alignment"],
        "reward": ["reward-model", "reward-trainer", "trl", "alignment"],
        "ppo": ["ppo", "rlhf", "alignment"],
    }[kind]
    data["metrics"] = ["accuracy"] if kind != "ppo" else ["reward-model-score"]
    data["model-index"] = [{"name": facts.repository(kind).split("/")[1], "results": [_result(kind, facts)]}]
    if kind != "reward":
        data["widget"] = [
            {"messages": [message | {"content": without_controls(message["content"])} for message in sample.chat]}
            | {"output": {"text": without_controls(sample.texts[kind]["greedy"])}}
            for sample in facts.shown(kind)[:3]
            if sample.chat
        ]
    return data


def _result(kind: Kind, facts: Facts) -> dict[str, Any]:
    """The model-index entry: measured on held-out prompts, by ourselves."""
    if kind == "dpo":
        metrics = [
            ("accuracy", "pairs ranked right by the implicit reward", ("heldout", "rewards/accuracies")),
            ("reward-margin", "mean implicit reward margin", ("heldout", "rewards/margins")),
        ]
    elif kind == "reward":
        metrics = [
            ("accuracy", "pairs ranked right by the score", ("heldout", "accuracy")),
            ("score-margin", "mean score of chosen minus rejected", ("heldout", "margin")),
        ]
    else:
        metrics = []
    figures = [(name, text, float(facts.metric(f"train_{kind}", *keys))) for name, text, keys in metrics]
    if kind != "reward":
        figures += [
            (name, text, facts.scored(kind, measure, change).mean)
            for name, text, measure, change in (
                ("win-rate", "share of answers that the judge prefers to the base's", "win_rate", False),
                ("reward-model-score", "mean score of the answers", "score", False),
                ("reward-model-score-gain", "mean gain over the base's answers", "score", True),
                ("kl", "KL to the base, in nats per answer", "kl", False),
            )
        ]
    slug = facts.data_id or re.sub(r"[^\w.-]+", "-", facts.data_name).strip("-") or "pairs"
    task = "text-classification" if kind == "reward" else "text-generation"
    source = "metrics.json" if kind == "reward" else "scorecard.csv"
    return {
        "task": {"type": task, "name": "preference alignment"},
        "dataset": {"type": slug, "name": f"{facts.data_name}, held-out prompts", "split": "heldout"},
        "metrics": [{"type": name, "name": text, "value": value} for name, text, value in figures],
        "source": {
            "name": f"{source} of this repository",
            "url": f"https://huggingface.co/{facts.repository(kind)}/blob/main/{source}",
        },
    }


def _settings(kind: Kind, params: dict[str, Any]) -> Markup:
    """The parameters that made this model, as YAML."""
    stage = f"train_{kind}"
    data = {key: params["fetch_pairs"][key] for key in ("max_pairs", "holdout_fraction")}
    shown = {"fetch_pairs": data, "tokenize_pairs": params["tokenize_pairs"]}
    if params["lora"]["rank"] and (kind != "reward" or params[stage]["backbone"] == "lora"):
        shown["lora"] = params["lora"]
    return Markup(yaml_dump(shown | {stage: params[stage]}, sort_keys=False).strip())


def shorten(text: str, limit: int = 1200) -> str:
    """At most `limit` characters, with a mark where something is missing."""
    return text if len(text) <= limit else text[:limit].rstrip() + " …"


def count(value: int) -> Markup:
    """12,345"""
    return Markup(f"{value:,}")


def millions(value: int) -> Markup:
    return Markup(f"{value / 1e6:.4g} million")


def number(value: float | Interval, digits: int = 2, sign: bool = False) -> Markup:
    """'−1.20', or '−1.20 [−1.31, −1.09]' for an interval that has ends."""
    return Markup(wording.estimate(value, digits, sign))


def percent(value: float | Interval, digits: int = 0) -> Markup:
    """'97 %', or '97 % [85, 100]' for an interval that has ends."""
    return Markup(wording.percent(value, digits))


def times(value: int, one: str, many: str = "") -> Markup:
    """'1 epoch', '8 epochs'; `many` where it is not `one` with an s."""
    return Markup(f"{value:,} {one if value == 1 else many or one + 's'}")


def trusted(text: str) -> Markup:
    """Markdown that our own code generated from numbers."""
    return Markup(text)


def address(value: str) -> Markup:
    """A repository id or file name, for code and links: it may hold nothing that would need escaping."""
    if not re.fullmatch(r"[\w./-]+", value, re.ASCII):
        raise CardError(f"{value!r} cannot stand in an address")
    return Markup(value)


def _finalize(value: Any) -> Markup:
    if value is None:
        raise CardError("a card would print an empty value where a report says null")
    if isinstance(value, int | float):
        return Markup(str(value))
    return value if isinstance(value, Markup) else Markup(escape_markdown(str(value)))


def _render(template: str, context: dict[str, Any]) -> str:
    templates = environment(Path(__file__).parent, finalize=_finalize, keep_trailing_newline=True)
    for function in (address, count, millions, number, percent, shorten, times, trusted):
        templates.filters[function.__name__] = function
    try:
        text = templates.get_template(template).render(context)
    except UndefinedError as error:
        raise CardError(f"{template}: {error}; is params.yaml or a report of an older run?") from error
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
