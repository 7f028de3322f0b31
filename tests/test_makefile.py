"""make finds a Python that fits among those on the PATH: here, scripts that claim a version."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import bench_dpo, bench_generate, bench_ppo
from stages.lib.run.params import read_params
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


def wheel_of(folder: Path, version: str) -> None:
    """A wheel of that name and version with one file."""
    record = f"torch-{version}.dist-info"
    files = {
        "torch/__init__.py": f"__version__ = '{version}'\n",
        f"{record}/METADATA": f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\nRequires-Dist: no-such\n",
        f"{record}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    listed = "".join(f"{name},,\n" for name in (*files, f"{record}/RECORD"))
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as wheel:
        for name, text in (files | {f"{record}/RECORD": listed}).items():
            wheel.writestr(name, text)


def test_torch_comes_from_the_folder_that_is_named(tmp_path):
    (tmp_path / "wheels").mkdir()
    for version in ("2.12.0+cpu", "2.13.0+cpu"):
        wheel_of(tmp_path / "wheels", version)
    (tmp_path / "requirements.lock").write_text("# of the tests\ntorch==2.13.0\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "PIP_"))}
    environment |= {
        "PIP_NO_INDEX": "1",
        "PIP_NO_DEPS": "1",
        "PIP_CONFIG_FILE": os.devnull,
    }  # the lock's line is satisfied, and nothing asked for
    arguments = ["install", "TORCH_INDEX=wheels", f"PYTHON={sys.executable}"]
    shutil.copy(REPO / "Makefile", tmp_path)
    result = subprocess.run(
        ["make", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    code = "import torch; print(torch.__version__)"
    found = subprocess.run([tmp_path / ".venv/bin/python", "-c", code], capture_output=True, text=True).stdout
    assert found.strip() == "2.13.0+cpu"


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the registry's build is for the CPU")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["NVIDIA="], True), (["NVIDIA=/dev/nvidiactl"], False), (["NVIDIA=", "TORCH_INDEX=wheels"], False)],
)
def test_make_says_what_it_is_about_to_download(tmp_path, arguments, said):
    command = ["make", "--silent", "-f", REPO / "Makefile", "torch-build", *arguments]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and ("TORCH_INDEX=" in result.stdout) == said


def test_gpu_check_asks_for_what_benchmarks_and_recipe_have():
    command = ["make", "-n", "--no-print-directory", "gpu-check", f"STOCK={sys.prefix}"]
    lines = subprocess.run(command, cwd=REPO, capture_output=True, text=True, check=True).stdout.splitlines()
    asked = {line.split()[2]: line.split()[3:] for line in lines if " -m bench." in line}
    parsers = {"bench.bench_dpo": bench_dpo, "bench.bench_ppo": bench_ppo, "bench.bench_generate": bench_generate}
    assert asked.keys() == parsers.keys()
    for name, parser in parsers.items():
        options = parser.parse(asked[name])
        assert (options.device, options.rounds, options.base.name) == ("cuda", 1, "base")
    overrides = [text.split("=")[0] for text in lines[-1].split() if "=" in text]
    sections = read_params(REPO)
    assert len(overrides) == 2 and all(part[1] in sections[part[0]] for part in (o.split(".") for o in overrides))
