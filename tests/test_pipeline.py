"""The pipeline checks itself: names, deps, what reruns when, and a whole run through real DVC."""

import ast
import importlib
import json
import re
import subprocess
from pathlib import Path

import pytest
from dvc.repo import Repo
from ruamel.yaml import YAML

from stages.lib.report.sections import PARAMETERS
from stages.lib.run.deps import BOOKKEEPING, with_code_deps
from stages.lib.run.params import Base, load_params
from tests.conftest import REPO, dvc

PIPELINE = YAML(typ="safe").load((REPO / "dvc.yaml").read_text())
SHOWN = YAML(typ="safe").load((REPO / "reports/dvc.yaml").read_text())
STAGES = list(PIPELINE["stages"])
IN_ORDER = [
    "fetch_base",
    "fetch_pairs",
    "corrupt_answers",
    "tokenize_pairs",
    "inspect_pairs",
    "reference_logps",
    "train_dpo",
    "train_reward",
    "train_judge",
    "train_ppo",
    "sample_responses",
    "score_responses",
    "judge_responses",
    "analyze_logps",
    "publish_hub",
    "build_report",
]


def imports_of(path: Path) -> set[str]:
    """Project files that `path` itself imports, as paths from the root."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            names += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    files = {name.replace(".", "/") + ".py" for name in names if name.startswith("stages")}
    return {file for file in files if (REPO / file).exists()}


def project_files_imported_by(path: Path) -> set[str]:
    """Project files that `path` imports, directly or through others, but neither bookkeeping nor through it."""
    found: set[str] = set()
    waiting = [path]
    while waiting:
        new = imports_of(waiting.pop()) - found - BOOKKEEPING
        found |= new
        waiting += [REPO / name for name in new]
    return found


def test_stages_stand_in_reading_order():
    assert STAGES == ["check_paths", *IN_ORDER]  # which computes nothing: neither section nor run.json


@pytest.mark.parametrize("stage", IN_ORDER)
def test_one_name_everywhere(stage):
    definition = PIPELINE["stages"][stage]
    assert definition["cmd"] in (f"python -m stages.{stage}", rf"\${{LAUNCH:-python}} -m stages.{stage}")
    assert definition["desc"]
    assert (REPO / f"stages/{stage}.py").exists()
    assert (REPO / f"tests/test_{stage}.py").exists()
    assert load_params(stage, importlib.import_module(f"stages.{stage}").Params, REPO)
    outs = [_name(entry) for kind in ("outs", "metrics", "plots") for entry in definition.get(kind, [])]
    reports = [name for name in outs if name.startswith("reports/")]
    assert all(name.startswith((f"reports/{stage}/", "reports/index.html")) for name in reports)
    assert f"{stage}/run.json" in SHOWN["metrics"]


@pytest.mark.parametrize("stage", IN_ORDER)
def test_every_imported_project_file_is_a_dep_and_no_other(stage):
    deps = {dep for dep in map(_name, PIPELINE["stages"][stage]["deps"]) if dep.startswith("stages/")}
    scripts = {dep for dep in deps if dep.endswith(".py")}
    assert scripts == {f"stages/{stage}.py"} | project_files_imported_by(REPO / f"stages/{stage}.py")
    assert all((REPO / dep).exists() for dep in deps)


def test_make_deps_would_change_nothing():
    text = (REPO / "dvc.yaml").read_text()
    assert with_code_deps(text) == text, "dvc.yaml: its code deps differ from the imports: run make deps"


def test_bookkeeping_is_what_stages_import_and_exists():
    imported = {name for path in (REPO / "stages").rglob("*.py") for name in imports_of(path)}
    assert imported >= BOOKKEEPING and all((REPO / name).exists() for name in BOOKKEEPING)


@pytest.mark.parametrize("stage", IN_ORDER)
def test_run_json_is_neither_out_nor_dep(stage):
    definition = PIPELINE["stages"][stage]
    entries = [_name(entry) for kind in ("deps", "outs", "metrics", "plots") for entry in definition.get(kind, [])]
    assert not [name for name in entries if name.endswith("run.json")]


@pytest.mark.parametrize("stage", IN_ORDER)
def test_the_base_keys_a_script_reads_are_its_params(stage):
    # base.seed listed and not read would rerun for nothing; read and not listed would not rerun
    source = "".join((REPO / name).read_text() for name in [f"stages/{stage}.py"])
    listed = {str(entry) for entry in PIPELINE["stages"][stage].get("params", [])}
    for name in Base.model_fields:
        read = re.search(rf"\bbase\.{name}\b", source) is not None
        assert read == bool({f"base.{name}", "base"} & listed), name


def test_every_section_of_params_belongs_to_a_stage():
    sections = YAML(typ="safe").load((REPO / "params.yaml").read_text())
    assert list(sections) == ["base", "lora", *IN_ORDER]


def test_the_page_is_made_anew_for_every_parameter_that_it_prints():
    assert set(PARAMETERS) <= set(PIPELINE["stages"]["build_report"]["params"])


def _name(entry: str | dict) -> str:
    return entry if isinstance(entry, str) else next(iter(entry))


def downstream_of(repo: Repo, changed: set[str]) -> set[str]:
    """Stage names that `changed` reach along DVC's own graph, themselves included."""
    names = {stage.name: stage for stage in repo.index.stages}
    graph = repo.index.graph  # edges from a stage to those it depends on
    reached, waiting = set(), [names[name] for name in changed]
    while waiting:
        stage = waiting.pop()
        if stage.name not in reached:
            reached.add(stage.name)
            waiting += graph.predecessors(stage)
    return reached


AFTER_SCORES = {"score_responses", "publish_hub", "build_report"}
AFTER_ANSWERS = AFTER_SCORES | {"judge_responses"}
AFTER_DPO = {"train_dpo", "sample_responses", "analyze_logps"} | AFTER_ANSWERS
AFTER_REWARD = {"train_reward", "train_ppo", "sample_responses", "analyze_logps"} | AFTER_ANSWERS
EVERYTHING = set(IN_ORDER)


def set_param(root: Path, key: str, value) -> None:
    yaml = YAML()
    params = yaml.load((root / "params.yaml").read_text())
    section, name = key.split(".")
    assert name in params[section] and params[section][name] != value
    params[section][name] = value
    with open(root / "params.yaml", "w") as file:
        yaml.dump(params, file)


@pytest.fixture
def stages_rerun_after(smoke_project):
    """Which stages a change (undone afterwards) would rerun: those DVC finds changed and all after them."""

    def ask(change) -> set[str]:
        changed_file = change(smoke_project)
        repo = Repo(str(smoke_project))
        try:
            changed = {address.rpartition(":")[2] for address in repo.status()}
            return downstream_of(repo, changed - {"check_paths"})  # whose out is always the same
        finally:
            repo.close()
            subprocess.run(["git", "checkout", "-q", "HEAD", "--", changed_file], cwd=smoke_project, check=True)
            if changed_file == "params.yaml":
                (smoke_project / "params.yaml").write_text(params_before)

    params_before = (smoke_project / "params.yaml").read_text()  # with the recipe's values, which are not in HEAD
    return ask


def change_of(key: str, value):
    def change(root: Path) -> str:
        set_param(root, key, value)
        return "params.yaml"

    return change


def line_added_to(name: str, line: str):
    def change(root: Path) -> str:
        with open(root / name, "a") as file:
            file.write(line)
        return name

    return change


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (change_of("train_dpo.beta", 0.3), AFTER_DPO),
        (change_of("train_dpo.learning_rate", 1e-6), AFTER_DPO),
        (change_of("train_reward.learning_rate", 1e-6), AFTER_REWARD),
        (change_of("train_ppo.kl_coef", 0.9), AFTER_REWARD - {"train_reward"}),
        (change_of("train_ppo.policy", "dpo"), AFTER_REWARD - {"train_reward"}),
        (change_of("lora.rank", 16), AFTER_DPO | AFTER_REWARD),
        (change_of("sample_responses.temperature", 0.1), {"sample_responses"} | AFTER_ANSWERS),
        (change_of("analyze_logps.confidence", 0.9), {"inspect_pairs", "analyze_logps"} | AFTER_ANSWERS),
        (line_added_to("stages/lib/analysis/verdict.py", "\n# a rule\n"), AFTER_SCORES),
        (line_added_to("stages/lib/analysis/measures.py", "\n# a measure\n"), AFTER_SCORES),
        (
            line_added_to("stages/lib/analysis/text_features.py", "\n# an emoji\n"),
            {"inspect_pairs", "analyze_logps"} | AFTER_SCORES,
        ),
        (line_added_to("stages/lib/report/data.html.jinja", "\nA sentence.\n"), {"inspect_pairs", "build_report"}),
        (change_of("inspect_pairs.rows", 3), {"inspect_pairs", "build_report"}),
        (change_of("judge_responses.prompts", 8), {"judge_responses", "build_report"}),
        (change_of("publish_hub.name", "another-name"), {"publish_hub"}),
        (line_added_to("stages/lib/hub/card.md.jinja", "\nA sentence.\n"), {"publish_hub"}),
        (change_of("fetch_base.path", "data/base_embedded.json"), EVERYTHING - {"fetch_pairs", "corrupt_answers"}),
        (
            line_added_to(
                "data/pairs_embedded.jsonl", '{"prompt": "Are you new?", "chosen": "Yes!", "rejected": "No."}\n'
            ),
            EVERYTHING - {"fetch_base"},
        ),
        (change_of("fetch_pairs.holdout_fraction", 0.3), EVERYTHING - {"fetch_base"}),
    ],
)
def test_what_reruns_when(stages_rerun_after, change, expected):
    assert stages_rerun_after(change) == expected


def test_with_ppo_from_dpo_beta_reruns_ppo_too(stages_rerun_after):
    def change(root: Path) -> str:
        set_param(root, "train_ppo.policy", "dpo")
        return change_of("train_dpo.beta", 0.3)(root)

    assert stages_rerun_after(change) == AFTER_DPO | {"train_ppo"}


def test_the_smoke_run_wrote_everything(smoke_project):
    for name in ("models/dpo", "models/reward", "models/ppo"):
        assert (smoke_project / name / "model.safetensors").exists()
    assert len(list((smoke_project / "models/hub").iterdir())) == 3
    assert (smoke_project / "reports/index.html").stat().st_size > 10_000
    for stage in IN_ORDER:
        record = json.loads((smoke_project / f"reports/{stage}/run.json").read_text())
        assert record["seconds"] > 0 and record["peak_memory_mb"] > 0


def test_no_pickle_among_the_models(smoke_project):
    suffixes = {path.suffix for path in (smoke_project / "models").rglob("*") if path.is_file()}
    assert not suffixes & {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def test_a_second_repro_runs_nothing(smoke_project):
    output = dvc(smoke_project, "repro").stdout
    assert "Running stage" not in output and "up to date" in output


def test_git_sees_no_model_and_no_derived_data(smoke_project):
    command = ["git", "status", "--porcelain", "--untracked-files=all"]
    listed = subprocess.run(command, cwd=smoke_project, capture_output=True, text=True, check=True).stdout
    assert not re.search(r"(models/|data/(pairs|tokenized|reference_logps)/)", listed)


def test_params_diff_shows_the_changed_number(smoke_project):
    rows = json.loads(dvc(smoke_project, "params", "diff", "--json").stdout)
    assert rows["params.yaml"]["fetch_base.path"]["new"] == "data/base_smoke.json"


def test_metrics_and_plots_show(smoke_project):
    shown = json.loads(dvc(smoke_project, "metrics", "show", "--json").stdout)
    files = shown[""]["data"]
    for stage in IN_ORDER:
        assert "error" not in files[f"reports/{stage}/run.json"]
    assert "rewards/accuracies" in str(files["reports/train_dpo/metrics.json"])
    page = Path(dvc(smoke_project, "plots", "show").stdout.strip().removeprefix("file://"))
    assert page.exists()
    assert "cdn.jsdelivr.net" not in page.read_text()


def test_a_failed_stage_exits_non_zero_names_the_key_and_leaves_the_model(smoke_project):
    before = (smoke_project / "params.yaml").read_text()
    lock = (smoke_project / "dvc.lock").read_text()
    try:
        set_param(smoke_project, "train_dpo.beta", -1.0)
        result = dvc(smoke_project, "repro", check=False)
    finally:
        (smoke_project / "params.yaml").write_text(before)
    assert result.returncode != 0
    assert "params.yaml: 'train_dpo.beta' must be float above 0, not -1.0" in result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert (smoke_project / "dvc.lock").read_text() == lock
    dvc(smoke_project, "repro")  # from the cache: the model is there as before
    assert (smoke_project / "models/dpo/model.safetensors").exists()


def test_a_mistyped_path_is_named_by_its_key_under_plain_dvc_and_another_one_fetches_no_base(smoke_project):
    before, lock = ((smoke_project / name).read_text() for name in ("params.yaml", "dvc.lock"))
    try:
        set_param(smoke_project, "fetch_pairs.path", "data/pairs_embeded.jsonl")
        for target in ([], ["inspect_pairs"]):
            result = dvc(smoke_project, "repro", *target, check=False)
            assert result.returncode != 0 and "Errno" not in result.stdout + result.stderr
            assert "fetch_pairs.path is data/pairs_embeded.jsonl: no such file (did you mean" in result.stderr
            assert (smoke_project / "dvc.lock").read_text() == lock
        set_param(smoke_project, "fetch_pairs.path", "data/prompts_embedded.jsonl")
        output = dvc(smoke_project, "repro", "fetch_base").stdout
        assert re.findall(r"Running stage '(\w+)'", output) == ["check_paths"]
    finally:
        (smoke_project / "params.yaml").write_text(before)
        dvc(smoke_project, "repro", "fetch_base")
    assert (smoke_project / "dvc.lock").read_text() == lock


@pytest.mark.slow
def test_a_changed_beta_reruns_only_what_depends_on_it_for_real(smoke_project):
    before = (smoke_project / "params.yaml").read_text()
    try:
        set_param(smoke_project, "train_dpo.beta", 0.3)
        output = dvc(smoke_project, "repro").stdout
    finally:
        (smoke_project / "params.yaml").write_text(before)
    assert set(re.findall(r"Running stage '(\w+)'", output)) == AFTER_DPO
    # back again: the model comes from the run-cache; stages with outs in Git, which DVC does not cache, run again
    output = dvc(smoke_project, "repro").stdout
    assert set(re.findall(r"Running stage '(\w+)'", output)) == AFTER_DPO - {"train_dpo"}


def test_two_processes_under_the_same_stage(smoke_project, monkeypatch):
    # the launcher is no parameter: it reruns nothing by itself; forced, it gives the same but for rounding
    heldout = smoke_project / "reports/train_dpo/metrics.json"
    lock = (smoke_project / "dvc.lock").read_text()
    before = json.loads(heldout.read_text())["heldout"]
    with monkeypatch.context() as launcher:
        launcher.setenv("LAUNCH", "torchrun --standalone --nproc_per_node 2")
        launcher.setenv("OMP_NUM_THREADS", "1")
        assert "Running stage" not in dvc(smoke_project, "repro").stdout
        output = dvc(smoke_project, "repro", "--force", "--single-item", "train_dpo").stdout
    assert "Running stage 'train_dpo'" in output
    after = json.loads(heldout.read_text())["heldout"]
    assert json.loads((smoke_project / "reports/train_dpo/run.json").read_text())["processes"] == 2
    assert after["rewards/margins"] == pytest.approx(before["rewards/margins"], rel=1e-2, abs=1e-4)
    # and one process, with as many threads as at first, gives the first run's very bytes again
    dvc(smoke_project, "repro", "--force", "--single-item", "train_dpo")
    assert (smoke_project / "dvc.lock").read_text() == lock
