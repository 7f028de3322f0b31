"""What each room of stages/lib may import: the house has a ground floor, and nobody looks up the stairs."""

import re

import pytest

from tests.conftest import REPO, SMOKE_FILES
from tests.test_pipeline import imports_of

MAY_IMPORT = {  # CONTRIBUTING.md draws this
    "run": set(),
    "data": {"run"},
    "model": {"run", "data"},
    "rl": {"run", "data", "model"},
    "analysis": {"run", "data", "model"},
    "report": {"run", "data", "model", "analysis"},
    "hub": {"run", "analysis", "report"},
}


def rooms_imported_by(room: str) -> set[str]:
    imported = {name for path in (REPO / "stages/lib" / room).glob("*.py") for name in imports_of(path)}
    return {name.removeprefix("stages/lib/").split("/")[0] for name in imported} - {room}


def test_every_module_is_in_a_room():
    assert {path.parent.name for path in (REPO / "stages/lib").rglob("*.py")} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_rooms_below(room):
    # and no stage: what two scripts share belongs into a room
    assert rooms_imported_by(room) <= MAY_IMPORT[room]


def test_contributing_says_the_same():
    text = (REPO / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for room, may in MAY_IMPORT.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{room}/` |")]
        said = line.rstrip(" |").rsplit("|", 1)[1].strip()
        assert said == (", ".join(sorted(may, key=list(MAY_IMPORT).index)) or "nothing"), room


def test_the_files_that_read_the_smoke_run_are_in_one_process():
    tests = {path: path.read_text(encoding="utf-8") for path in (REPO / "tests").rglob("test_*.py")}
    readers = [path for path, text in tests.items() if re.search(r"def \w+\([^)]*\bsmoke_project\b", text)]
    assert {path.relative_to(REPO).as_posix() for path in readers} == set(SMOKE_FILES)
