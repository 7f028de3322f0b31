"""fetch_base and fetch_pairs against a read-only Hub on 127.0.0.1, each in a process of its own."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import HfApi

from stages.lib.data import hub_source
from stages.lib.data.hub_source import file_license
from stages.lib.run.artefacts import read_json, read_parquet
from tests.conftest import REPO

CASES = Path(__file__).parent / "cases"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
CARD = "---\nlicense: {}\n---\nText.\n"


class Hub(BaseHTTPRequestHandler):
    """Serves folder/models/OWNER/NAME and folder/datasets/OWNER/NAME, at one commit that 'main' stands for."""

    folder: Path
    requests: list[str]
    private, gated = False, False

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer()

    def answer(self, body=True):
        path = unquote(urlsplit(self.path).path)
        self.requests.append(f"{self.command} {path}")
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/(revision|tree)/([^/]+)(/.*)?", path):
            kind, repo, what, revision, _ = found.groups()
            files = self.files(kind, repo, revision)
            if files is None:
                return self.send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            if what == "revision":
                listing = [{"rfilename": name} for name in files]
                answer = {"id": repo, "_id": "1", "sha": COMMIT, "siblings": listing, "tags": []}
                answer |= {"private": self.private, "gated": self.gated}
            else:
                answer = [self.entry(name, file) for name, file in files.items()]
            return self.send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"}, body)
        if found := re.fullmatch(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, repo, revision, name = found.groups()
            file = (self.files(kind or "models", repo, revision) or {}).get(name)
            if file is not None:
                headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.entry(name, file)["oid"]}"'}
                return self.send(200, file.read_bytes(), headers, body)
        return self.send(404, b"{}", {"X-Error-Code": "EntryNotFound"}, body)

    def files(self, kind, repo, revision):
        folder = self.folder / kind / repo
        if revision not in ("main", COMMIT) or not folder.is_dir():
            return None
        return {path.name: path for path in sorted(folder.iterdir())}

    def entry(self, name, file):
        content = file.read_bytes()
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def send(self, status, content, headers, body=True):
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path):
    """A running Hub: its class, and the environment that points a process at it."""
    handler = type("Bound", (Hub,), {"folder": tmp_path / "hub", "requests": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    env = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HOME": str(tmp_path / "hf_home")}
    handler.env = env | {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(REPO)}
    yield handler
    server.shutdown()
    server.server_close()


def run_stage(root, hub, stage, **params):
    """The stage script as DVC runs it, with these entries of its params section changed."""
    text = (REPO / "params.yaml").read_text(encoding="utf-8")
    head, section = text.split(f"\n{stage}:\n", 1)
    for key, value in params.items():
        section = re.sub(rf"^  {key}: .*$", f"  {key}: {value}", section, count=1, flags=re.MULTILINE)
    (root / "params.yaml").write_text(f"{head}\n{stage}:\n{section}", encoding="utf-8")
    command = [sys.executable, "-m", f"stages.{stage}"]
    return subprocess.run(command, cwd=root, env=hub.env, capture_output=True, text=True, timeout=120)


def test_a_model_is_downloaded_at_the_commit_a_branch_stands_for(tiny_base, hub):
    published = hub.folder / "models/lab/tiny"
    shutil.copytree(tiny_base / "models/base", published)
    shutil.rmtree(tiny_base / "models/base")
    (published / "README.md").write_text(CARD.format("apache-2.0"))
    (published / "pytorch_model.bin").write_bytes(b"a pickle")
    (published / "modeling_tiny.py").write_text("raise SystemExit('code from the Hub ran')")
    done = run_stage(tiny_base, hub, "fetch_base", hub_id="lab/tiny")
    assert done.returncode == 0, done.stderr
    assert f"revision 'main' is {COMMIT} today and may move" in done.stderr
    metrics = read_json(tiny_base / "reports/fetch_base/metrics.json")
    assert metrics["source"] == "hub" and metrics["hub_id"] == "lab/tiny"
    assert metrics["revision"] == COMMIT and metrics["license"] == "apache-2.0"
    assert not [path for path in hub.requests if path.endswith((".bin", ".py"))]
    assert (tiny_base / "models/base/model.safetensors").exists()


def test_a_data_set_is_downloaded_at_its_commit(tmp_path, hub):
    published = hub.folder / "datasets/lab/pairs"
    published.mkdir(parents=True)
    shutil.copy(REPO / "data/pairs_embedded.jsonl", published / "train.jsonl")
    (published / "README.md").write_text(CARD.format("mit"))
    (tmp_path / "data").mkdir()
    for name in ("unseen_embedded.jsonl", "prompts_embedded.jsonl"):
        shutil.copy(REPO / "data" / name, tmp_path / "data")
    done = run_stage(tmp_path, hub, "fetch_pairs", hub_id="lab/pairs", revision=COMMIT)
    assert done.returncode == 0, done.stderr
    assert "may move" not in done.stderr
    metrics = read_json(tmp_path / "reports/fetch_pairs/metrics.json")
    assert metrics["source"] == "lab/pairs" and metrics["revision"] == COMMIT and metrics["license"] == "mit"
    assert metrics["read"] == metrics["kept"] == 336 and metrics["public"] is True
    rows = [
        row
        for split in ("train", "heldout", "judge")
        for row in read_parquet(tmp_path / f"data/pairs/{split}.parquet")["row"]
    ]
    assert sorted(rows) == list(range(1, 337))


def project(root):
    (root / "data").mkdir()
    for name in ("unseen_embedded.jsonl", "prompts_embedded.jsonl"):
        shutil.copy(REPO / "data" / name, root / "data")


def publish(hub, name, files):
    """A data set on the Hub: a folder of tests/data/cases, or texts by file name."""
    folder = hub.folder / "datasets" / name
    if isinstance(files, dict):
        folder.mkdir(parents=True)
        for file, text in files.items():
            (folder / file).write_text(text)
    else:
        shutil.copytree(files, folder)


def one_line(done, words):
    assert done.returncode == 1 and "Traceback" not in done.stderr
    error = next(line for line in done.stderr.splitlines() if line.startswith("fetch_pairs: error: "))
    assert re.search(words, error), error
    return error


def test_a_configuration_is_named_and_the_error_lists_them(tmp_path, hub):
    project(tmp_path)
    publish(hub, "lab/two", CASES / "hub/two_configs")
    error = one_line(
        run_stage(tmp_path, hub, "fetch_pairs", hub_id="lab/two"), r"configurations \(.*helpful.*harmless"
    )
    assert "fetch_pairs.config" in error and "network" not in error and "token" not in error
    error = one_line(
        run_stage(tmp_path, hub, "fetch_pairs", hub_id="lab/two", config="x"), "no configuration 'x', only"
    )
    done = run_stage(tmp_path, hub, "fetch_pairs", hub_id="lab/two", config="harmless")
    assert done.returncode == 0, done.stderr
    metrics = read_json(tmp_path / "reports/fetch_pairs/metrics.json")
    assert metrics["config"] == "harmless" and metrics["read"] == metrics["kept"] > 3


def test_a_loading_script_is_refused_in_one_line(tmp_path, hub):
    project(tmp_path)
    publish(hub, "lab/scripted", CASES / "hub/scripted")
    error = one_line(run_stage(tmp_path, hub, "fetch_pairs", hub_id="lab/scripted"), "loading script")
    assert "parquet" in error and "network" not in error


def test_shards_whose_columns_differ_have_the_inner_reason(tmp_path, hub):
    project(tmp_path)
    publish(hub, "lab/differing", CASES / "hub/differing_columns")
    error = one_line(run_stage(tmp_path, hub, "fetch_pairs", hub_id="lab/differing"), "source")
    assert "error occurred while generating" not in error and "network" not in error


def test_splits_of_its_own(tmp_path, hub):
    project(tmp_path)
    lines = (REPO / "data/pairs_embedded.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    files = {"a.jsonl": "".join(lines[:60]), "b.jsonl": "".join(lines[55:80])}
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n"
    for split, file in (("train_prefs", "a.jsonl"), ("test_prefs", "b.jsonl")):
        card += f"  - split: {split}\n    path: {file}\n"
    publish(hub, "lab/splits", files | {"README.md": card + "---\n"})
    error = one_line(run_stage(tmp_path, hub, "fetch_pairs", hub_id="lab/splits"), "no split 'train'")
    assert "train_prefs" in error and "fetch_pairs.split" in error
    chosen = dict(hub_id="lab/splits", split="train_prefs", heldout_split="test_prefs", on_bad_row="drop")
    done = run_stage(tmp_path, hub, "fetch_pairs", **chosen)
    assert done.returncode == 0, done.stderr
    metrics = read_json(tmp_path / "reports/fetch_pairs/metrics.json")
    assert metrics["read"] == 85 and metrics["split"] == "train_prefs, test_prefs"
    # five pairs are in both splits: held out are all twenty-five, and the training rows go
    assert metrics["heldout_pairs"] == 25 and metrics["dropped"] == {"prompt_of_heldout_split": 5}
    assert metrics["read"] == metrics["kept"] + sum(metrics["dropped"].values())
    rows = read_parquet(tmp_path / "data/pairs/heldout.parquet")["row"]
    assert min(rows) > 60 and len(rows) == metrics["heldout_pairs"]
    error = one_line(
        run_stage(tmp_path, hub, "fetch_pairs", **chosen | {"heldout_split": "dev"}), "no split 'dev'"
    )
    assert "heldout_split" in error


@pytest.mark.parametrize(
    ("stage", "params", "words"),
    [
        ("fetch_base", {"hub_id": "lab/none"}, "lab/none at revision main: cannot be read from the Hub"),
        ("fetch_pairs", {"hub_id": "not/an/id"}, "not/an/id at revision main: cannot be read from the Hub"),
        ("fetch_pairs", {"hub_id": "lab/none", "revision": "v9"}, "lab/none at revision v9: cannot be read"),
    ],
)
def test_what_the_hub_does_not_have_is_one_clear_line(tmp_path, hub, stage, params, words):
    done = run_stage(tmp_path, hub, stage, **params)
    assert done.returncode == 1
    assert done.stderr.startswith(f"{stage}: error: {words}") and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("private", "gated", "public"),
    [(False, False, True), (True, False, False), (False, "auto", False), (False, "manual", False)],
)
def test_public_is_what_everyone_may_read_without_asking(hub, monkeypatch, private, gated, public):
    publish(hub, "lab/pairs", {"a.jsonl": ""})
    hub.private, hub.gated = private, gated
    monkeypatch.setattr(hub_source, "HfApi", lambda: HfApi(endpoint=hub.env["HF_ENDPOINT"], token=False))
    assert hub_source.is_public("lab/pairs", COMMIT) is public


def test_whether_a_data_set_is_public_is_unknown_where_the_hub_cannot_be_asked(monkeypatch):
    monkeypatch.setattr(hub_source, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9", token=False))
    assert hub_source.is_public("lab/pairs", COMMIT) is None


def test_license_of_a_card(tmp_path):
    card = tmp_path / "README.md"
    for text, expected in [(CARD.format("mit"), "mit"), ("No metadata", None), (CARD.format("[a, b]"), None)]:
        card.write_text(text)
        assert file_license(card) == expected
    card.write_bytes(b"\xff\xfe")
    assert file_license(card) is None
    assert file_license(tmp_path / "none.md") is None
