"""Uploading to the Hugging Face Hub: look first, change only what differs, so that a second try is safe.

huggingface_hub 2.4 retries the transfer of large files, but not whoami, the creation of repositories and
collections, or the commit; and it waits for an answer for ever. Both are mended here. Every step reads the
Hub's state before it acts, so a run that was cut off anywhere is completed by running it again.
"""

import hashlib
import json
import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]: httpx's or httpx2's, whichever the client uses
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils import parse_ratelimit_headers
from huggingface_hub.utils._http import default_client_factory  # private: the version is pinned

from stages.lib.run.artefacts import sha256_of_file
from stages.lib.run.errors import UserError
from stages.lib.run.retry_after import retry_after

T = TypeVar("T")

TIMEOUT = 120.0  # seconds without a byte from the Hub
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each new try
LONGEST_WAIT = 300.0  # a Hub that asks for more is asked again by the next run instead
PASSING = {408, 412, 429, 500, 502, 503, 504}  # 412: somebody committed meanwhile, so look again
FAULTS = (HTTPError, json.JSONDecodeError)  # the latter: a page of some gateway instead of the Hub's answer
MADE_BY_HUB = {".gitattributes"}


class HubError(UserError):
    """The Hub refused or could not be reached; running again completes what is missing."""


@dataclass(frozen=True)
class Account:
    api: HfApi
    user: str
    namespaces: frozenset[str]  # the user and the organisations they belong to


def connect() -> Account:
    """The account of the token in $HF_TOKEN or of the stored login; needs the network.

    Raises:
        HubError: there is no token, the Hub refuses it, or it may only read.
    """
    token = get_token()
    if token is None:
        raise HubError(
            "publish_hub.push is true, but there is no token: set HF_TOKEN to one that may write "
            "(https://huggingface.co/settings/tokens) or run `hf auth login`; or set push to false"
        )
    set_client_factory(_client)
    for handler in logging.getLogger("huggingface_hub").handlers:
        handler.addFilter(_hide_signature)
    api = HfApi(token=token)
    if api.endpoint != "https://huggingface.co":
        constants.HF_HUB_DISABLE_XET = True  # a hub elsewhere has large-file storage, but seldom Xet
    answer = _call("asking the Hub whose token this is", api.whoami)
    if answer.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"the token of {answer['name']} may only read: make one that may write, as HF_TOKEN")
    orgs = {org["name"] for org in answer.get("orgs", [])}
    return Account(api, answer["name"], frozenset(orgs | {answer["name"]}))


def publish_repository(
    api: HfApi, repo_id: str, folder: Path, private: bool, message: str, hides_texts: bool = False
) -> str:
    """Makes the model repository equal to `folder`, in at most one commit, and returns the newest commit's id.

    Files that are the same there are not sent; files that are only there are removed (their history stays). It
    becomes private before the commit, public only after it.

    Args:
        hides_texts: the files leave out texts of private data: where a private repository becomes public, its
            older commits, whose cards may show them, are removed first, for good.

    Raises:
        HubError: what went wrong, with what to do.
    """
    becomes_public = _ensure_repository(api, repo_id, private)
    commit = _commit(api, repo_id, folder, message)
    if becomes_public:
        if hides_texts:
            what = f"removing the older commits of {repo_id}"
            _call(what, lambda: api.super_squash_history(repo_id, commit_message=message))
            commit = str(_call(f"reading {repo_id}", lambda: _info(api, repo_id)).sha)
        _call(f"making {repo_id} public", lambda: api.update_repo_settings(repo_id, private=False))
    return commit


def _commit(api: HfApi, repo_id: str, folder: Path, message: str) -> str:
    """Commits what differs, and returns the newest commit's id."""
    for wait in (*WAITS, None):
        info = _call(f"reading {repo_id}", lambda: _info(api, repo_id))
        operations = _differences(info, folder)
        if not operations:
            return str(info.sha)
        _upload_large_files(api, repo_id, operations)
        try:
            commit = api.create_commit(
                repo_id, operations, commit_message=message, parent_commit=info.sha, revision="main"
            )
            return commit.oid
        except FAULTS as error:
            # the commit may have been made although its answer was lost: look again before trying again
            _pause_or_raise(f"committing to {repo_id}", error, wait)
        except ValueError as error:  # the client has the Hub validate the card before the commit
            raise HubError(f"{repo_id}: the Hub refuses the model card: {error}") from error
    raise AssertionError("the last wait is None, so the loop ends by return or raise")


def publish_collection(
    api: HfApi, namespace: str, title: str, description: str, private: bool, notes: dict[str, str]
) -> str:
    """Creates the collection or brings it up to date, and returns its slug.

    The Hub keeps one collection of a title in a namespace; what is already in it stays.

    Args:
        description: at most 150 characters.
        notes: repository id to its note in the collection, in order.
    """
    collection = _call(
        f"creating the collection '{title}'",
        lambda: api.create_collection(
            title, namespace=namespace, description=description, private=private, exists_ok=True
        ),
    )
    if (collection.description, collection.private) != (description, private):
        _call(
            f"updating the collection '{title}'",
            lambda: api.update_collection_metadata(collection.slug, description=description, private=private),
        )
    present = {item.item_id for item in collection.items}
    for repo_id, note in notes.items():
        if repo_id not in present:
            _call(
                f"adding {repo_id} to the collection",
                lambda repo_id=repo_id, note=note: api.add_collection_item(
                    collection.slug, repo_id, "model", note=note, exists_ok=True
                ),
            )
    return collection.slug


def require_own(api: HfApi, repo_id: str, mark: str) -> None:
    """Changes nothing.

    Args:
        mark: a file that every repository published from here holds.

    Raises:
        HubError: the repository holds files, and not this one: it is another's, or of another project.
    """
    info = _find(api, repo_id)
    files = {sibling.rfilename for sibling in (info.siblings if info else None) or []} - MADE_BY_HUB
    if files and mark not in files:
        raise HubError(
            f"{repo_id} holds {len(files)} file(s) that were not published from here, {min(files)} among them, which "
            "would be removed: change publish_hub.name, or set publish_hub.replace_others to true"
        )


def _find(api: HfApi, repo_id: str) -> ModelInfo | None:
    def find() -> ModelInfo | None:
        try:
            return _info(api, repo_id)
        except RepositoryNotFoundError:
            return None

    return _call(f"looking for {repo_id}", find)


def _ensure_repository(api: HfApi, repo_id: str, private: bool) -> bool:
    """Whether the repository, which exists now, has still to become public."""
    info = _find(api, repo_id)
    if info is None:
        _call(f"creating {repo_id}", lambda: api.create_repo(repo_id, private=private, exist_ok=True))
    elif private and not info.private:
        _call(f"making {repo_id} private", lambda: api.update_repo_settings(repo_id, private=True))
    return info is not None and bool(info.private) and not private


def _info(api: HfApi, repo_id: str) -> ModelInfo:
    return api.model_info(repo_id, files_metadata=True, timeout=TIMEOUT)  # its default waits for ever


def _differences(info: ModelInfo, folder: Path) -> list[CommitOperationAdd | CommitOperationDelete]:
    """What a commit has to add or remove for the repository to hold exactly the files in `folder`."""
    remote = {sibling.rfilename: sibling for sibling in info.siblings or []}
    local = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    for path, file in sorted(local.items()):
        there = remote.get(path)
        if there is None:
            same = False
        elif there.lfs is not None:
            same = there.lfs.sha256 == sha256_of_file(file)
        else:
            content = file.read_bytes()
            same = there.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        if not same:
            operations.append(CommitOperationAdd(path, file))
    gone = sorted(remote.keys() - local.keys() - MADE_BY_HUB)
    return operations + [CommitOperationDelete(path) for path in gone]


def _upload_large_files(api: HfApi, repo_id: str, operations: list) -> None:
    """Sends large files by the Hub's own transport (Xet or LFS), which resumes and retries by itself."""
    additions = [operation for operation in operations if isinstance(operation, CommitOperationAdd)]
    try:
        api.preupload_lfs_files(repo_id, additions, revision="main", free_memory=False)
    except FAULTS as error:
        raise HubError(_explain(f"uploading to {repo_id}", error)) from error
    except (RuntimeError, ValueError, OSError) as error:
        # a failed transfer arrives as a RuntimeError that names the file, with its reason as the cause
        cause = error.__cause__
        reason = _explain(str(error), cause) if isinstance(cause, HTTPError) else f"{error}; run again"
        raise HubError(f"{repo_id}: {reason}") from error


def _call(what: str, function: Callable[[], T]) -> T:
    """`function()`, tried again after a passing fault.

    Raises:
        HubError: the fault does not pass.
    """
    for wait in (*WAITS, None):
        try:
            return function()
        except OfflineModeIsEnabled:
            raise HubError("HF_HUB_OFFLINE is set: unset it to publish") from None
        except FAULTS as error:
            _pause_or_raise(what, error, wait)
    raise AssertionError("the last wait is None, so the loop ends by return or raise")


def _pause_or_raise(what: str, error: Exception, wait: float | None) -> None:
    """Sleeps before the next try, or raises HubError where none is left or none would help."""
    status = _status(error)
    asked = _asked_to_wait(error)
    if wait is None or asked > LONGEST_WAIT or (status is not None and status not in PASSING):
        raise HubError(_explain(what, error)) from error
    reason = f"status {status}" if status else type(error).__name__
    wait = max(wait, asked)
    print(f"{what}: {reason}; trying again in {wait:.0f} s", file=sys.stderr, flush=True)
    time.sleep(wait)


def _status(error: Exception) -> int | None:
    """The HTTP status, None where there was no answer."""
    return error.response.status_code if isinstance(error, HfHubHTTPError) else None


def _asked_to_wait(error: Exception) -> float:
    """Seconds the Hub asks to wait (Retry-After, or the reset of the rate limit); 0 where it does not say."""
    if not isinstance(error, HfHubHTTPError):
        return 0.0
    limit = parse_ratelimit_headers(error.response.headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    return retry_after(error.response.headers)


def _explain(what: str, error: Exception) -> str:
    """One line for the user: what failed, the Hub's own words, what to do. No address: it may be signed."""
    if not isinstance(error, HfHubHTTPError):
        lost = f"{what}: the Hub did not answer ({type(error).__name__})"
        return f"{lost}; check the network and run again: what is already there is not sent twice"
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())
    advice = {
        401: "the token is wrong or has expired: make a new one at https://huggingface.co/settings/tokens",
        403: "the token may not write there: give it write rights, or change publish_hub.owner",
        413: "too large for the account",
        429: "too many requests: wait a while, then run again",
    }.get(status)
    if advice is None and status >= 500:
        advice = "the Hub has trouble: run again later"
    if advice is None:
        advice = "change publish_hub in params.yaml accordingly"
    return f"{what}: the Hub answered {status}{': ' if said else ''}{said}; {advice}"


def _client():
    client = default_client_factory()
    client.timeout = TIMEOUT  # between bytes, not for a whole upload
    return client


def _hide_signature(record: logging.LogRecord) -> bool:
    """Cuts the query off addresses in the client's warnings: those of large files carry a signature."""
    record.msg, record.args = re.sub(r"\?\S+", "?...", record.getMessage()), ()
    return True
