"""Uploads through the real client, over HTTP, to the hub of hub_server.py, which fails when told to."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.support.hub_server import OTHER_TOKEN, READ_TOKEN, TOKEN, Fault, HubServer

CARD = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n# A model\n"

# publishes the folders given as JSON in argv[1]; waits are noted instead of waited
DRIVER = """
import json, sys, time
from pathlib import Path
from stages.lib.hub import upload as hub
from stages.lib.run.errors import UserError

waited, sleep = [], time.sleep
time.sleep = lambda seconds: (waited.append(seconds), sleep(0.01))
hub.TIMEOUT = 0.6
job = json.loads(sys.argv[1])
result = {}
try:
    account = hub.connect()
    result["user"], result["namespaces"] = account.user, sorted(account.namespaces)
    for repo_id, folder in job["repositories"].items():
        result[repo_id] = hub.publish_repository(
            account.api, repo_id, Path(folder), job["private"], "Publish", job["hides_texts"]
        )
    notes = {repo_id: "a note" for repo_id in job["repositories"]}
    result["collection"] = hub.publish_collection(
        account.api, "tester", job["title"], job["description"], job["private"], notes
    )
except UserError as error:
    result["error"] = str(error)
result["waited"] = waited
print("RESULT" + json.dumps(result))
"""


@dataclass
class Published:
    result: dict
    text: str  # all that was printed, the result aside

    @property
    def error(self) -> str:
        return self.result["error"]


@pytest.fixture
def hub(tmp_path):
    with HubServer(tmp_path / "hub") as server:
        yield server
    # whatever a test did, no token was ever sent in an address
    assert not any("hf_" in path for _, path, _ in server.requests)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A repository's files: a card, a text file in a folder, and a large binary file."""
    folder = tmp_path / "model"
    (folder / "pictures").mkdir(parents=True)
    (folder / "README.md").write_text(CARD)
    (folder / "config.json").write_text("{}\n")
    (folder / "pictures/loss.png").write_bytes(b"\x89PNG\0" + os.urandom(500))
    (folder / "model.safetensors").write_bytes(os.urandom(2_000_000))
    return folder


def publish(
    hub: HubServer, *folders: Path, token: str | None = TOKEN, env: dict | None = None, **job
) -> Published:
    job = {"private": True, "hides_texts": False, "title": "course", "description": "two models"} | job
    job["repositories"] = {f"tester/course-{folder.name}": str(folder) for folder in folders}
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(job)],
        env=clean | hub.env(token) | (env or {}),
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    text, _, result = done.stdout.partition("RESULT")
    published = Published(json.loads(result), text + done.stderr)
    for secret in (TOKEN, READ_TOKEN, OTHER_TOKEN, "X-Signature"):
        assert secret not in published.text
        assert secret not in result
    return published


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_the_repository_holds_exactly_the_folder_after_one_commit(hub, folder):
    published = publish(hub, folder)
    repository = hub.repositories["tester/course-model"]
    tree = hub.tree(repository.id)
    assert tree.pop(".gitattributes")
    assert tree == files_of(folder)
    assert repository.private
    assert [commit.title for commit in repository.commits] == ["initial commit", "Publish"]
    assert published.result["tester/course-model"] == repository.head.oid
    assert published.result["namespaces"] == ["lab", "tester"]
    assert repository.head.files["model.safetensors"].sha256  # large files went by large-file storage
    (collection,) = hub.collections.values()
    assert collection["slug"] == published.result["collection"]
    assert [item["id"] for item in collection["items"]] == ["tester/course-model"]
    assert (collection["title"], collection["description"], collection["private"]) == (
        "course",
        "two models",
        True,
    )


def test_an_unchanged_folder_sends_nothing_the_second_time(hub, folder):
    first = publish(hub, folder)
    hub.requests.clear()
    second = publish(hub, folder)
    assert second.result == first.result
    assert len(hub.repositories["tester/course-model"].commits) == 2
    assert {method for method, path, _ in hub.requests if "collections" not in path} == {"GET"}
    assert [status for method, _, status in hub.requests if method == "POST"] == [409]  # the collection exists
    assert len(hub.collections) == 1


def test_only_what_changed_is_sent_and_what_is_gone_is_removed(hub, folder):
    publish(hub, folder)
    hub.requests.clear()
    (folder / "README.md").write_text(CARD + "More.\n")
    (folder / "pictures/loss.png").unlink()
    publish(hub, folder)
    tree = hub.tree("tester/course-model")
    assert tree.pop(".gitattributes")
    assert tree == files_of(folder)
    assert len(hub.repositories["tester/course-model"].commits) == 3
    assert not hub.sent("PUT", "/lfs/")


def test_visibility_and_collection_follow_a_change(hub, folder):
    publish(hub, folder)
    publish(hub, folder, private=False, description="three models")
    assert hub.repositories["tester/course-model"].private is False
    (collection,) = hub.collections.values()
    assert (collection["private"], collection["description"]) == (False, "three models")
    assert len(collection["items"]) == 1


def test_a_private_repository_becomes_public_only_after_the_new_commit(hub, folder):
    publish(hub, folder)
    repository = hub.repositories["tester/course-model"]
    (folder / "README.md").write_text(CARD + "More.\n")
    hub.faults.append(Fault("POST", "/commit/", status=403))
    assert "committing to tester/course-model" in publish(hub, folder, private=False).error
    assert repository.private
    assert "error" not in publish(hub, folder, private=False).result
    assert not repository.private and len(repository.commits) == 3  # with no texts to hide the history stays


def test_no_older_commit_is_left_where_texts_are_hidden_and_the_repository_becomes_public(hub, folder):
    (folder / "README.md").write_text(CARD + "A private prompt.\n")
    publish(hub, folder)
    repository = hub.repositories["tester/course-model"]
    (folder / "README.md").write_text(CARD)
    hub.faults.append(Fault("POST", "/super-squash/", status=403))
    published = publish(hub, folder, private=False, hides_texts=True)
    assert "removing the older commits of tester/course-model: the Hub answered 403" in published.error
    assert repository.private
    published = publish(hub, folder, private=False, hides_texts=True)
    assert published.result["tester/course-model"] == repository.head.oid
    assert [commit.title for commit in repository.commits] == ["Publish"] and not repository.private
    tree = hub.tree(repository.id)
    assert tree.pop(".gitattributes")
    assert tree == files_of(folder)
    hub.requests.clear()
    publish(hub, folder, private=False, hides_texts=True)
    assert not hub.sent("POST", "/super-squash/")  # a public one keeps what comes later


def test_passing_faults_of_every_call_are_ridden_out_in_one_run(hub, folder):
    calls = [
        ("GET", "/api/whoami"),
        ("GET", "/api/models/"),
        ("POST", "/api/repos/create"),
        ("POST", "/api/validate-yaml"),
        ("POST", "/preupload/"),
        ("POST", "/objects/batch"),
        ("PUT", "/lfs/"),
        ("POST", "/lfs/verify"),
        ("POST", "/commit/"),
        ("POST", "/api/collections$"),
        ("POST", "/items$"),
    ]
    for method, path in calls:
        hub.faults += [Fault(method, path, status=503), Fault(method, path, drop="before")]
    published = publish(hub, folder)
    assert "error" not in published.result
    assert not any(fault.times for fault in hub.faults)
    assert len(hub.repositories["tester/course-model"].commits) == 2
    assert [len(collection["items"]) for collection in hub.collections.values()] == [1]
    assert "committing to tester/course-model: status 503; trying again in" in published.text


def test_answers_lost_after_the_work_was_done_make_no_duplicates(hub, folder):
    for method, path in (
        ("POST", "/api/repos/create"),
        ("POST", "/commit/"),
        ("POST", "/api/collections$"),
        ("POST", "/items$"),
    ):
        hub.faults.append(Fault(method, path, drop="after"))
    published = publish(hub, folder)
    repository = hub.repositories["tester/course-model"]
    assert [commit.title for commit in repository.commits] == ["initial commit", "Publish"]
    assert published.result["tester/course-model"] == repository.head.oid
    assert [len(collection["items"]) for collection in hub.collections.values()] == [1]


def test_a_gateway_page_in_place_of_an_answer_is_a_passing_fault(hub, folder):
    original = hub.httpd.RequestHandlerClass.validate_yaml
    pages = [b"<html>Bad gateway</html>"]

    def sometimes(handler):
        if pages:
            handler.body()
            return handler.answer(pages.pop(), 502, {"Content-Type": "text/html"})
        return original(handler)

    hub.httpd.RequestHandlerClass.validate_yaml = sometimes
    assert "error" not in publish(hub, folder).result


def test_too_many_requests_waits_as_long_as_the_hub_asks(hub, folder):
    hub.faults.append(Fault("POST", "/api/repos/create", status=429, headers={"Retry-After": "7"}))
    hub.faults.append(Fault("POST", "/commit/", status=429, headers={"RateLimit": '"api";r=0;t=55'}))
    published = publish(hub, folder)
    assert "error" not in published.result
    assert {7.0, 55.0} <= set(published.result["waited"])


def test_too_many_requests_for_too_long_says_so(hub, folder):
    hub.faults.append(Fault("POST", "/commit/", status=429, headers={"Retry-After": "3600"}))
    published = publish(hub, folder)
    assert re.search("committing .* answered 429: planned fault; too many requests: wait a while", published.error)
    assert "error" not in publish(hub, folder).result


@pytest.mark.parametrize("status", [500, 502, 504])
def test_a_hub_in_trouble_ends_with_a_message_and_the_next_run_completes(hub, folder, status):
    hub.faults.append(Fault("POST", "/commit/", times=6, status=status))
    published = publish(hub, folder)
    assert f"committing to tester/course-model: the Hub answered {status}" in published.error
    assert "run again later" in published.error
    hub.requests.clear()
    assert "error" not in publish(hub, folder).result
    assert not hub.sent("PUT", "/lfs/")  # the weights had arrived the first time
    assert len(hub.repositories["tester/course-model"].commits) == 2


def test_a_connection_cut_in_mid_upload_is_resumed(hub, folder):
    hub.faults.append(Fault("PUT", "/lfs/", drop="body"))
    published = publish(hub, folder)
    assert "error" not in published.result
    assert len(hub.repositories["tester/course-model"].commits) == 2


def test_a_connection_cut_again_and_again_ends_with_a_message_and_the_next_run_completes(hub, folder):
    (folder / "pictures/loss.png").unlink()  # one large file: one transfer, six tries
    hub.faults.append(Fault("PUT", "/lfs/", times=6, drop="body"))
    published = publish(hub, folder)
    assert "Error while uploading 'model.safetensors' to the Hub" in published.error
    assert "check the network and run again" in published.error
    assert [commit.title for commit in hub.repositories["tester/course-model"].commits] == ["initial commit"]
    assert "error" not in publish(hub, folder).result
    tree = hub.tree("tester/course-model")
    assert tree["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_a_hub_that_never_answers_does_not_hang_the_run(hub, folder):
    hub.faults.append(Fault("GET", "/api/whoami", times=6, delay=30, drop="before"))
    published = publish(hub, folder)
    assert "asking the Hub whose token this is: the Hub did not answer (ReadTimeout)" in published.error


def test_no_hub_at_all(hub, folder):
    hub.httpd.server_close()
    published = publish(hub, folder, env={"HF_ENDPOINT": "http://127.0.0.1:9"})
    assert "did not answer (ConnectError); check the network and run again" in published.error


def test_no_token(hub, folder):
    published = publish(hub, folder, token=None)
    assert published.error.startswith("publish_hub.push is true, but there is no token: set HF_TOKEN")
    assert not hub.requests


def test_a_stored_login_serves_as_token(hub, folder, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text(TOKEN)
    assert publish(hub, folder, token=None, env={"HF_HOME": str(home)}).result["user"] == "tester"


def test_a_wrong_token(hub, folder):
    published = publish(hub, folder, token="hf_wrong")
    assert "the Hub answered 401; the token is wrong or has expired: make a new one" in published.error
    assert len(hub.requests) == 1  # not tried again


def test_a_token_that_may_only_read(hub, folder):
    published = publish(hub, folder, token=READ_TOKEN)
    assert published.error == "the token of tester may only read: make one that may write, as HF_TOKEN"


def test_no_right_to_write_in_that_namespace(hub, folder):
    published = publish(hub, folder, token=OTHER_TOKEN)
    assert "creating tester/course-model: the Hub answered 403" in published.error
    assert "give it write rights, or change publish_hub.owner" in published.error


def test_a_name_the_hub_refuses(hub, folder):
    hub.refused_names.add("course-model")
    published = publish(hub, folder)
    assert "Invalid repo name: course-model - this name is not allowed; change publish_hub" in published.error
    assert not hub.repositories


def test_a_card_the_hub_refuses_names_the_reason_and_nothing_is_committed(hub, folder):
    (folder / "README.md").write_text(CARD.replace("mit", "apache"))
    published = publish(hub, folder)
    assert "the Hub refuses the model card: Invalid metadata in README.md" in published.error
    assert "license: 'apache' is not on the Hub's list" in published.error
    assert len(hub.repositories["tester/course-model"].commits) == 1


def test_somebody_elses_commit_in_between_is_not_overwritten_blindly(hub, folder):
    """Between our look and our commit another one lands: ours is made again on top of it."""
    publish(hub, folder)
    (folder / "config.json").write_text('{"a": 1}\n')
    repository = hub.repositories["tester/course-model"]

    def intrude():
        files = dict(repository.head.files)
        files["notes.txt"] = files["config.json"]
        repository.commits.append(type(repository.head)(hub.new_oid(), "by hand", files))

    hub.faults.append(Fault("POST", "/preupload/", action=intrude))
    assert "error" not in publish(hub, folder).result
    assert [commit.title for commit in repository.commits][2:] == ["by hand", "Publish"]
    assert "notes.txt" not in repository.head.files


def test_offline_mode_is_named(hub, folder):
    assert publish(hub, folder, env={"HF_HUB_OFFLINE": "1"}).error == "HF_HUB_OFFLINE is set: unset it to publish"


def test_several_repositories_one_after_the_other(hub, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "README.md").write_text(CARD)
    hub.faults.append(Fault("POST", "/api/models/tester/course-other/commit", times=6, status=500))
    assert "course-other" in publish(hub, folder, other).error
    assert not hub.collections  # nothing is announced before all is there
    assert "error" not in publish(hub, folder, other).result
    assert [len(repository.commits) for repository in hub.repositories.values()] == [2, 2]
