"""A small Hugging Face Hub on 127.0.0.1 that keeps its own state and fails when told to.

It speaks what huggingface_hub 2.4 sends when it uploads without Xet (so it does to every hub but huggingface.co,
see stages.lib.hub.upload) and what transformers asks for when it downloads: accounts, repositories with commits,
large-file storage, card validation, collections.

    with HubServer(tmp_path) as hub:
        hub.faults.append(Fault("POST", "/commit/", status=503))
        run(..., env=hub.env())

By hand:  python -m tests.support.hub_server FOLDER     (prints the environment to set; Ctrl-C ends it)
"""

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.card_rules import card_errors
from tests.support.loopback import LoopbackHandler, LoopbackServer

TOKEN = "hf_loopbackWriteToken0123456789abcdef"
READ_TOKEN = "hf_loopbackReadToken0123456789abcdefg"
OTHER_TOKEN = "hf_loopbackOtherAccount0123456789abc"
CHUNK = 1 << 20
LFS_SUFFIXES = (".safetensors", ".bin", ".parquet", ".pt", ".onnx", ".gz", ".zip")


@dataclass
class Fault:
    """What goes wrong with the next `times` requests that match; a `drop` is a cut connection."""

    method: str
    path: str  # a regular expression, searched in path and query
    times: int = 1
    status: int | None = None
    message: str = "planned fault"
    headers: dict[str, str] = field(default_factory=dict)
    drop: str | None = (
        None  # 'before' any work, in the middle of the 'body', 'after' the work but before the answer
    )
    delay: float = 0.0  # seconds before anything else
    action: Callable[[], None] | None = None  # called before anything else


@dataclass
class File:
    """A file of one commit: its bytes, or the SHA-256 of an object in large-file storage."""

    size: int
    blob_id: str
    content: bytes | None = None
    sha256: str | None = None


@dataclass
class Commit:
    oid: str
    title: str
    files: dict[str, File]


@dataclass
class Repository:
    id: str
    private: bool
    commits: list[Commit]

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision == "main":
            return self.head
        return next((commit for commit in self.commits if commit.oid == revision), None)


class Refusal(Exception):
    def __init__(self, status: int, message: str, code: str | None = None, **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class HubServer(LoopbackServer):
    """State and life of the server; a context manager."""

    def __init__(self, folder: Path, port: int = 0) -> None:
        super().__init__(type("Bound", (Handler,), {"hub": self}), port)
        self.url = self.address
        self.folder = folder / "lfs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.accounts = {
            TOKEN: {"name": "tester", "role": "write", "orgs": ["lab"]},
            READ_TOKEN: {"name": "tester", "role": "read", "orgs": []},
            OTHER_TOKEN: {"name": "somebody", "role": "write", "orgs": []},
        }
        self.known_models = {"HuggingFaceTB/SmolLM2-135M-Instruct", "HuggingFaceTB/SmolLM-135M-Instruct"}
        self.refused_names: set[str] = set()
        self.repositories: dict[str, Repository] = {}
        self.collections: dict[str, dict[str, Any]] = {}
        self.requests: list[tuple[str, str, int]] = []  # method, path with query, status (0: cut)
        self.counter = itertools.count(1)

    def env(self, token: str | None = TOKEN, home: Path | None = None) -> dict[str, str]:
        """What a client's process needs to talk to this server and to nothing else."""
        env = {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
        env |= {"HF_HOME": str(home or self.folder.parent / "hf_home"), "NO_PROXY": "127.0.0.1,localhost"}
        return env | ({"HF_TOKEN": token} if token else {})

    def sent(self, method: str, pattern: str) -> list[tuple[str, str, int]]:
        """The logged requests of one kind."""
        return [entry for entry in self.requests if entry[0] == method and re.search(pattern, entry[1])]

    def tree(self, repo_id: str) -> dict[str, bytes]:
        """The newest commit's files."""
        files = self.repositories[repo_id].head.files
        return {path: self.read(file) for path, file in files.items()}

    def hold(self, repo_id: str, folder: Path) -> str:
        """Another's public repository with the folder's files, as one more commit; returns it."""
        files = {}
        for file in (file for file in folder.rglob("*") if file.is_file()):
            content = file.read_bytes()
            files[file.relative_to(folder).as_posix()] = File(len(content), git_hash(content), content)
        repository = self.repositories.setdefault(repo_id, Repository(repo_id, False, []))
        repository.commits.append(Commit(self.new_oid(), "Published elsewhere", files))
        return repository.head.oid

    def read(self, file: File) -> bytes:
        return file.content if file.content is not None else (self.folder / file.sha256).read_bytes()

    def new_oid(self) -> str:
        return hashlib.sha1(f"commit {next(self.counter)}".encode()).hexdigest()


class Handler(LoopbackHandler):
    hub: HubServer

    ROUTES = [
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)", "model_info"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/revision/(?P<revision>[^/]+)", "model_info"),
        ("PUT", r"/api/models/(?P<repo>[^/]+/[^/]+)/settings", "settings"),
        ("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", "tree"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/main", "preupload"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/main", "commit"),
        ("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/super-squash/main", "super_squash"),
        ("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put"),
        ("POST", r"/lfs/verify", "lfs_verify"),
        ("GET", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_get"),
        ("POST", r"/api/collections", "create_collection"),
        ("GET", r"/api/collections/(?P<slug>.+)", "get_collection"),
        ("PATCH", r"/api/collections/(?P<slug>.+)", "update_collection"),
        ("POST", r"/api/collections/(?P<slug>.+)/items", "add_item"),
        ("HEAD", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        ("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    ]

    # the frame: faults, routing, answers

    def handle_any(self) -> None:
        hub, method = self.hub, self.command
        self.pending = int(self.headers.get("Content-Length") or 0)
        fault = hub.take_fault(lambda each: each.method == method and re.search(each.path, self.path))
        if fault:
            if fault.action:
                fault.action()
            time.sleep(fault.delay)
            if fault.drop == "body":
                self.rfile.read(self.pending // 2)
            if fault.drop in ("before", "body"):
                return self.cut()
            if fault.status:
                self.drain()
                return self.refuse(Refusal(fault.status, fault.message), fault.headers)
        self.muted = fault is not None and fault.drop == "after"
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        try:
            for route_method, pattern, name in self.ROUTES:
                if method == route_method and (found := re.fullmatch(pattern, url.path)):
                    arguments = {key: value and unquote(value) for key, value in found.groupdict().items()}
                    # creating is a POST to a longer path than the plain one: the first full match is the right one
                    return getattr(self, name)(**arguments)
            raise Refusal(404, f"no such route: {method} {url.path}")
        except Refusal as refusal:
            self.refuse(refusal)
        except (ConnectionError, TimeoutError):
            self.cut()

    do_GET = do_POST = do_PUT = do_PATCH = do_HEAD = do_DELETE = handle_any

    def answer(self, body: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        if self.muted:
            return self.cut()
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.hub.requests.append((self.command, self.path, status))
        self.send(status, raw, headers)

    def refuse(self, refusal: Refusal, headers: dict[str, str] | None = None) -> None:
        self.drain()
        self.muted = False
        headers = {"X-Error-Message": refusal.message, "X-Request-Id": "loopback"} | (headers or {})
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        self.answer({"error": refusal.message} | refusal.body, refusal.status, headers)

    def cut(self) -> None:
        self.hub.requests.append((self.command, self.path, 0))
        super().cut()

    def drain(self) -> None:
        while self.pending > 0 and (chunk := self.rfile.read(min(CHUNK, self.pending))):
            self.pending -= len(chunk)

    def body(self) -> bytes:
        raw, self.pending = self.rfile.read(self.pending), 0
        return raw

    def json(self) -> Any:
        return json.loads(self.body())

    # rights

    def account(self, required: bool = True) -> dict[str, Any] | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        found = self.hub.accounts.get(token)
        if found is None and (required or token):
            raise Refusal(401, "Invalid username or password." if token else "Not logged in")
        return found

    def readable(self, repo: str, revision: str = "main") -> tuple[Repository, Commit]:
        account = self.account(required=False)
        found = self.hub.repositories.get(repo)
        if found is None or (found.private and not (account and self.owns(account, repo))):
            raise Refusal(404 if account else 401, "Repository not found", "RepoNotFound")
        commit = found.at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found, commit

    def writable(self, repo: str) -> Repository:
        account = self.account()
        found, _ = self.readable(repo)
        self.require_write(account, repo.split("/")[0])
        return found

    @staticmethod
    def owns(account: dict[str, Any], repo: str) -> bool:
        return repo.split("/")[0] in (account["name"], *account["orgs"])

    def require_write(self, account: dict[str, Any], namespace: str) -> None:
        if account["role"] != "write" or namespace not in (account["name"], *account["orgs"]):
            raise Refusal(403, f"You don't have the rights to create or write under '{namespace}'")

    # accounts and repositories

    def whoami(self) -> None:
        account = self.account()
        orgs = [{"type": "org", "name": name, "roleInOrg": "admin"} for name in account["orgs"]]
        access = {"displayName": "test", "role": account["role"]}
        auth = {"type": "access_token", "accessToken": access}
        self.answer({"type": "user", "name": account["name"], "orgs": orgs, "auth": auth})

    def create_repository(self) -> None:
        wanted, account = self.json(), self.account()
        namespace = wanted.get("organization") or account["name"]
        repo = f"{namespace}/{wanted['name']}"
        self.require_write(account, namespace)
        if wanted["name"] in self.hub.refused_names:
            raise Refusal(400, f"Invalid repo name: {wanted['name']} - this name is not allowed")
        with self.hub.lock:
            url = f"{self.hub.url}/{repo}"
            if repo in self.hub.repositories:
                raise Refusal(409, "You already created this model repo", url=url)
            first = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            files = {".gitattributes": File(len(first), git_hash(first), first)}
            start = Commit(self.hub.new_oid(), "initial commit", files)
            self.hub.repositories[repo] = Repository(repo, wanted.get("visibility") == "private", [start])
        self.answer({"url": url, "name": repo})

    def model_info(self, repo: str, revision: str = "main") -> None:
        found, commit = self.readable(repo, revision)
        siblings = []
        for path, file in commit.files.items():
            entry: dict[str, Any] = {"rfilename": path}
            if "blobs" in self.query:
                entry |= {"size": file.size, "blobId": file.blob_id}
                if file.sha256:
                    entry["lfs"] = {"sha256": file.sha256, "size": file.size, "pointerSize": 134}
            siblings.append(entry)
        info = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.oid}
        self.answer(
            info | {"private": found.private, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings}
        )

    def settings(self, repo: str) -> None:
        wanted, found = self.json(), self.writable(repo)
        found.private = wanted["visibility"] == "private"
        self.answer({"private": found.private})

    def tree(self, repo: str, revision: str, folder: str | None = None) -> None:
        _, commit = self.readable(repo, revision)
        prefix = f"{folder}/" if folder else ""
        files = {path: file for path, file in commit.files.items() if path.startswith(prefix)}
        if folder and not files:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        entries = []
        for path, file in files.items():
            entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.blob_id}
            if file.sha256:
                entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
            entries.append(entry)
        self.answer(entries)

    # uploads

    def validate_yaml(self) -> None:
        if errors := card_errors(self.json()["content"], self.hub.known_models):
            raise Refusal(400, "Invalid metadata", errors=[{"message": error} for error in errors])
        self.answer({"errors": [], "warnings": []})

    def preupload(self, repo: str) -> None:
        wanted, found = self.json(), self.writable(repo)
        files = []
        for file in wanted["files"]:
            binary = b"\0" in base64.b64decode(file["sample"])
            lfs = binary or file["size"] > 10_000_000 or file["path"].endswith(LFS_SUFFIXES)
            entry = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if old := found.head.files.get(file["path"]):
                entry["oid"] = old.sha256 or old.blob_id
            files.append(entry)
        self.answer({"files": files})

    def lfs_batch(self, repo: str) -> None:
        wanted = self.json()
        self.writable(repo)
        objects = []
        for entry in wanted["objects"]:
            if not (self.hub.folder / entry["oid"]).exists():
                upload = {"href": f"{self.hub.url}/lfs/{entry['oid']}?X-Signature=presigned"}
                entry |= {"actions": {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/verify"}}}
            objects.append(entry)
        self.answer({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        partial = self.hub.folder / f"{oid}.{threading.get_ident()}.partial"
        digest = hashlib.sha256()
        with open(partial, "wb") as file:
            while self.pending > 0:
                chunk = self.rfile.read(min(CHUNK, self.pending))
                if not chunk:
                    raise ConnectionError("the client went away")
                self.pending -= len(chunk)
                digest.update(chunk)
                file.write(chunk)
        if digest.hexdigest() != oid:
            raise Refusal(400, "the content does not have this hash")
        partial.rename(self.hub.folder / oid)
        self.answer(b"")

    def lfs_verify(self) -> None:
        wanted = self.json()
        self.account()
        stored = self.hub.folder / wanted["oid"]
        if not stored.exists() or stored.stat().st_size != wanted["size"]:
            raise Refusal(404, "the object was not uploaded")
        self.answer({})

    def commit(self, repo: str) -> None:
        lines = [json.loads(line) for line in self.body().splitlines()]
        found = self.writable(repo)
        header = lines[0]["value"]
        with self.hub.lock:
            if header.get("parentCommit") not in (None, found.head.oid):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(found.head.files)
            for line in lines[1:]:
                path = line["value"]["path"]
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    if path == "README.md" and (errors := card_errors(content.decode(), self.hub.known_models)):
                        raise Refusal(400, "Invalid metadata", errors=[{"message": error} for error in errors])
                    files[path] = File(len(content), git_hash(content), content)
                elif line["key"] == "lfsFile":
                    oid, size = line["value"]["oid"], line["value"]["size"]
                    if not (self.hub.folder / oid).exists():
                        raise Refusal(400, f"{path}: the large file {oid} was never uploaded")
                    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {size}\n"
                    files[path] = File(size, git_hash(pointer.encode()), sha256=oid)
                elif line["key"] == "deletedFile":
                    if files.pop(path, None) is None:
                        raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            made = Commit(self.hub.new_oid(), header["summary"], files)
            found.commits.append(made)
        url = f"{self.hub.url}/{repo}/commit/{made.oid}"
        self.answer({"success": True, "commitOid": made.oid, "commitUrl": url, "hookOutput": ""})

    def super_squash(self, repo: str) -> None:
        wanted, found = self.json(), self.writable(repo)
        with self.hub.lock:
            found.commits = [Commit(self.hub.new_oid(), wanted["message"], found.head.files)]
        self.answer({})

    # downloads

    def resolve(self, repo: str, revision: str, path: str) -> None:
        _, commit = self.readable(repo, revision)
        file = commit.files.get(path)
        headers = {"X-Repo-Commit": commit.oid}
        if file is None:
            self.muted = False
            raise Refusal(404, "Entry not found", "EntryNotFound")
        if file.sha256 is None:
            return self.answer(file.content, 200, headers | {"ETag": f'"{file.blob_id}"'})
        headers |= {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{file.sha256}"'}
        storage = self.hub.url.replace("127.0.0.1", "localhost")  # another host, as the real one's storage is
        self.answer(b"", 302, headers | {"Location": f"{storage}/lfs/{file.sha256}"})

    def lfs_get(self, oid: str) -> None:
        stored = self.hub.folder / oid
        self.hub.requests.append((self.command, self.path, 200))
        self.send_response(200)
        self.send_header("Content-Length", str(stored.stat().st_size))
        self.send_header("ETag", f'"{oid}"')
        self.end_headers()
        with open(stored, "rb") as file:
            while chunk := file.read(CHUNK):
                self.wfile.write(chunk)
        self.wfile.flush()

    # collections

    def create_collection(self) -> None:
        wanted, account = self.json(), self.account()
        self.require_write(account, wanted["namespace"])
        if len(wanted.get("description") or "") > 150:
            raise Refusal(400, "description: at most 150 characters")
        with self.hub.lock:
            for slug, collection in self.hub.collections.items():
                if (collection["title"], collection["owner"]["name"]) == (wanted["title"], wanted["namespace"]):
                    raise Refusal(409, "Collection already exists", slug=slug)
            words = re.sub("[^a-z0-9]+", "-", wanted["title"].lower()).strip("-")
            slug = f"{wanted['namespace']}/{words}-{next(self.hub.counter):024x}"
            self.hub.collections[slug] = {
                "slug": slug,
                "title": wanted["title"],
                "description": wanted.get("description"),
                "owner": {"name": wanted["namespace"], "type": "user"},
                "private": wanted["private"],
                "items": [],
                "lastUpdated": "2026-01-01T00:00:00.000Z",
                "position": 0,
                "theme": "orange",
                "upvotes": 0,
            }
        self.answer(self.hub.collections[slug])

    def collection(self, slug: str, write: bool = True) -> dict[str, Any]:
        found = self.hub.collections.get(slug)
        if found is None:
            raise Refusal(404, "Collection not found")
        if write:
            self.require_write(self.account(), found["owner"]["name"])
        return found

    def get_collection(self, slug: str) -> None:
        self.answer(self.collection(slug, write=False))

    def update_collection(self, slug: str) -> None:
        wanted, found = self.json(), self.collection(slug)
        found.update(wanted)
        self.answer({"success": True, "data": found})

    def add_item(self, slug: str) -> None:
        wanted, found = self.json(), self.collection(slug)
        item = wanted["item"]
        if item["id"] not in self.hub.repositories:
            raise Refusal(404, f"{item['id']} does not exist")
        if any(old["id"] == item["id"] for old in found["items"]):
            raise Refusal(409, "Item already in the collection")
        entry = {"_id": f"{next(self.hub.counter):024x}", "id": item["id"], "type": item["type"]}
        entry |= {"position": len(found["items"]), "note": {"text": wanted.get("note"), "html": ""}}
        found["items"].append(entry)
        self.answer(found)


def git_hash(content: bytes) -> str:
    """The id Git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


if __name__ == "__main__":
    with HubServer(Path(sys.argv[1])) as server:
        print("\n".join(f"export {name}={value}" for name, value in server.env().items()), flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass
