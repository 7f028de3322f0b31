"""Render the three model repositories (weights, tokenizer, model card) and, with push, upload them.

Reads   models/{dpo,reward,ppo}, data/pairs/heldout.parquet, params.yaml, dvc.lock
        reports of the stages before              the numbers and pictures on the cards
Writes  models/hub/<name>-{dpo,reward-model,ppo}  exactly what is uploaded
        reports/publish_hub/receipt.json          hashes; after a push also commits and the collection
        reports/publish_hub/run.json              seconds, memory, versions

Run     dvc repro publish_hub                     (untracked: python -m stages.publish_hub)
        dvc exp run -S publish_hub.push=true      upload; HF_TOKEN or `hf auth login` says as whom
        python -m stages.check_hub                download what was uploaded and compare

The cards hold only what a second run would repeat: measurements, parameters, checksums. What differs from run to
run without cause (seconds, machine, Git revision) is in run.md beside each card, made from the run.json files;
.dvcignore keeps it out of the hash of models/hub, but it is uploaded with the rest. The usage snippet names the
owner of the repository. Unless publish_hub.owner does, only a token tells who that is, so cards rendered without
push have a placeholder there.

Prompts, answers and pairs of data that not everyone may read (a file of one's own; a private or gated set on the Hub)
are left out of a public repository, unless publish_hub.show_private_texts.
"""

from pathlib import Path
from typing import Any, Self

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from pydantic import model_validator

from stages.lib.hub.card_facts import Adapter, read_answers, read_example, read_hashes, read_runs
from stages.lib.hub.cards import LANGUAGE, LICENSES, PICTURES, SUFFIXES, Facts, Kind, render_card, render_run
from stages.lib.hub.folder import ADAPTER, replaced_folder, size_of, take, take_adapter, take_model
from stages.lib.hub.upload import Account, connect, publish_collection, publish_repository, require_own
from stages.lib.report.files import ReportFiles
from stages.lib.run.artefacts import read_json, sha256_of_file, write_json
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, Section, read_params
from stages.lib.run.stage import run_stage

STAGES = ("fetch_base", "fetch_pairs", "corrupt_answers", "tokenize_pairs", "reference_logps", "train_dpo")
STAGES += ("train_reward", "train_judge", "train_ppo", "sample_responses", "score_responses", "analyze_logps")
RUN = "run.md"  # in every repository, which tells ours from others
UNKNOWN_OWNER = "your-name"
NUM_EXAMPLES = 4  # prompts shown on a card
NOTES: dict[Kind, str] = {
    "dpo": "The policy after Direct Preference Optimization",
    "reward": "The reward model that PPO was trained against",
    "ppo": "The policy after Proximal Policy Optimization",
}
ABOUT = "One base model aligned by DPO and by PPO on the same preference pairs, with PPO's reward model."


class Params(Section):
    name: str  # repositories <owner>/<name>-dpo, -reward-model, -ppo
    owner: str | None  # user or organisation; null: the token's user
    push: bool  # upload, or only render
    replace_others: bool  # also repositories that were not published from here
    adapter_only: bool  # of the policies the adapter alone, for the base on the Hub
    license: str  # an identifier of the Hub's list
    language: str  # ISO 639
    private: dict[str, bool]  # by dpo, reward, ppo
    show_private_texts: bool  # texts of data that is not public also on a public repository's card

    @model_validator(mode="after")
    def _check(self) -> Self:
        for suffix in SUFFIXES.values():
            try:
                validate_repo_id(f"{self.owner or UNKNOWN_OWNER}/{self.name}-{suffix}")
            except HFValidationError as error:
                raise ValueError(f"name or owner is not what the Hub accepts: {error}") from None
        if self.license not in LICENSES:
            raise ValueError(f"license '{self.license}' is not on the Hub's list; apache-2.0 is")
        if not LANGUAGE.fullmatch(self.language):
            raise ValueError(f"language '{self.language}' is no code such as en")
        if set(self.private) != set(SUFFIXES):
            raise ValueError(f"private needs exactly the keys {', '.join(SUFFIXES)}")
        return self


def main(base: Base, params: Params, root: Path = Path(".")) -> dict[str, Any]:
    account = connect() if params.push else None
    owner = params.owner or (account.user if account else UNKNOWN_OWNER)
    if account and owner not in account.namespaces:
        names = ", ".join(sorted(account.namespaces))
        raise UserError(f"params.yaml: publish_hub.owner is {owner}, but the token may act only for {names}")

    facts = read_facts(root, params, owner, base.seed)
    folders: dict[Kind, Path] = {
        kind: root / f"models/hub/{params.name}-{suffix}" for kind, suffix in SUFFIXES.items()
    }
    size = sum(size_of(root / f"models/{kind}") for kind in SUFFIXES)
    with replaced_folder(root / "models/hub", size) as partial:
        for kind, folder in folders.items():
            render_repository(root, kind, facts, partial / folder.name)
            if facts.hides_texts(kind):
                print(
                    f"{folder.name} is public and the data is not: its prompts and answers are left out "
                    "(publish_hub.show_private_texts)"
                )
    print(f"wrote models/hub: {', '.join(folder.name for folder in folders.values())}")

    receipt = receipt_of(folders, params)
    if account:
        receipt |= push(account, folders, facts, params.replace_others)
    write_json(root / "reports/publish_hub/receipt.json", receipt)
    print("wrote reports/publish_hub/receipt.json" + ("" if account else ": nothing is uploaded (push: false)"))
    return {}


def read_facts(root: Path, params: Params, owner: str, seed: int) -> Facts:
    reports = ReportFiles(root)
    return Facts(
        owner=owner,
        name=params.name,
        license=params.license,
        language=params.language,
        private=params.private,
        show_private_texts=params.show_private_texts,
        adapters={kind: published_adapter(root, kind, params.adapter_only) for kind in SUFFIXES},
        seed=seed,
        params=read_params(root),
        reports=reports,
        samples=read_answers(root, reports, NUM_EXAMPLES),
        example=read_example(root, reports),
        hashes=read_hashes(root),
    )


def published_adapter(root: Path, kind: Kind, alone: bool) -> Adapter | None:
    """What a model's repository holds of its adapter: nothing where the model has none.

    Raises:
        UserError: it shall stand alone, and does not exist.
    """
    path = root / f"models/{kind}/{ADAPTER}/adapter_config.json"
    alone = alone and kind != "reward"
    if not path.is_file():
        if alone:
            raise UserError(
                f"params.yaml: publish_hub.adapter_only is true, and models/{kind} has no adapter: set lora.rank, or "
                "adapter_only to false"
            )
        return None
    return Adapter(base=read_json(path)["base_model_name_or_path"], alone=alone)


def render_repository(root: Path, kind: Kind, facts: Facts, folder: Path) -> None:
    """Weights, tokenizer, numbers and pictures of one model, and the card last.

    Raises:
        UserError: the adapter shall stand alone, and the weights that it was trained on are not on the Hub.
    """
    adapter = facts.adapters[kind]
    if adapter and adapter.alone:
        if adapter.base != "models/base" or "revision" not in facts.base_of(adapter):
            raise UserError(
                f"params.yaml: publish_hub.adapter_only is true, and the adapter of models/{kind} was trained on "
                f"{adapter.base}, whose weights are not on the Hub; set it to false, or train on a fetch_base.hub_id"
            )
        take_adapter(root / f"models/{kind}", folder)
    else:
        take_model(root / f"models/{kind}", folder)
    if adapter and facts.base_of(adapter):  # trained here, it names a folder of this machine
        path = folder / ("" if adapter.alone else ADAPTER) / "adapter_config.json"
        write_json(path, read_json(path) | facts.base_of(adapter))
    take(root / f"reports/train_{kind}/metrics.json", folder / "metrics.json")
    if kind != "reward":
        take(root / "reports/score_responses/scorecard.csv", folder / "scorecard.csv")
    for picture in PICTURES[kind]:
        take(root / picture.source, folder / "pictures" / picture.file)
    if kind == "reward" and not facts.hides_texts(kind):
        write_json(folder / "example.json", facts.example)
    run = render_run(read_runs(facts.reports, STAGES))
    (folder / RUN).write_text(run, encoding="utf-8", newline="\n")
    card = render_card(kind, facts, sha256_of_file(folder / facts.weights_file(kind)))
    (folder / "README.md").write_text(card, encoding="utf-8", newline="\n")


def receipt_of(folders: dict[Kind, Path], params: Params) -> dict[str, Any]:
    """What was rendered. Nothing in it changes unless a file or a parameter does, so run.md is left out."""
    repositories = {}
    for kind, folder in folders.items():
        files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != RUN)
        hashes = {file.relative_to(folder).as_posix(): sha256_of_file(file) for file in files}
        repositories[folder.name] = {"model": f"models/{kind}", "private": params.private[kind], "sha256": hashes}
    return {"pushed": False, "owner": None, "repositories": repositories, "commits": {}, "collection": None}


def push(account: Account, folders: dict[Kind, Path], facts: Facts, replace: bool) -> dict[str, Any]:
    """Uploads what differs, one repository after the other, then the collection; returns the receipt's news.

    A repository that was not published from here is left as it is, and ends the run, unless `replace`.
    """
    commits, notes = {}, {}
    for kind, folder in folders.items():
        repo_id = facts.repository(kind)
        if not replace:
            require_own(account.api, repo_id, RUN)
        message = f"Publish {folder.name}"
        commits[folder.name] = publish_repository(
            account.api, repo_id, folder, facts.private[kind], message, facts.hides_texts(kind)
        )
        notes[repo_id] = NOTES[kind]
        print(f"published {repo_id} at commit {commits[folder.name]}")
    private = all(facts.private.values())  # a private model in a public collection stays hidden from others
    slug = publish_collection(account.api, facts.owner, facts.name, ABOUT, private, notes)
    print(f"published the collection {slug}")
    return {"pushed": True, "owner": facts.owner, "commits": commits, "collection": slug}


if __name__ == "__main__":
    run_stage("publish_hub", main, Params)
