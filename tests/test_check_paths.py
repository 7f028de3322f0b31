"""Paths of params.yaml are checked before DVC, by key."""

import shutil
import subprocess

import pytest

from stages.check_paths import main
from stages.lib.run.errors import UserError
from tests.conftest import REPO


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("base_embedded.json", "pairs_embedded.jsonl", "unseen_embedded.jsonl", "prompts_embedded.jsonl"):
        shutil.copy(REPO / "data" / name, tmp_path / "data")
    shutil.copy(REPO / "params.yaml", tmp_path)
    return tmp_path


def set_path(root, old, new):
    text = (root / "params.yaml").read_text()
    assert text.count(old) == 1
    (root / "params.yaml").write_text(text.replace(old, new))


def test_the_committed_paths_are_there(root, capsys):
    main(root)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("path: data/pairs_embedded.jsonl", "path: data/pairs_embeded.jsonl",
         r"fetch_pairs.path is data/pairs_embeded.jsonl: no such file \(did you mean .*pairs_embedded.jsonl\?\)"),
        ("unseen_path: data/unseen_embedded.jsonl", "unseen_path: dat/x.jsonl",
         "fetch_pairs.unseen_path is dat/x.jsonl: no such file .there is no folder"),
        ("path: data/pairs_embedded.jsonl", "path: data/*.jsonl", "is a pattern, and DVC follows .*fetch_pairs.files"),
        ("path: data/base_embedded.json ", "path: data/base.json ", "fetch_base.path is data/base.json"),
    ],
)  # fmt: skip
def test_a_path_that_is_not_there_is_named_by_its_key(root, old, new, words):
    set_path(root, old, new)
    with pytest.raises(UserError, match=f"params.yaml: .*{words}"):
        main(root)


def test_untracked_data_is_warned_about_until_git_ignores_it(root, capsys):
    subprocess.run(["git", "init", "-q"], cwd=root, check=True)
    subprocess.run(["git", "add", "data"], cwd=root, check=True)
    (root / "mine").mkdir()
    shutil.copy(root / "data/pairs_embedded.jsonl", root / "mine/pairs.jsonl")
    set_path(root, "path: data/pairs_embedded.jsonl", "path: mine/pairs.jsonl")
    main(root)
    assert "mine/pairs.jsonl is known neither to Git nor to DVC" in capsys.readouterr().out
    (root / ".gitignore").write_text("/mine/\n")
    main(root)
    assert capsys.readouterr().out == ""
