import re

import pytest
from ruamel.yaml import YAML

from stages.lib.run.params import load_params, read_params
from tests.conftest import REPO
from tests.support.sections import class_of

RECIPES = sorted((REPO / "recipes").glob("*.txt"))
LINE = re.compile(r"-S ([a-z_]+)\.([a-z_.]+)=([^\s'\"#]+)")  # what xargs passes on unchanged


def overrides(recipe):
    return [LINE.fullmatch(line).groups() for line in recipe.read_text().splitlines()]


def test_the_recipes_are_there():
    assert {recipe.stem for recipe in RECIPES} == {"homework", "human-like", "smollm2-360m", "smoke"}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_every_line_is_an_override_of_a_key_that_exists(recipe):
    params = read_params(REPO)
    keys = [(section, key) for section, key, _ in overrides(recipe)]
    assert len(keys) == len(set(keys))
    for section, key in keys:
        assert key in params[section], f"{section}.{key}"


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_stages_accept_the_values(recipe, tmp_path):
    yaml = YAML()
    params = yaml.load((REPO / "params.yaml").read_text(encoding="utf-8"))
    for section, key, value in overrides(recipe):
        params[section][key] = YAML(typ="safe").load(value)
    with open(tmp_path / "params.yaml", "w", encoding="utf-8") as file:
        yaml.dump(params, file)
    for section in params:
        assert load_params(section, class_of(section), tmp_path)


def test_the_homework_keeps_the_notebooks_values(tmp_path):
    values = {f"{section}.{key}": value for section, key, value in overrides(REPO / "recipes/homework.txt")}
    assert values["fetch_base.hub_id"] == "HuggingFaceTB/SmolLM-135M-Instruct"
    assert values["fetch_pairs.hub_id"] == "HumanLLMs/Human-Like-DPO-Dataset"
    assert "fetch_pairs.max_pairs" not in values
    assert float(values["train_dpo.learning_rate"]) == 5e-5 and float(values["train_dpo.beta"]) == 1.0
    assert float(values["train_reward.learning_rate"]) == 3e-4 and int(values["train_reward.epochs"]) == 1
    assert int(values["train_dpo.batch_size"]) == int(values["train_reward.batch_size"]) == 16
    assert int(values["train_ppo.episodes"]) >= 2_000


def test_human_like_is_the_homeworks_model_and_data_with_our_own_settings():
    ours, homework = (
        dict(((s, k), v) for s, k, v in overrides(REPO / f"recipes/{name}.txt"))
        for name in ("human-like", "homework")
    )
    for section in ("fetch_base", "fetch_pairs"):
        assert {k: v for k, v in ours.items() if k[0] == section} == {
            k: v for k, v in homework.items() if k[0] == section
        }
    # of the trainings only what more and longer answers, or more memory, ask for
    dials = {"micro_batch_tokens", "eval_steps", "look_steps", "response_length"}
    assert {key for section, key in ours if section.startswith("train_")} <= dials


def test_the_homework_is_the_notebooks_without_corrupted_copies():
    values = {f"{section}.{key}": value for section, key, value in overrides(REPO / "recipes/homework.txt")}
    assert values["train_reward.hard_negatives"] == "false" and float(values["train_dpo.hard_negatives"]) == 0
    assert float(values["fetch_pairs.judge_fraction"]) == 0.1 and values["fetch_pairs.eval_prompts"] == "false"
