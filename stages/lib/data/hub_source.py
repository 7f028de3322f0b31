"""What is read from the Hugging Face Hub: always at a commit, and with errors a user can act on."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from huggingface_hub import HfApi, RepoCard, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from stages.lib.run.errors import UserError

COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve_revision(hub_id: str, revision: str, repo_type: str) -> str:
    """The commit hash `revision` stands for; a branch or tag is looked up, with a warning that it moves.

    Args:
        repo_type: 'model' or 'dataset'.

    Raises:
        UserError: the repository or revision does not exist, or the Hub cannot be reached.
    """
    if COMMIT.fullmatch(revision):
        return revision
    with hub_errors(hub_id, revision):
        info = HfApi().repo_info(hub_id, revision=revision, repo_type=repo_type, timeout=30)
    warnings.warn(
        f"{hub_id}: revision '{revision}' is {info.sha} today and may move; "
        "set the commit as revision to get the same files tomorrow",
        stacklevel=2,
    )
    return cast(str, info.sha)


def is_public(hub_id: str, commit: str) -> bool | None:
    """Whether everyone may read the data set, without asking for access; None where the Hub cannot be asked."""
    try:
        info = HfApi().dataset_info(hub_id, revision=commit, timeout=30)
    except (HTTPError, OSError):
        return None  # what is read then was downloaded before
    return info.private is False and not info.gated


def card_license(hub_id: str, commit: str, repo_type: str) -> str | None:
    """The licence the repository's card names, None where it has no card or names none."""
    with hub_errors(hub_id, commit):
        try:
            path = hf_hub_download(hub_id, "README.md", revision=commit, repo_type=repo_type, etag_timeout=30)
        except EntryNotFoundError:
            return None
    return file_license(Path(path))


def file_license(card: Path) -> str | None:
    """The licence in a card's metadata block, None where the file or the entry is missing or unreadable."""
    try:
        value = RepoCard.load(card, ignore_metadata_errors=True).data.get("license")
    except (OSError, ValueError):
        return None
    return value if isinstance(value, str) else None


@contextmanager
def hub_errors(hub_id: str, revision: str) -> Iterator[None]:
    """Turns what the Hub's clients raise into a UserError that names repository, revision, reason and remedy."""
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{hub_id} at revision {revision}: cannot be read from the Hub ({reason}); {_remedy(error)}"
        ) from error


def _remedy(error: Exception) -> str:
    """What to check, by the kind of fault: tokens and networks only where they may be the cause."""
    if isinstance(error, GatedRepoError):
        return "ask for access on its page, and set HF_TOKEN to your token"
    if isinstance(error, RepositoryNotFoundError):
        return "check the id and, for a private repository, the token"
    if isinstance(error, RevisionNotFoundError):
        return "check the revision"
    if isinstance(error, HFValidationError):
        return "check the id, which is owner/name"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return "check the token"
    if isinstance(
        error, HTTPError | ConnectionError | TimeoutError | OfflineModeIsEnabled | LocalEntryNotFoundError
    ):
        return "check the network, and try again"
    return "check the id and the revision"
