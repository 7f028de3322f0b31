"""make finds a Python that fits among those on the PATH: here, scripts that claim a version."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO


def fake_python(folder: Path, name: str, version: tuple[int, int]) -> None:
    """An interpreter that runs what it is given, under another version."""
    script = folder / name
    claim = f"import sys; sys.version_info = ({version[0]}, {version[1]}, 0); exec(sys.argv[1])"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{claim}" "$2"\n')
    script.chmod(0o755)


def make_python(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    for tool in ("sh", "make", "echo"):
        if not (folder / tool).exists():
            (folder / tool).symlink_to(shutil.which(tool))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment.pop("PYTHON", None)
    return subprocess.run(
        ["make", "--silent", "-f", REPO / "Makefile", "python", *arguments],
        cwd=folder,  # no .venv here
        env=environment | {"PATH": str(folder)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("pythons", "chosen"),
    [
        ({"python3": (3, 11), "python3.13": (3, 13)}, "python3"),
        ({"python3": (3, 14)}, "python3"),
        ({"python3": (3, 9), "python3.12": (3, 12), "python3.11": (3, 11)}, "python3.12"),  # too old
        ({"python3": (3, 15), "python3.11": (3, 11), "python3.14": (3, 14)}, "python3.11"),  # too new
        ({"python3.14": (3, 14)}, "python3.14"),
    ],
)
def test_make_takes_the_first_python_that_fits(tmp_path, pythons, chosen):
    for name, version in pythons.items():
        fake_python(tmp_path, name, version)
    result = make_python(tmp_path)
    assert (result.returncode, result.stdout.strip()) == (0, chosen), result.stderr


@pytest.mark.parametrize(
    ("pythons", "arguments", "message"),
    [
        ({"python3": (3, 10), "python3.13": (3, 15)}, [], "none of python3 python3.13 python3.12 python3.11"),
        ({}, [], "none of python3 python3.13"),
        ({"python3": (3, 12), "old": (3, 9)}, ["PYTHON=old"], "Python 3.11 to 3.14 is needed, old is none"),
    ],
)
def test_make_says_in_one_line_that_no_python_fits(tmp_path, pythons, arguments, message):
    for name, version in pythons.items():
        fake_python(tmp_path, name, version)
    result = make_python(tmp_path, *arguments)
    assert result.returncode != 0 and message in result.stdout and len(result.stdout.splitlines()) == 1
    assert "make PYTHON=" in result.stdout  # the remedy


def test_a_python_that_is_given_is_taken(tmp_path):
    for name, version in {"python3": (3, 12), "mine": (3, 13)}.items():
        fake_python(tmp_path, name, version)
    assert make_python(tmp_path, "PYTHON=mine").stdout.strip() == "mine"
