"""One step of every stage with adapters: the sizes are what is measured, so here they are tiny."""

import json

import pytest
from ruamel.yaml import YAML

from bench import one_step
from tests.conftest import REPO

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1024}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.slow  # every stage in a process of its own
def test_every_stage_makes_its_step_and_nothing_stays(tmp_path):
    output = tmp_path / "result.json"
    one_step.main(["--sizes", json.dumps(SIZES), "--folder", str(tmp_path), "--output", str(output)])
    result = json.loads(output.read_text())
    stages = YAML(typ="safe").load(REPO / "dvc.yaml")["stages"]
    assert list(result["stages"]) == [stage for stage in stages if stage != "check_paths"]
    assert result["peak_memory_mb"] == max(each["peak_memory_mb"] for each in result["stages"].values())
    assert result["parameters"] < 1e6
    assert list(tmp_path.iterdir()) == [output]


def test_what_it_changes_are_keys_of_params_yaml():
    params = one_step.read_params(REPO)
    for changes in (one_step.CHANGES, one_step.smoke_changes()):
        assert all(key in params[section] for section, values in changes.items() for key in values)
