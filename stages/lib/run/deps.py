"""The code deps of every stage in dvc.yaml, from the imports of its script: `make deps` writes them.

DVC follows files, not imports, so each project file that a script imports, directly or through others, has to be
a dep of its stage. A module that renders templates has them beside it: they are deps as well.

Run     python -m stages.lib.run.deps
"""

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[3]

INDENT = 6 * " "
LAYOUT: dict[str, Any] = {"initial_indent": INDENT, "subsequent_indent": INDENT, "width": 115}
LAYOUT |= {"break_long_words": False, "break_on_hyphens": False}

RENDERING = frozenset({"jinja2", "stages.lib.run.templates"})

# What no number, text or picture of a stage comes from: a change here reruns nothing. Neither these nor what is
# imported through them alone is a dep. What computes, draws, reads params or writes an artefact is not among them.
BOOKKEEPING = frozenset(
    {
        "stages/lib/run/errors.py",
        "stages/lib/run/phases.py",
        "stages/lib/run/stage.py",
        "stages/lib/run/tracking.py",
    }
)


def code_of(stage: str, root: Path = PROJECT) -> list[str]:
    """The stage's script, then all modules and templates its results come from, by path; paths from the root."""
    script = f"stages/{stage}.py"
    found: set[str] = set()
    waiting = [script]
    while waiting:
        name = waiting.pop()
        if name in found or name in BOOKKEEPING:
            continue
        found.add(name)
        modules = modules_imported_by(root / name)
        waiting += [file for module in modules if (file := _file_of(module, root))]
        if RENDERING & modules:
            found |= {file.relative_to(root).as_posix() for file in (root / name).parent.glob("*.jinja")}
    return [script, *sorted(found - {script})]


def modules_imported_by(file: Path) -> set[str]:
    """Dotted names that a Python file imports anywhere; of `from a import b` both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return names


def with_code_deps(pipeline: str, root: Path = PROJECT) -> str:
    """The text of dvc.yaml with the code deps each stage ought to have, after its data deps; all else as it stands.

    Written line by line, since a YAML writer would lay out anew what is wrapped by hand. `deps` is a list in brackets,
    `deps: [` on a line of its own: lines of data deps, each with its last comma, then these of the code.
    """
    lines: list[str] = []
    stage, in_deps = "", False
    for line in pipeline.splitlines():
        if name := re.match(r"  (\w+):", line):
            stage = name[1]
        if not (in_deps and line.startswith(INDENT + "stages/")):
            lines.append(line)
        if in_deps and line.endswith("]"):
            code = textwrap.fill(", ".join(code_of(stage, root)) + "]", **LAYOUT)
            lines += code.splitlines()
            in_deps = False
        in_deps |= line == "    deps: ["
    return "\n".join(lines) + "\n"


def _file_of(module: str, root: Path) -> str | None:
    name = module.replace(".", "/") + ".py"
    return name if name.startswith("stages/") and (root / name).exists() else None


if __name__ == "__main__":
    path = PROJECT / "dvc.yaml"
    before = path.read_text(encoding="utf-8")
    after = with_code_deps(before)
    path.write_text(after, encoding="utf-8")
    print("dvc.yaml: its code deps were right" if after == before else "dvc.yaml: code deps rewritten")
