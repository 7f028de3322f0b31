"""Train the policy with PPO (arXiv:1707.06347) against the reward model, at a price for leaving the frozen start.

Reads   models/<policy> (start and reference), models/reward, data/tokenized/prompts_{train,judge}.parquet
Writes  models/ppo                             policy weights and tokenizer; with lora.rank also adapter/
        data/courses/ppo.parquet               the answers to the judge's prompts at every look
        reports/train_ppo/history.csv          one row per update, TRL's metric names
        reports/train_ppo/evaluations.csv      one row per look
        reports/train_ppo/metrics.json         which update was kept, and what the objective gained there
        reports/train_ppo/run.json             seconds by phase, tokens/s, memory, versions

Run     dvc repro train_ppo                    (untracked: python -m stages.train_ppo)
        LAUNCH="torchrun --nproc_per_node 2" dvc repro train_ppo    the same result but for rounding
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from pydantic import Field, model_validator
from torch import Tensor
from tqdm import tqdm

from stages.lib.model import loading
from stages.lib.model.adapters import FOLDER, FULL, Lora, TrainedWeights, add_adapters, save_adapted
from stages.lib.model.frozen_side import FrozenSide
from stages.lib.model.logps import TokenLogps
from stages.lib.model.memory import MemoryDial, memory_dial, reading_dial
from stages.lib.model.reward import load_reward_model
from stages.lib.rl.advantages import explained_variance, gae, leave_one_out, whiten
from stages.lib.rl.critics import Critic, FrozenCritic, SeparateCritic, ValueHead
from stages.lib.rl.learner import Learner, NotFinite
from stages.lib.rl.looks import Course, babbles, habits
from stages.lib.rl.losses import policy_losses
from stages.lib.rl.mini_batch import step_on
from stages.lib.rl.rewards import (
    adapted_kl_coef,
    penalize_unfinished,
    score_scale,
    sum_by_answer,
    token_kl,
    token_rewards,
)
from stages.lib.rl.rollout import Actor, Rollout
from stages.lib.run.artefacts import read_parquet, round_floats, write_history, write_json
from stages.lib.run.checkpoints import Checkpoints
from stages.lib.run.draws import draw, seed_of, shuffled
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, MicroBatchTokens, Section
from stages.lib.run.phases import Phases
from stages.lib.run.stage import run_stage
from stages.lib.run.tracking import tracked


class Collapse(RuntimeError):
    """The policy is lost: its KL, its entropy or a number that is not finite says so."""


class Params(Section):
    policy: Literal["base", "dpo"]  # where PPO starts, which is also its frozen reference
    episodes: int = Field(gt=0)  # answers in training
    batch_size: int = Field(gt=0)  # episodes per update, over all processes
    answers_per_prompt: int = Field(gt=0)  # answers to one prompt in an update
    num_mini_batches: int = Field(gt=0)  # optimizer steps per pass over an update's episodes
    num_ppo_epochs: int = Field(gt=0)  # passes over an update's episodes
    learning_rate: float = Field(gt=0)  # of the policy, peak
    schedule: Literal["constant", "linear", "cosine"]  # of the learning rate, after warm-up
    warmup_updates: int = Field(ge=0)
    adam_beta1: float = Field(ge=0, lt=1)  # memory of AdamW's mean gradient; 0: every episode counts alike
    response_length: int = Field(gt=0)  # tokens, at most
    temperature: float = Field(gt=0)  # of sampling
    kl_coef: float = Field(ge=0)  # price of one nat of KL to the reference, per token
    kl_target: float | None = Field(gt=0)  # nats per answer that kl_coef is adapted to; or fixed
    kl_estimator: Literal["k1", "k3"]  # of the KL that is priced
    target_kl: float | None = Field(gt=0)  # approxkl above which an update leaves the policy alone
    missing_eos_penalty: float = Field(ge=0)  # taken off the score of an answer that does not end
    score_norm_episodes: int = Field(ge=0)  # reference answers that set the scores' mean 0 and sd 1; 0: raw scores
    advantages: Literal["gae", "rloo"]  # over a critic's values; or against the other answers to the prompt
    critic: Literal["frozen", "separate"]  # of gae: a read-out of the frozen side; or a value model of its own
    value_warmup_updates: int = Field(ge=0)  # first updates train the critic alone
    value_learning_rate: float = Field(gt=0)  # of the separate critic, decaying linearly to 0
    cliprange_value: float = Field(gt=0)  # of the separate critic's values
    vf_coef: float = Field(ge=0)  # weight of the separate critic's loss; AdamW does not see it, clipping does
    whiten_advantages: bool  # to mean 0 and variance 1
    gamma: float = Field(gt=0, le=1)  # discount
    lam: float = Field(gt=0, le=1)  # of GAE
    cliprange: float = Field(gt=0)  # of the probability ratio
    max_grad_norm: float = Field(ge=0)  # clipping; 0: none
    max_kl: float = Field(gt=0)  # nats per answer above which the policy counts as collapsed, or is not kept
    min_entropy: float = Field(ge=0)  # nats per token below which the policy counts as collapsed
    look_prompts: int = Field(gt=0)  # judge prompts answered at every look
    look_every: int = Field(ge=0)  # updates between looks, the best of which is kept; 0: keep the last
    micro_batch_tokens: MicroBatchTokens  # memory dial: tokens per forward and backward pass
    lora: Lora = FULL  # adapters in place of full fine-tuning; without dropout, or no ratio would be 1

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.batch_size % self.num_mini_batches:
            raise ValueError("batch_size must be a multiple of num_mini_batches")
        if self.batch_size % self.answers_per_prompt:
            raise ValueError("batch_size must be a multiple of answers_per_prompt")
        if self.kl_target is not None and not self.kl_coef:
            raise ValueError("kl_target adapts kl_coef by factors: with kl_coef 0 it would stay 0")
        if self.advantages == "rloo" and self.answers_per_prompt < 2:
            raise ValueError("advantages: rloo needs answers_per_prompt of at least 2")
        if self.advantages == "gae" and self.num_updates <= self.value_warmup_updates:
            raise ValueError("value_warmup_updates leave no update to the policy")
        if self.advantages == "gae" and self.critic == "separate" and self.lora.rank:
            raise ValueError(
                "critic: separate trains a second model, where lora.rank has one: set train_ppo.critic=frozen or "
                "train_ppo.advantages=rloo, or lora.rank=null"
            )
        return self

    @property
    def num_updates(self) -> int:
        return math.ceil(self.episodes / self.batch_size)


def prompts_of_update(num_prompts: int, params: Params, seed: int, update: int) -> list[int]:
    """Which prompts update 1, 2, ... answers: every pass over them in a fresh random order, without gaps.

    A pure function of seed and update: a resumed run replays nothing.
    """
    count = params.batch_size // params.answers_per_prompt
    places = range((update - 1) * count, update * count)
    epochs = {at // num_prompts for at in places}
    orders = {epoch: shuffled(num_prompts, seed, f"ppo_prompts of pass {epoch}") for epoch in epochs}
    picked = [orders[at // num_prompts][at % num_prompts] for at in places]
    return [prompt for prompt in picked for _ in range(params.answers_per_prompt)]


def mini_batches_of_update(params: Params, seed: int, update: int) -> list[list[int]]:
    """The answers of each of the update's optimizer steps: `num_ppo_epochs` passes, each in a fresh order."""
    size = params.batch_size // params.num_mini_batches
    steps = []
    for epoch in range(params.num_ppo_epochs):
        order = shuffled(params.batch_size, seed, f"ppo_mini_batches of update {update}, pass {epoch}")
        steps += [order[start : start + size] for start in range(0, len(order), size)]
    return steps


def main(base: Base, params: Params, root: Path = Path(".")) -> dict[str, Any]:
    device = loading.pick_device()
    precision = loading.pick_precision(base.precision, device)
    accelerator = loading.make_accelerator(device, precision)
    if accelerator.distributed_type == DistributedType.FSDP:
        raise UserError(
            "PPO samples from the whole policy in every process: LAUNCH it with torchrun, not with FSDP"
        )
    loading.set_seed(base.seed)
    tokenizer = loading.load_tokenizer(root / "models/reward")
    train = read_parquet(root / "data/tokenized/prompts_train.parquet")["input_ids"]
    looked = read_parquet(root / "data/tokenized/prompts_judge.parquet")
    chosen = draw(len(looked["prompt_id"]), params.look_prompts, base.seed, "look_prompts")
    look_prompts = [looked["input_ids"][i] for i in chosen]

    # the policy, and the frozen side: its start as the reference, and the reward model. With adapters the policy is
    # they, the reference the model without them, and a reward model that has some on the same base others beside them
    start = root / "models" / params.policy
    policy = TokenLogps(loading.load_causal_lm(start, accelerator.device), params.temperature)
    frozen = FrozenSide(
        policy.model if params.lora.rank else loading.load_causal_lm(start, accelerator.device),
        load_reward_model(root / "models/reward", accelerator.device),
        params.temperature,
        tokenizer,
        precision,
        partial(memory_dial, reading_dial(params.micro_batch_tokens), 4096, stage="train_ppo"),
        root / "models/reward" / FOLDER,
    )
    adapted = add_adapters(policy.model, params.lora, precision) if params.lora.rank else None
    on_cpu = 1024 if adapted else 2048  # beside frozen weights, what a pass keeps is most of the memory
    dial = memory_dial(params.micro_batch_tokens, on_cpu, policy.model, "train_ppo", training=True)
    schedule = params.schedule, params.warmup_updates, params.num_updates
    how = params.learning_rate, schedule, params.max_grad_norm
    lean = {"return_freed": bool(adapted)}  # with all weights a tenth of the time, for a fiftieth of the memory
    learner = Learner(policy, accelerator, dial, *how, beta1=params.adam_beta1, **lean)
    trained = TrainedWeights(policy.model)
    actor = Actor(policy, tokenizer, accelerator, precision, params.response_length, frozen.dial, **lean)
    phases = Phases(accelerator.device)

    def fit_score_scale() -> tuple[float, float]:
        """Mean and spread of the start's own scores (arXiv:1909.08593, section 2.1): the unit of what follows."""
        if not params.score_norm_episodes:
            return 0.0, 1.0
        drawn = draw(len(train), params.score_norm_episodes, base.seed, "score_norm_episodes")
        answered = actor.roll_out([train[i] for i in drawn], seed_of(base.seed, "ppo_score_scale"))
        return score_scale(frozen_reads(answered, frozen)[0].gathered(accelerator).raw_scores)

    def scores_of(rollout: Rollout) -> Tensor:
        """(B,) normalised, less the penalty for answers that do not end: with the KL's price, the objective."""
        mean, std = state["score_scale"]
        return penalize_unfinished((rollout.raw_scores - mean) / std, rollout.ended, params.missing_eos_penalty)

    def look(update: int) -> None:
        """Answers the judge's prompts; the policy with the best objective yet, at a KL within max_kl, is kept."""
        with phases("looks"):
            answered = actor.roll_out(look_prompts, seed_of(base.seed, "looks"))
            rollout = frozen_reads(answered, frozen)[0].gathered(accelerator)
        kl = sum_by_answer(rollout.logps - rollout.ref_logps, rollout.lengths).mean().item()
        price = params.kl_coef * kl  # one price, whatever kl_target makes of it
        objective = scores_of(rollout).mean().item() - price
        if not math.isfinite(objective):
            raise Collapse(f"the objective is {objective}")
        kept = objective > state["best"]["objective"] and kl <= params.max_kl
        how = habits(rollout.responses, tokenizer)
        row = {"update": update, "episode": update * params.batch_size, "objective": objective}
        row |= {"score": rollout.raw_scores.mean().item(), "kl": kl, "entropy": rollout.entropies.mean().item()}
        state["evaluations"].append(row | how | {"kept": kept})
        course.add(update, update * params.batch_size, rollout)
        if kept:  # the start itself need not be copied, but for its adapters
            now = trained.state_dict() if update or adapted else {}
            weights = {name: weight.to("cpu", copy=True) for name, weight in now.items()}
            state["best"] = {"update": update, "objective": objective, "weights": weights}
        if (warning := babbles(how, state["evaluations"][0])) and accelerator.is_main_process:
            tqdm.write(f"train_ppo: warning: update {update}: the policy {warning}")

    with Checkpoints("train_ppo", root, base, params) as checkpoints, tracked("train_ppo", params) as log:
        critic = make_critic(root, params, accelerator, precision, dial, policy.model.config.hidden_size)
        saved = checkpoints.load(policy=learner, critic=critic, scaler=accelerator.scaler)
        state: dict[str, Any] = saved.get("state") or {
            "score_scale": fit_score_scale(),
            "kl_coef": params.kl_coef,
            "history": [],
            "evaluations": [],
            "best": {"update": 0, "objective": -math.inf, "weights": {}},
            "course": {},
            "tokens": 0,
        }
        if isinstance(critic, SeparateCritic):
            critic.normalise_by(*state["score_scale"])
        history, course = state["history"], Course([looked["prompt_id"][i] for i in chosen], state["course"])
        collapsed = None
        updates = range(len(history) + 1, params.num_updates + 1)
        silent = not accelerator.is_main_process
        bar = tqdm(updates, "train_ppo", params.num_updates, initial=len(history), unit="update", disable=silent)
        update = 0
        try:
            if not state["evaluations"]:
                look(0)
            for update in bar:
                prompts = [train[i] for i in prompts_of_update(len(train), params, base.seed, update)]
                # 1. Rollout: the policy answers the prompts, and reads its answers once
                with phases("rollout"):
                    own = actor.roll_out(prompts, seed_of(base.seed, f"ppo_answers of update {update}"))
                # 2. The frozen side reads every answer once: reference log-probs, score, critic features
                with phases("frozen side"):
                    own, features = frozen_reads(own, frozen, with_features=critic is not None)
                with phases("critic"):
                    values = critic.values(own, features) if critic else torch.zeros_like(own.logps)
                rollout = dataclasses.replace(own, values=values).gathered(accelerator)
                lengths = rollout.lengths
                # 3. Per-token rewards: the price of KL on every token, the score on the last one
                kl = token_kl(rollout.logps, rollout.ref_logps, params.kl_estimator)
                scores = scores_of(rollout)
                rewards = token_rewards(kl, scores, lengths, state["kl_coef"])
                # 4. Advantages: against the critic's values, or against the other answers to the same prompt
                if critic:
                    advantages = gae(rewards, rollout.values, lengths, params.gamma, params.lam)
                else:
                    better = leave_one_out(sum_by_answer(rewards, lengths), params.answers_per_prompt)
                    advantages = better.repeat_interleave(lengths)
                returns = advantages + rollout.values
                if params.whiten_advantages:
                    advantages = whiten(advantages)
                # 5. Optimizer steps on the clipped surrogate over shuffled mini-batches; the critic learns
                mini_batches = mini_batches_of_update(params, base.seed, update)
                steps = []
                with phases("policy update"):
                    if critic is None or update > params.value_warmup_updates:
                        steps = update_policy(learner, rollout, advantages, mini_batches, params)
                learning_rate = learner.next_learning_rate()
                with phases("critic"):
                    learned = critic.learn(rollout, returns, own, features, mini_batches) if critic else {}
                # 6. What happened
                learned |= {"val/explained_variance": explained_variance(rollout.values, returns)}
                metrics = metrics_of(rollout, kl, scores, steps, state["kl_coef"])
                how = habits(rollout.responses, tokenizer)
                head = {"step": update, "episode": update * params.batch_size}
                history.append(head | metrics | learned | how | {"lr": learning_rate})
                state["tokens"] += sum(map(len, prompts)) + int(lengths.sum())
                log(history[-1])
                bar.set_postfix({name: f"{metrics[f'objective/{name}']:.2f}" for name in ("scores", "kl")} | how)
                check_health(history[-1], params)
                if params.kl_target is not None:
                    state["kl_coef"] = adapted_kl_coef(state["kl_coef"], metrics["objective/kl"], params.kl_target)
                if update == params.num_updates or (params.look_every and update % params.look_every == 0):
                    look(update)
                checkpoints.save_if_due(state=state)
        except (Collapse, NotFinite) as collapse:
            collapsed = f"update {update} of {params.num_updates}: {collapse}"
        if not any(row["policy/steps"] for row in history) and any(row["policy/skipped"] for row in history):
            collapsed = collapsed or "the gradient of every step overflowed fp16; set base.precision=fp32"
        kept = state["best"]["update"] if params.look_every else len(history)
        if collapsed and not (params.look_every and kept):
            raise UserError(
                f"PPO collapsed before any policy was better than the start: {collapsed}. Lower "
                "train_ppo.learning_rate, raise train_ppo.kl_coef or set train_ppo.target_kl"
            )
        if accelerator.is_main_process:
            if collapsed or kept < len(history):
                trained.load_state_dict(state["best"]["weights"] or loading.load_causal_lm(start).state_dict())
            if adapted:
                save_adapted(adapted, trained.state_dict(), start, tokenizer, root / "models/ppo")
            else:
                loading.save_model(policy.model, tokenizer, root / "models/ppo")
            course.write(root / "data/courses/ppo.parquet")
            write_reports(root, params, state, kept, collapsed)
    return {
        "tokens": state["tokens"],
        "device": device.type,
        "processes": accelerator.num_processes,
        "precision": precision,
        "shared_backbone": frozen.shares_backbone,
        "phase_seconds": dict(phases.seconds),
    }


def frozen_reads(rollout: Rollout, frozen: FrozenSide, with_features: bool = False) -> tuple[Rollout, Tensor]:
    """With reference log-probs and raw scores; and, if asked for, (N, H) its hidden states before the tokens."""
    said = frozen.opinions(rollout.prompts, rollout.responses, with_features=with_features)
    return dataclasses.replace(rollout, ref_logps=said.logps, raw_scores=said.scores), said.features


def make_critic(
    root: Path, params: Params, accelerator: Accelerator, precision: str, dial: MemoryDial, hidden_size: int
) -> Critic | None:
    """The critic that `params` asks for; none for leave-one-out advantages."""
    if params.advantages == "rloo":
        return None
    if params.critic == "frozen":
        return FrozenCritic(hidden_size, accelerator)
    how = params.value_learning_rate, ("linear", 0, params.num_updates), params.max_grad_norm
    head = ValueHead(load_reward_model(root / "models/reward", accelerator.device))
    learner = Learner(head, accelerator, dial, *how)
    return SeparateCritic(head, learner, params.vf_coef, precision, params.cliprange_value)


def update_policy(
    learner: Learner, rollout: Rollout, advantages: Tensor, mini_batches: list[list[int]], params: Params
) -> list[dict[str, float]]:
    """One optimizer step per mini-batch on the clipped surrogate (PPO, Eq. 7), until target_kl forbids it."""

    def losses_of(output: tuple[Tensor, Tensor], tokens: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        logps, entropies = output
        old_logps = rollout.logps[tokens].to(logps.device)
        losses, clipped = policy_losses(logps, old_logps, advantages[tokens].to(logps.device), params.cliprange)
        difference = (logps - old_logps).detach()
        return losses, {
            "clipfrac": clipped.float(),
            "entropy": entropies,
            "approxkl": 0.5 * difference**2,
            "ratio": difference.exp(),
            "ratio_error": (difference.exp() - 1).abs(),
        }

    steps: list[dict[str, float]] = []
    for answers in mini_batches:
        steps.append(step_on(learner, rollout, answers, losses_of, params.target_kl))
        if not (steps[-1]["steps"] or steps[-1]["skipped"]):
            break
    return steps


def metrics_of(
    rollout: Rollout, kl: Tensor, scores: Tensor, steps: list[dict[str, float]], kl_coef: float
) -> dict[str, float]:
    """One update under TRL's names, and ours beside them; steps count alike, being on as many answers each."""
    lengths = rollout.lengths
    kl_per_answer = sum_by_answer(kl, lengths).mean().item()
    price, score = -kl_coef * kl_per_answer, scores.mean().item()
    entropy = rollout.entropies.mean().item()

    def mean(name: str, without_steps: float) -> float:
        return float(np.mean([step[name] for step in steps])) if steps else without_steps

    return {
        "objective/kl": kl_per_answer,
        "objective/entropy": -sum_by_answer(rollout.logps, lengths).mean().item(),
        "objective/non_score_reward": price,
        "objective/rlhf_reward": price + score,
        "objective/scores": score,
        "policy/approxkl_avg": mean("approxkl", 0.0),
        "policy/clipfrac_avg": mean("clipfrac", 0.0),
        "loss/policy_avg": mean("loss", 0.0),
        "policy/entropy_avg": mean("entropy", entropy),
        "val/ratio": mean("ratio", 1.0),
        "val/ratio_var": float(np.var([step["ratio"] for step in steps], ddof=1)) if len(steps) > 1 else 0.0,
        "val/num_eos_tokens": int(rollout.ended.sum()),
        # beyond TRL
        "objective/raw_scores": rollout.raw_scores.mean().item(),
        "objective/score_std": scores.std().item() if len(scores) > 1 else 0.0,
        "objective/kl_coef": kl_coef,
        "val/first_ratio_error": steps[0]["ratio_error"] if steps else 0.0,  # 0 but for rounding
        "policy/steps": sum(int(step["steps"]) for step in steps),
        "policy/skipped": sum(int(step["skipped"]) for step in steps),
        "policy/grad_norm": mean("grad_norm", 0.0),
        "rollout/entropy": entropy,
    }


def check_health(metrics: dict[str, float], params: Params) -> None:
    """
    Raises:
        Collapse: a metric is not finite, KL is above max_kl or entropy below min_entropy.
    """
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise Collapse(f"{name} is {value}")
    if metrics["objective/kl"] > params.max_kl:
        raise Collapse(f"KL to the reference is {metrics['objective/kl']:.1f} nats per answer, above max_kl")
    if metrics["rollout/entropy"] < params.min_entropy:
        raise Collapse(f"entropy is {metrics['rollout/entropy']:.3g} nats per token, below min_entropy")


def write_reports(root: Path, params: Params, state: dict[str, Any], kept: int, collapsed: str | None) -> None:
    reports = root / "reports/train_ppo"
    history, looks = state["history"], state["evaluations"]
    write_history(reports / "history.csv", round_floats(history, 8))
    write_history(reports / "evaluations.csv", round_floats(looks, 8))
    now = next(row for row in looks if row["update"] == kept)
    metrics = {
        "episodes": history[-1]["episode"],
        "updates": len(history),
        "kept_update": kept,
        "stopped_early": collapsed,
        "policy": params.policy,
        "missing_eos_penalty": params.missing_eos_penalty,
        "kl_coef": params.kl_coef,
        "temperature": params.temperature,
        "score_mean": state["score_scale"][0],
        "score_std": state["score_scale"][1],
        "objective_start": looks[0]["objective"],
        "objective_gain": now["objective"] - looks[0]["objective"],
        "score": now["score"],
        "kl": now["kl"],
    }
    write_json(reports / "metrics.json", round_floats(metrics))
    if collapsed:
        print(f"stopped early, {collapsed}")
    if kept == 0:
        print(
            "warning: no look was better than the start: models/ppo is the start itself. Train for more episodes"
        )
    gain = f"objective {metrics['objective_gain']:+.2f}"
    print(f"wrote models/ppo and {reports}: update {metrics['kept_update']}, {gain} on the judge's prompts")


if __name__ == "__main__":
    run_stage("train_ppo", main, Params)
