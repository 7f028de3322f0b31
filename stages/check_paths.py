"""Are the files that params.yaml names there? DVC alone says '[Errno 2] No such file or directory', and of what.

Reads   params.yaml
Writes  reports/check_paths/checked.txt     always the same: a dep that puts this stage before those that read the paths
        Exits with 1 if a path is not there, warns of data that dvc exp run would take into Git.

Run     python -m stages.check_paths        (dvc repro does after a path has changed, make repro each time)
"""

import subprocess
import sys
from pathlib import Path

from stages.lib.data.rows import path_problem
from stages.lib.run.errors import UserError
from stages.lib.run.params import read_params

PATHS = (
    ("fetch_base", "path"),
    ("fetch_pairs", "path"),
    ("fetch_pairs", "unseen_path"),
    ("fetch_pairs", "eval_prompts_path"),
)  # deps of DVC, and so to be there also where a hub_id is set


def main(root: Path = Path(".")) -> None:
    """
    Raises:
        UserError: there is no such file or folder; names the key, and what is close.
    """
    params = read_params(root)
    for section, key in PATHS:
        path = (params.get(section) or {}).get(key)
        if not isinstance(path, str):
            continue  # the stage says so by name
        if problem := path_problem(root / path):
            raise UserError(f"params.yaml: {section}.{key} is {path}: {problem}")
        if is_untracked(path, root):
            print(
                f"warning: {path} is known neither to Git nor to DVC: dvc exp run would take it into Git. "
                f"Run `dvc add {path}`, or keep it in a git-ignored folder"
            )
    checked = root / "reports/check_paths/checked.txt"
    checked.parent.mkdir(parents=True, exist_ok=True)
    checked.write_text("The files that params.yaml names are there.\n", encoding="utf-8")


def is_untracked(path: str, root: Path) -> bool:
    """Whether Git sees the path as new: neither tracked nor ignored. Outside Git nothing is."""
    command = ["git", "status", "--porcelain", "--", path]
    try:
        shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return shown.startswith("??")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"check_paths: error: {error}")
