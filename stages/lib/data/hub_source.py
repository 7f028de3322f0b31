"""What is read from the Hugging Face Hub: always at a commit, and with errors a user can act on."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi, RepoCard, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HTTPError

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
    return info.sha


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
    """Turns what the Hub's clients raise into a UserError that names repository and revision."""
    try:
        yield
    except (HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"{hub_id} at revision {revision}: cannot be read from the Hub ({reason}); check the id, "
            "the revision, the network and, for a gated repository, the token"
        ) from error
