"""The stage end to end on the tiny model: what it writes, what it refuses, what it counts."""

import json

import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.lib.model.loading import save_model, set_seed
from stages.lib.model.reward import load_reward_model, new_reward_model, score_sequences
from stages.lib.rl.ppo import Answers
from stages.lib.run.artefacts import write_parquet
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, load_params
from stages.train_ppo import Params, habits_of, main
from tests.conftest import REPO

BASE = Base(seed=42, precision="fp32")
PARAMS = Params(
    policy="base",
    episodes=12,
    batch_size=4,
    num_mini_batches=2,
    num_ppo_epochs=2,
    learning_rate=1e-3,
    value_learning_rate=1e-3,
    response_length=10,
    temperature=0.7,
    kl_coef=0.05,
    kl_target=None,
    target_kl=None,
    missing_eos_penalty=1.0,
    score_norm_episodes=4,
    value_warmup_updates=1,
    whiten_advantages=True,
    gamma=1.0,
    lam=0.95,
    cliprange=0.2,
    cliprange_value=0.2,
    vf_coef=0.1,
    max_grad_norm=1.0,
    max_kl=50.0,
    min_entropy=0.0,
    eval_prompts=5,
    eval_every=2,
    micro_batch_tokens=512,
)


@pytest.fixture
def root(tiny_base, tokenizer, embedded_pairs):
    """A project root with base, reward model and tokenized prompts: 10 for training, 6 held out."""
    torch.set_num_threads(1)
    set_seed(1)
    reward_model = new_reward_model(tiny_base / "models/base", tokenizer.pad_token_id)
    save_model(reward_model, tokenizer, tiny_base / "models/reward")
    for split, rows in (("train", embedded_pairs[:10]), ("heldout", embedded_pairs[10:16])):
        prompts = [row["prompt"] for row in rows]
        messages = [[{"role": "user", "content": prompt}] for prompt in prompts]
        ids = [tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=False) for m in messages]
        columns = {"prompt_id": [100 + i for i in range(len(rows))], "prompt": prompts, "input_ids": ids}
        write_parquet(tiny_base / f"data/tokenized/prompts_{split}.parquet", columns)
    return tiny_base


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")


def metrics_of(root):
    return json.loads((root / "reports/train_ppo/metrics.json").read_text())


def test_writes_policy_and_reports(root, tokenizer):
    facts = main(BASE, PARAMS, root)

    start = AutoModelForCausalLM.from_pretrained(root / "models/base")
    policy = AutoModelForCausalLM.from_pretrained(root / "models/ppo")
    assert not torch.equal(policy.lm_head.weight, start.lm_head.weight)
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id
    assert policy.generation_config.pad_token_id == policy.config.pad_token_id == tokenizer.pad_token_id
    assert AutoTokenizer.from_pretrained(root / "models/ppo").chat_template == tokenizer.chat_template
    names = {path.name for path in (root / "models/ppo").iterdir()}
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in names)

    history = pd.read_csv(root / "reports/train_ppo/history.csv")
    assert history["step"].tolist() == [1, 2, 3] and history["episode"].tolist() == [4, 8, 12]
    assert {"objective/kl", "objective/scores", "policy/approxkl_avg", "val/ratio", "lr"} <= set(history.columns)
    assert "eps" not in history.columns and history.notna().all(axis=None)

    scores = pd.read_csv(root / "reports/train_ppo/heldout_scores.csv")
    metrics = metrics_of(root)
    assert len(scores) == metrics["heldout_prompts"] == 5
    assert metrics["score_before"] == pytest.approx(scores["score_before"].mean(), rel=1e-4)
    gains = scores["score_after"] - scores["score_before"]
    assert metrics["score_gain"] == pytest.approx(gains.mean(), rel=1e-3, abs=1e-5)
    assert metrics["score_gain_low"] <= metrics["score_gain"] <= metrics["score_gain_high"]
    assert metrics["episodes"] == 12 and metrics["updates"] == 3 and metrics["stopped_early"] is None
    assert metrics["kept_update"] in (2, 3)
    assert (
        set(metrics["before"])
        == set(metrics["after"])
        >= {"eos_rate", "distinct_2", "question_rate", "emoji_rate"}
    )
    assert pd.read_csv(root / "reports/train_ppo/evaluations.csv")["update"].tolist() == [2, 3]
    assert facts["tokens"] > 0 and facts["precision"] == "fp32" and facts["shared_backbone"]


def test_same_seed_same_reports(root):
    reports = []
    for _ in range(2):
        main(BASE, PARAMS, root)
        files = sorted((root / "reports/train_ppo").glob("*.*"))
        reports.append([(path.name, path.read_bytes()) for path in files])
    assert len(reports[0]) == 4 and reports[0] == reports[1]


def test_a_learning_rate_of_nearly_nothing_gains_nothing(root):
    # before and after are answered with the same random numbers: an unchanged policy gives the same answers
    main(BASE, PARAMS.replace(learning_rate=1e-12), root)
    metrics = metrics_of(root)
    assert metrics["score_gain"] == pytest.approx(0, abs=1e-6) and metrics["kl"] == pytest.approx(0, abs=1e-4)
    assert metrics["before"] == metrics["after"]


def test_starts_from_the_dpo_model_and_prices_kl_to_it(root, tokenizer):
    dpo = AutoModelForCausalLM.from_pretrained(root / "models/base")
    with torch.no_grad():
        dpo.lm_head.weight.mul_(1.5)
    save_model(dpo, tokenizer, root / "models/dpo")
    facts = main(BASE, PARAMS.replace(policy="dpo"), root)
    history = pd.read_csv(root / "reports/train_ppo/history.csv")
    assert history["objective/kl"][0] == pytest.approx(0, abs=1e-5)
    assert not facts["shared_backbone"]  # tied weights: another output layer is another embedding


def test_a_collapse_before_anything_was_kept_is_an_error(root):
    with pytest.raises(UserError, match="collapsed before.*learning_rate"):
        main(BASE, PARAMS.replace(min_entropy=50.0), root)
    assert not (root / "models/ppo").exists()


def test_too_few_prompts_are_an_error(root):
    with pytest.raises(UserError, match="10 training prompts are fewer than train_ppo.batch_size=16"):
        main(BASE, PARAMS.replace(batch_size=16, episodes=64), root)


def test_a_reward_model_without_its_head_is_an_error(root, tokenizer):
    save_model(AutoModelForCausalLM.from_pretrained(root / "models/base"), tokenizer, root / "models/reward")
    with pytest.raises(UserError, match="score.weight"):
        main(BASE, PARAMS, root)


def test_heldout_scores_are_those_of_the_answers(root, monkeypatch):
    seen = {}
    from stages import train_ppo

    class Recorder(train_ppo.PPOTrainer):
        def answer(self, prompts, seed):
            answers = super().answer(prompts, seed)
            seen[seed] = prompts, answers  # the last call with each seed
            return answers

    monkeypatch.setattr(train_ppo, "PPOTrainer", Recorder)
    main(BASE, PARAMS, root)
    prompts, answers = seen[1_000_042]
    scores = pd.read_csv(root / "reports/train_ppo/heldout_scores.csv")["score_after"].tolist()
    closed = [p + r + [2] * (r[-1] != 2) for p, r in zip(prompts, answers.responses, strict=True)]
    expected = score_sequences(load_reward_model(root / "models/reward"), closed, 512, "fp32")
    assert scores == pytest.approx(expected, abs=1e-5)


def test_habits_by_hand(tokenizer):
    texts = ["Why? Why? Oh!", "no marks 😀😀"]
    ids = [tokenizer(text)["input_ids"] for text in texts]
    answers = Answers([ids[0] + [2], ids[1]], [True, False], [0.0, 0.0], [0.0, 0.0], 1.5)
    habits = habits_of(answers, tokenizer)
    assert habits["eos_rate"] == 0.5 and habits["entropy"] == 1.5
    assert habits["question_rate"] == 1.0 and habits["exclamation_rate"] == 0.5 and habits["emoji_rate"] == 1.0
    assert habits["response_length"] == (len(ids[0]) + 1 + len(ids[1])) / 2
    assert habits["distinct_2"] == 1.0  # why-why, why-oh, no-marks


def test_committed_params_are_valid():
    params = load_params("train_ppo", Params, REPO)
    assert params.episodes >= 96 and params.response_length >= 96 and params.missing_eos_penalty > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"lam": 1.5}, "lam"),
        ({"target_kl": -1.0}, "target_kl"),
        ({"num_mini_batches": 3}, "multiple of num_mini_batches"),
        ({"value_warmup_updates": 3}, "leave no update"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty"),
    ],
)
def test_bad_params_are_named(change, message):
    with pytest.raises(ValidationError, match=message):
        PARAMS.replace(**change)
