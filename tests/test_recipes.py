import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from transformers import AutoModelForCausalLM, LlamaConfig

from stages.lib.model.memory import tokens_that_fit
from stages.lib.run.params import load_params, read_params
from tests.conftest import REPO
from tests.support.sections import class_of

RECIPES = sorted((REPO / "recipes").glob("*.txt"))
LINE = re.compile(r"-S ([a-z_]+)\.([a-z0-9_.]+)=([^\s'\"#]+)")  # what xargs passes on unchanged


def overrides(recipe):
    return [LINE.fullmatch(line).groups() for line in recipe.read_text().splitlines()]


def test_the_recipes_are_there():
    assert {recipe.stem for recipe in RECIPES} == {
        "homework",
        "human-like",
        "smollm2-1.7b-lora",
        "smollm2-360m",
        "smoke",
    }


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


@pytest.mark.parametrize("name", ["smollm2-1.7b-lora", "smollm2-360m"])
def test_larger_siblings_train_on_more_than_a_few_embedded_pairs(name):
    values = {f"{section}.{key}": value for section, key, value in overrides(REPO / f"recipes/{name}.txt")}
    defaults = read_params(REPO)
    assert int(values["train_dpo.max_steps"]) > 10 * defaults["train_dpo"]["max_steps"]
    assert int(values["train_ppo.episodes"]) > 2 * defaults["train_ppo"]["episodes"]
    lengths = {values[f"{stage}.response_length"] for stage in ("train_dpo", "train_ppo")}
    assert lengths == {values["sample_responses.max_new_tokens"]}  # what is trained is what is measured
    assert values["fetch_pairs.eval_prompts"] == "false"  # the embedded ones are of another kind than this data


def test_the_memory_that_the_readme_gives_for_a_t4(tmp_path):
    """By hand and by the project's own arithmetic, on a model without memory; no such card was at hand."""
    values = {
        f"{section}.{key}": value for section, key, value in overrides(REPO / "recipes/smollm2-1.7b-lora.txt")
    }
    config = LlamaConfig(
        vocab_size=49152, hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
        num_key_value_heads=32, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        rank = int(values["lora.rank"])
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules="all-linear"))
    # a layer: q, k, v, o of 2048 x 2048, three of 2048 x 8192
    linear, embedding = 24 * (4 * 2048**2 + 3 * 2048 * 8192), 49152 * 2048
    # ... and of an adapter both sides of each
    adapters = rank * 24 * (4 * (2048 + 2048) + 3 * (2048 + 8192))
    assert sum(weight.numel() for weight in model.parameters() if weight.requires_grad) == adapters
    held = 2 * (linear + embedding) + 4 * embedding + 4 * adapters  # fp16, the output layer cut loose; fp32
    free = 15.6e9 - 0.5e9 - held  # a T4's 14.6 GiB, less what CUDA itself takes
    tokens = tokens_that_fit(free, model, training=True)
    assert tokens > read_params(REPO)["tokenize_pairs"]["max_length"]  # every answer in one pass
    text = " ".join((REPO / "recipes/README.md").read_text(encoding="utf-8").split())
    assert f"held {held / 1e9:.1f} GB" in text and f"passes of {tokens // 100 * 100:,} tokens" in text
