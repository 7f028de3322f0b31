"""Other families than Llama: random weights through every stage that runs a model, against transformers' own passes."""

import importlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from stages.lib.model.logps import get_log_prob
from stages.lib.run.artefacts import read_parquet, read_rows
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, load_params
from tests.conftest import REPO, TINY
from tests.support.sections import class_of

BASE = Base(seed=42, precision="fp32")
SIZES = TINY | {"max_position_embeddings": 512}
LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
LLAMA_3 |= {"original_max_position_embeddings": 128}
GEMMA_3: dict[str, Any] = SIZES | dict(
    head_dim=16, query_pre_attn_scalar=16, layer_types=["sliding_attention", "full_attention"]
)
FAMILIES: dict[str, PreTrainedConfig] = {  # name: a small model with what sets the family apart
    "Llama 3": LlamaConfig(**SIZES, rope_parameters=LLAMA_3),
    "Qwen2, Qwen2.5": Qwen2Config(**SIZES),
    "Qwen3": Qwen3Config(**SIZES, head_dim=16),
    "Gemma 3 (text)": Gemma3TextConfig(**GEMMA_3, sliding_window=512),
    "Phi-3": Phi3Config(**SIZES, original_max_position_embeddings=512, pad_token_id=0),
    "GPT-2": GPT2Config(vocab_size=512, n_positions=512, n_embd=32, n_layer=2, n_head=4),
    "SmolLM3": SmolLM3Config(**SIZES, no_rope_layer_interval=2, pad_token_id=0),
}
NOTES = {
    "Llama 3": "its template's date is fixed",
    "Qwen2, Qwen2.5": "",
    "Qwen3": "answers without thinking",
    "Gemma 3 (text)": "while `tokenize_pairs.max_length` is within its window (512 or 1,024 tokens), else refused",
    "Phi-3": "as Gemma 3, with a window of 2,047 tokens",
    "GPT-2": "an instruction-tuned one, with a chat template; at most 1,024 positions",
    "SmolLM3": "answers without thinking; its template's date is fixed",
}
CHANGES = {
    "base.precision": "fp32",
    "fetch_base.path": "source",
    "fetch_pairs.max_pairs": 24,
    "lora.alpha": 8.0,
    "tokenize_pairs.max_length": 120,
    "train_dpo.max_steps": 2,
    "train_ppo.episodes": 8,
    "train_ppo.response_length": 8,
}
pytestmark = pytest.mark.usefixtures("few_pairs_do_for_the_judge")


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")


def make_root(root: Path, config: PreTrainedConfig, tokenizer) -> Path:
    """A project root as of the smoke recipe, whose `source` is a random model of the family."""
    torch.manual_seed(0)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config.update(ids)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / "source")
    tokenizer.save_pretrained(root / "source")
    shutil.copytree(REPO / "data", root / "data", ignore=shutil.ignore_patterns("*.parquet", "*_cache", "[!pue]*"))
    shutil.copy(REPO / "params.yaml", root)
    lines = [line.split()[1].split("=") for line in (REPO / "recipes/smoke.txt").read_text().splitlines()]
    set_params(root, {key: YAML(typ="safe").load(value) for key, value in lines} | CHANGES)
    return root


def set_params(root: Path, changes: dict[str, Any]) -> None:
    yaml = YAML()
    params = yaml.load((root / "params.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, name = key.split(".")
        params[section][name] = value
    with open(root / "params.yaml", "w", encoding="utf-8") as file:
        yaml.dump(params, file)


def run(root: Path, *stages: str, **changes: Any) -> dict[str, Any]:
    """Runs the stages with these changes: what the last one says of its run."""
    set_params(root, {key.replace("__", "."): value for key, value in changes.items()})
    facts = {}
    for stage in stages:
        params = load_params(stage, class_of(stage), root)
        facts = importlib.import_module(f"stages.{stage}").main(BASE, params, root)
    return facts


DATA = ("fetch_base", "fetch_pairs", "corrupt_answers", "tokenize_pairs")


@torch.no_grad()
def check_reference(root: Path) -> None:
    """The reference's log-probs are those of transformers' own pass over each answer alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(root / "models/base", dtype=torch.float32).eval()
    pairs = read_rows(root / "data/tokenized/pairs_heldout.parquet")
    found = read_parquet(root / "data/reference_logps/pairs_heldout.parquet")
    for side in ("chosen", "rejected"):
        for row, logp in zip(pairs[:3], found[f"{side}_logps"], strict=False):
            ids = torch.tensor([row["prompt_input_ids"] + row[f"{side}_input_ids"]])
            mask = (torch.arange(ids.shape[1]) >= len(row["prompt_input_ids"])).long()[None]
            expected = get_log_prob(model(ids).logits, ids, mask).item()
            assert logp == pytest.approx(expected, abs=2e-3)


@torch.no_grad()
def check_answers(root: Path) -> None:
    """Greedy answers are those of transformers' own decoding."""
    answers = [row for row in read_rows(root / "data/answers.parquet") if row["decoding"] == "greedy"]
    prompts = {row["prompt_id"]: row for row in read_rows(root / "data/tokenized/prompts_heldout.parquet")}
    for name in ("dpo", "ppo"):
        model: Any = AutoModelForCausalLM.from_pretrained(root / f"models/{name}", dtype=torch.float32).eval()
        row = next(row for row in answers if row["model"] == name)
        ids = torch.tensor([prompts[row["prompt_id"]]["input_ids"]])
        out = model.generate(ids, max_new_tokens=12, do_sample=False, suppress_tokens=[0])[0, ids.shape[1] :]
        assert row["response_ids"] == out.tolist()[: len(row["response_ids"])]


def changed(root: Path, name: str) -> int:
    found, base = (load_file(root / f"models/{model}/model.safetensors") for model in (name, "base"))
    return sum(not torch.equal(found[key], base[key]) for key in base.keys() & found.keys())


def test_qwen3_with_adapters(tmp_path, tokenizer):
    """A lean look; the slow tests have all families, and all stages."""
    root = make_root(tmp_path, FAMILIES["Qwen3"], tokenizer)
    run(root, *DATA, "reference_logps", "train_dpo", lora__rank=4)
    check_reference(root)
    assert changed(root, "dpo") == 14  # q, k, v, o and three of the MLP in two layers


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs_through_every_stage(tmp_path, tokenizer, family):
    root = make_root(tmp_path, FAMILIES[family], tokenizer)
    run(root, *DATA, "reference_logps", "train_dpo", lora__rank=4)
    check_reference(root)
    assert 0 < changed(root, "dpo") < len(load_file(root / "models/base/model.safetensors"))
    assert (root / "models/dpo/adapter").is_dir()
    run(root, "train_reward", "train_ppo")
    assert changed(root, "reward") == 0 and (root / "models/ppo/adapter").is_dir()
    run(root, "train_reward", train_reward__backbone="lora", train_reward__hard_negatives=False)
    assert changed(root, "reward") > 0
    assert run(root, "train_ppo")["shared_backbone"]
    run(root, "train_ppo", "train_dpo", lora__rank=None, train_reward__backbone="frozen")
    run(root, "train_reward", "train_judge", "train_ppo", "sample_responses", "score_responses")
    assert changed(root, "reward") == 0 and changed(root, "dpo") > 0
    run(root, "analyze_logps")
    check_answers(root)


@pytest.mark.parametrize("family", ["Gemma 3 (text)", "Phi-3"])
def test_a_window_shorter_than_the_answers_is_refused(tmp_path, tokenizer, family):
    config = {"Gemma 3 (text)": Gemma3TextConfig, "Phi-3": Phi3Config}[family]
    sizes = GEMMA_3 if family.startswith("Gemma") else SIZES | {"original_max_position_embeddings": 512}
    root = make_root(tmp_path, config(**sizes, sliding_window=32, pad_token_id=0), tokenizer)
    run(root, *DATA)
    with pytest.raises(UserError, match="windowed attention over .* choose another base model or a smaller"):
        run(root, "reference_logps")


def test_the_table_of_families_is_that_of_the_tests():
    rows = [f"| {family} | {NOTES[family]} |" for family in FAMILIES]
    table = "\n".join(["| family | |", "|---|---|", *rows])
    assert table in (REPO / "recipes/README.md").read_text(encoding="utf-8")
