"""Train the policy with PPO against the reward model, at a price for leaving the frozen start.

Reads   models/<policy> (start and reference), models/reward (score and value), data/tokenized/prompts_*.parquet
Writes  models/ppo                             policy weights and tokenizer
        reports/train_ppo/history.csv          one row per update, TRL's metric names
        reports/train_ppo/evaluations.csv      one row per look at held-out prompts during training
        reports/train_ppo/heldout_scores.csv   scores of held-out prompts, answered before and after
        reports/train_ppo/metrics.json         did it help: the gain with its interval, KL, and what else changed
        reports/train_ppo/run.json             seconds by phase, tokens/s, memory, versions

Run     dvc repro train_ppo                    (untracked: python -m stages.train_ppo)
"""

import math
import tempfile
from pathlib import Path
from typing import Literal, Self

import numpy as np
from datasets import Dataset
from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerBase, ProgressCallback

from stages.lib.analysis.stats import mean_interval
from stages.lib.analysis.text_features import count_emoji, count_exclamations, count_questions, distinct_n
from stages.lib.model.loading import (
    load_causal_lm,
    load_tokenizer,
    pick_device,
    pick_precision,
    save_model,
    set_seed,
)
from stages.lib.model.reward import load_reward_model
from stages.lib.rl.ppo import Answers, PPOTrainer
from stages.lib.rl.ppo_config import PPOConfig
from stages.lib.run.artefacts import read_parquet, round_floats, write_history, write_json
from stages.lib.run.checkpoints import Checkpoints
from stages.lib.run.draws import draw
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, Section
from stages.lib.run.stage import run_stage

BOOTSTRAP_SAMPLES = 10_000
CONFIDENCE = 0.95


class Params(Section):
    policy: Literal["base", "dpo"]  # where PPO starts, which is also its frozen reference
    episodes: int = Field(gt=0)  # prompts answered in training, repeats included
    batch_size: int = Field(gt=0)  # episodes per update
    num_mini_batches: int = Field(gt=0)  # optimizer steps per pass over an update's episodes
    num_ppo_epochs: int = Field(gt=0)  # passes over an update's episodes
    learning_rate: float = Field(gt=0)  # of the policy, decaying linearly to 0
    value_learning_rate: float = Field(gt=0)  # of the value model, likewise
    response_length: int = Field(gt=0)  # tokens, at most
    temperature: float = Field(gt=0)  # of sampling, in training and evaluation
    kl_coef: float = Field(ge=0)  # price of one nat of KL to the reference, per token
    kl_target: float | None = Field(gt=0)  # nats per answer that kl_coef is adapted to; or fixed
    target_kl: float | None = Field(gt=0)  # approxkl above which an update leaves the policy alone
    missing_eos_penalty: float = Field(ge=0)  # taken off the score of an answer that does not end
    score_norm_episodes: int = Field(ge=0)  # reference answers that set the scores' mean 0 and sd 1; 0: raw scores
    value_warmup_updates: int = Field(ge=0)  # first updates train the value model alone
    whiten_advantages: bool  # to mean 0 and variance 1
    gamma: float = Field(gt=0, le=1)  # discount
    lam: float = Field(gt=0, le=1)  # of GAE
    cliprange: float = Field(gt=0)  # of the probability ratio
    cliprange_value: float = Field(gt=0)  # of the value
    vf_coef: float = Field(ge=0)  # weight of the value loss
    max_grad_norm: float = Field(ge=0)  # clipping, of policy and value model apart; 0: none
    max_kl: float = Field(gt=0)  # nats per answer above which the policy counts as collapsed, or is not kept
    min_entropy: float = Field(ge=0)  # nats per token below which the policy counts as collapsed
    eval_prompts: int | None = Field(gt=0)  # held-out prompts answered before and after; null: all
    eval_every: int = Field(ge=0)  # updates between looks at them, to keep the best policy; 0: keep the last
    micro_batch_tokens: int = Field(gt=0)  # memory dial: tokens per forward and backward pass

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.num_mini_batches:
            raise ValueError("batch_size must be a multiple of num_mini_batches")
        if self.num_updates <= self.value_warmup_updates:
            raise ValueError("value_warmup_updates leave no update to the policy")
        return self

    @property
    def num_updates(self) -> int:
        return math.ceil(self.episodes / self.batch_size)


def config_of(params: Params, base: Base, precision: str, use_cpu: bool, folder: str) -> PPOConfig:
    """TRL's configuration, each knob of ours by name."""
    return PPOConfig(
        output_dir=folder,
        total_episodes=params.episodes,
        per_device_train_batch_size=params.batch_size,
        gradient_accumulation_steps=1,  # a batch is split by micro_batch_tokens
        num_mini_batches=params.num_mini_batches,
        num_ppo_epochs=params.num_ppo_epochs,
        local_rollout_forward_batch_size=64,  # answers generated at a time; TRL's default
        learning_rate=params.learning_rate,
        value_learning_rate=params.value_learning_rate,
        response_length=params.response_length,
        stop_token="eos",  # unset, TRL never stops an answer
        temperature=params.temperature,
        kl_coef=params.kl_coef,
        kl_target=params.kl_target,
        target_kl=params.target_kl,
        missing_eos_penalty=params.missing_eos_penalty,
        score_norm_episodes=params.score_norm_episodes,
        value_warmup_updates=params.value_warmup_updates,
        whiten_advantages=params.whiten_advantages,
        gamma=params.gamma,
        lam=params.lam,
        cliprange=params.cliprange,
        cliprange_value=params.cliprange_value,
        vf_coef=params.vf_coef,
        max_grad_norm=params.max_grad_norm,
        max_kl=params.max_kl,
        min_entropy=params.min_entropy,
        eval_every=params.eval_every,
        micro_batch_tokens=params.micro_batch_tokens,
        seed=base.seed,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        use_cpu=use_cpu,
        num_sample_generations=0,
        save_strategy="no",  # models/ppo is written at the end
        report_to="none",
        logging_steps=1,
    )


class ScoreBar(ProgressCallback):
    """TRL's progress bar with score and KL beside it, in place of a line of all figures per update."""

    def on_log(self, args, state, control, logs=None, **_):
        if self.training_bar is not None:
            self.training_bar.set_postfix({name: f"{logs[f'objective/{name}']:.2f}" for name in ("scores", "kl")})


def habits_of(answers: Answers, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """How a policy answers: what its score may have been bought with. Marks and emoji are counted per answer."""
    texts = tokenizer.batch_decode(answers.responses, skip_special_tokens=True)
    return {
        "eos_rate": float(np.mean(answers.ended)),
        "response_length": float(np.mean([len(ids) for ids in answers.responses])),
        "entropy": answers.entropy,
        "distinct_2": distinct_n(texts, 2),
        "question_rate": float(np.mean([count_questions(text) for text in texts])),
        "exclamation_rate": float(np.mean([count_exclamations(text) for text in texts])),
        "emoji_rate": float(np.mean([count_emoji(text) for text in texts])),
    }


def main(base: Base, params: Params, root: Path = Path(".")) -> dict:
    with Checkpoints("train_ppo", root, base, params) as checkpoints:
        return train_and_report(base, params, root, checkpoints)


def train_and_report(base: Base, params: Params, root: Path, checkpoints: Checkpoints) -> dict:
    device = pick_device()
    precision = pick_precision(base.precision, device)
    train = read_parquet(root / "data/tokenized/prompts_train.parquet")
    heldout = read_parquet(root / "data/tokenized/prompts_heldout.parquet")
    drawn = draw(len(heldout["prompt_id"]), params.eval_prompts, base.seed, "eval_prompts")
    heldout = {name: [values[i] for i in drawn] for name, values in heldout.items()}
    if len(train["input_ids"]) < params.batch_size:
        raise UserError(
            f"{len(train['input_ids'])} training prompts are fewer than train_ppo.batch_size={params.batch_size}"
        )
    tokenizer = load_tokenizer(root / "models/reward")
    set_seed(base.seed)

    with tempfile.TemporaryDirectory() as scratch:
        trainer = PPOTrainer(
            args=config_of(params, base, precision, device.type == "cpu", scratch),
            processing_class=tokenizer,
            model=load_causal_lm(root / "models" / params.policy),
            ref_model=load_causal_lm(root / "models" / params.policy),
            reward_model=load_reward_model(root / "models/reward"),
            value_model=load_reward_model(root / "models/reward"),
            train_dataset=Dataset.from_dict({"input_ids": train["input_ids"]}),
            eval_dataset=Dataset.from_dict({"input_ids": heldout["input_ids"]}),
        )
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ScoreBar)
        # the same prompts and random numbers before and after; other numbers than those that chose the policy
        before = trainer.answer(heldout["input_ids"], seed=base.seed + 1_000_000)
        trainer.train(checkpoints)
        if trainer.collapsed and trainer.kept_update is None:
            raise UserError(
                f"PPO collapsed before any policy was worth keeping: {trainer.collapsed}. Lower "
                "train_ppo.learning_rate, raise train_ppo.kl_coef or set train_ppo.target_kl"
            )
        after = trainer.answer(heldout["input_ids"], seed=base.seed + 1_000_000)

    gain = mean_interval(
        np.subtract(after.scores, before.scores), heldout["prompt_id"], BOOTSTRAP_SAMPLES, CONFIDENCE, base.seed
    )
    metrics = {
        "episodes": trainer.state.episode,
        "updates": trainer.state.global_step,
        "kept_update": trainer.kept_update or trainer.state.global_step,
        "stopped_early": trainer.collapsed,
        "heldout_prompts": len(heldout["prompt_id"]),
        "score_before": float(np.mean(before.scores)),
        "score_after": float(np.mean(after.scores)),
        **gain.as_metrics("score_gain"),
        "kl": float(np.mean(after.kl)),
        "before": habits_of(before, tokenizer),
        "after": habits_of(after, tokenizer),
    }
    scores = zip(heldout["prompt_id"], before.scores, after.scores, strict=True)
    names = ("prompt_id", "score_before", "score_after")
    history = [{"step": row["step"]} | row for row in trainer.state.log_history]
    reports = root / "reports/train_ppo"
    save_model(trainer.policy, tokenizer, root / "models/ppo")
    write_history(reports / "history.csv", round_floats([without_times(row) for row in history], 8))
    write_history(reports / "evaluations.csv", round_floats(trainer.evaluations, 8))
    write_history(
        reports / "heldout_scores.csv", round_floats([dict(zip(names, row, strict=True)) for row in scores], 8)
    )
    write_json(reports / "metrics.json", round_floats(metrics))
    if trainer.collapsed:
        print(f"stopped early, {trainer.collapsed}; kept the policy of update {metrics['kept_update']}")
    print(f"wrote models/ppo and {reports}: held-out score {gain.format(sign=True)}, KL {metrics['kl']:.2f} nats")
    return {
        "tokens": trainer.tokens,
        "device": device.type,
        "precision": precision,
        "shared_backbone": trainer.shares_backbone,
        "phase_seconds": dict(trainer.phase_seconds),
    }


def without_times(row: dict[str, float]) -> dict[str, float]:
    """A history row that is the same on every machine: TRL's episodes per second left out."""
    return {name: value for name, value in row.items() if name != "eps"}


if __name__ == "__main__":
    run_stage("train_ppo", main, Params)
