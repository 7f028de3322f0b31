"""The code deps of every stage in dvc.yaml, from the imports of its script: `make deps` writes them.

DVC follows files, not imports, so each project file that a script imports, directly or through others, has to be
a dep of its stage. A module that imports jinja2 renders the templates beside it: they are deps as well.

Run     python -m stages.lib.run.deps
"""

import ast
from io import StringIO
from pathlib import Path

from ruamel.yaml import YAML

PROJECT = Path(__file__).resolve().parents[3]

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
        if any(module.partition(".")[0] == "jinja2" for module in modules):
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
    """The text of dvc.yaml with the code deps each stage ought to have, after its data deps; comments stay."""
    yaml = YAML(typ="rt")  # keeps comments, and constructs no objects
    yaml.preserve_quotes = True
    yaml.width = 1000  # never break a line
    content = yaml.load(pipeline)
    for stage, definition in content["stages"].items():
        deps = definition["deps"]
        for i in reversed(range(len(deps))):
            if deps[i].startswith("stages/"):
                del deps[i]
        deps.extend(code_of(stage, root))
    text = StringIO()
    yaml.dump(content, text)
    return text.getvalue()


def _file_of(module: str, root: Path) -> str | None:
    name = module.replace(".", "/") + ".py"
    return name if name.startswith("stages/") and (root / name).exists() else None


if __name__ == "__main__":
    path = PROJECT / "dvc.yaml"
    before = path.read_text(encoding="utf-8")
    after = with_code_deps(before)
    path.write_text(after, encoding="utf-8")
    print("dvc.yaml: its code deps were right" if after == before else "dvc.yaml: code deps rewritten")
