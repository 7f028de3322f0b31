"""No pickle, no remote code and no token: in the code by its syntax, in what a run writes by its bytes."""

import ast
import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.conftest import PLANTED_TOKEN, REPO

SCRIPTS = sorted(path for folder in ("stages", "bench") for path in (REPO / folder).rglob("*.py"))
PICKLING = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def calls_in(script: Path) -> list[tuple[str, dict[str, ast.expr]]]:
    """(dotted name, keyword arguments) of every call."""
    tree = ast.parse(script.read_text(encoding="utf-8"))
    return [
        (ast.unparse(node.func), {keyword.arg: keyword.value for keyword in node.keywords if keyword.arg})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def is_constant(node: ast.expr | None, value) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(REPO).as_posix())
def test_no_script_unpickles_or_runs_what_it_reads(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {name.split(".")[0] for name in names} & PICKLING
    for name, arguments in calls_in(script):
        assert name not in ("eval", "exec", "os.system", "os.popen", "pd.read_pickle"), name
        assert not name.endswith(".to_pickle"), name
        assert not is_constant(arguments.get("shell"), True), name
        assert "allow_pickle" not in arguments, name
        if name == "torch.load":
            assert is_constant(arguments.get("weights_only"), True)
        if name == "torch.save":
            assert script.name == "checkpoints.py"
        if name == "YAML":
            assert arguments["typ"].value in ("safe", "rt")  # neither makes objects of tags


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.relative_to(REPO).as_posix())
def test_no_script_trusts_remote_code(script):
    text = script.read_text(encoding="utf-8")
    assert not re.search(r"trust_remote_code\W+(?!False)\w", text)


def test_no_parameter_can_carry_a_token_or_ask_for_remote_code():
    sections = YAML(typ="safe").load((REPO / "params.yaml").read_text(encoding="utf-8"))
    keys = {key for section in sections.values() for key in section}
    assert not {key for key in keys if re.search(r"secret|password|api_key|hf_token|^token$|trust", key)}


def test_no_file_of_a_run_holds_a_pickle(smoke_project):
    """By content: pickles begin with 0x80 and their protocol, the zip files of torch.save hold a data.pkl."""
    looked_at = 0
    for path in smoke_project.rglob("*"):
        if path.is_file() and ".git" not in path.parts:
            content = path.read_bytes()
            assert not re.match(rb"\x80[\x02-\x05]", content), path
            assert b"data.pkl" not in content or path.suffix in (".py", ".md"), path
            looked_at += 1
    assert looked_at > 200
    assert not list((smoke_project / "checkpoints").rglob("*.pt")), "a finished run has cleaned up"


def test_no_file_of_a_run_holds_the_token_of_its_environment(smoke_project):
    """Params, lock, logs, metrics, reports, cards, receipts, cache and DVC's own notes."""
    secret = PLANTED_TOKEN.encode()
    assert not [path for path in smoke_project.rglob("*") if path.is_file() and secret in path.read_bytes()]
