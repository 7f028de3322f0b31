"""PPO for language models in named phases, on TRL 1.12.0's configuration, construction, saving and callbacks.

One update of `PPOTrainer.train`, in the algorithm's order (arXiv:1707.06347; arXiv:1909.08593 for the KL price):

1. `rollout`         the policy answers a batch of prompts; its log-probs and values are taken once
2. `judge`           the frozen side: reference log-probs and the reward model's score
3. `token_rewards`   minus the price of KL on every token, plus the score on the last one
4. `gae`             advantages and returns (arXiv:1506.02438)
5. `update`          clipped policy and value losses over shuffled mini-batches
6. `metrics_of`      under TRL's names

Where this departs from `trl.experimental.ppo.PPOTrainer` the departure is a field of `ppo_config.PPOConfig` with
its reason; `STOCK` there sets them all back, and a test holds three updates equal to the stock trainer's. What
needs no model (3., 4., the losses of 5.) is in `ppo_terms`.

Sequences are packed one after another (`stages.lib.model.packing.pack`), so there is no padding to mask: which
tokens count follows from lengths, never from a comparison with the pad token.
"""

import copy
import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from trl.experimental import ppo as trl_ppo
from trl.experimental.ppo.ppo_trainer import batch_generation

from stages.lib.model.attention import lean_embedding, use_packed_attention
from stages.lib.model.generate import generate
from stages.lib.model.loading import DTYPES, autocast, freeze
from stages.lib.model.logps import CompletionLogps, token_logps_and_entropies
from stages.lib.model.packing import PackedBatch, group_by_tokens, pack, pad, shares_prefixes
from stages.lib.model.reward import apply_head, backbone_of, last_hidden_state
from stages.lib.rl.ppo_config import PPOConfig
from stages.lib.rl.ppo_terms import (
    adapted_kl_coef,
    gae,
    masked_mean,
    penalize_unfinished,
    policy_losses,
    score_scale,
    token_kl,
    token_rewards,
    value_losses,
    whiten,
)
from stages.lib.run.checkpoints import Checkpoints


class Collapse(RuntimeError):
    """The policy is lost: its KL, its entropy or a number that is not finite says so."""


@dataclass
class Rollout:
    """B answered prompts. T is the longest response; tensors are (B, T) and 0 where their mask is False.

    mask:       True on response tokens, the EOS included
    value_mask: True where a value is trained: `mask`, or one more position as in stock
    ended:      (B,) whether the answer ends in EOS
    raw_scores: (B,) the reward model's
    scores:     (B,) normalised, minus the missing-EOS penalty
    first_pass: (N,) the policy's log-probs with their graph, and entropies, of all response tokens, row after row,
                for the first step to take; None where that step will make its own
    """

    prompts: list[list[int]]
    responses: list[list[int]]
    ended: Tensor
    mask: Tensor
    value_mask: Tensor
    logps: Tensor
    entropies: Tensor
    values: Tensor
    ref_logps: Tensor
    raw_scores: Tensor
    scores: Tensor
    first_pass: tuple[Tensor, Tensor] | None = None

    @property
    def lengths(self) -> list[int]:
        return [len(p) + len(r) for p, r in zip(self.prompts, self.responses, strict=True)]


@dataclass
class Answers:
    """What a policy makes of N prompts: responses, whether each ended, raw scores, and KL to the reference.

    kl: (N,) k1 estimate per answer, in nats; entropy: mean per token, in nats.
    """

    responses: list[list[int]]
    ended: list[bool]
    scores: list[float]
    kl: list[float]
    entropy: float


# models


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same parameters, bit for bit."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def hold_matrices_in(module: nn.Module, dtype: torch.dtype, heads: tuple[str, ...] = ("score",)) -> None:
    """Casts the weights of linear layers in place: what autocast would do again on every call, bit for bit.

    Norms, embeddings and `heads` stay in fp32. A tied output layer is cut loose from the embedding.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and name not in heads:
            for part, parameter in layer.named_parameters():
                setattr(layer, part, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


def let_go_of_files(module: nn.Module) -> None:
    """Copies the parameters out of their memory-mapped checkpoint, whose pages count as this process's memory."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


class PPOTrainer(trl_ppo.PPOTrainer):
    """TRL's PPOTrainer with `train` in phases.

    Further to TRL's arguments: the reference and the reward model given are frozen, and in bf16 or fp16 hold
    their matrices in that precision afterwards; where the reward model's backbone has the reference's weights
    bit for bit, the two share it, and one forward pass serves both.

    After `train`: `evaluations` has a row per look at eval_dataset, `kept_update` says which update's policy
    the model holds (None: the last), `collapsed` why training stopped early (None: it did not).

    Raises:
        ValueError: no stop token; pad and EOS are one token; fewer prompts than a batch; several processes; an
            adapter; a policy whose logits are not hidden states times output weights.
    """

    def __init__(self, args: PPOConfig, processing_class, *arguments, **keywords):
        _check(args, processing_class, keywords)
        args.save_only_model = True  # optimizer states are pickles; `train` takes checkpoints of our own
        super().__init__(args, processing_class, *arguments, **keywords)
        if self.accelerator.num_processes > 1:
            raise ValueError("PPO runs in one process; start it without torchrun or accelerate launch")
        if self.train_dataset_len < args.batch_size:
            raise ValueError(f"{self.train_dataset_len} prompts do not fill a batch of {args.batch_size} episodes")
        self.precision = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
        self.device = self.accelerator.device
        self.policy: PreTrainedModel = self.model.policy
        self.value_model: PreTrainedModel = self.model.value_model
        freeze(self.ref_model)
        freeze(self.reward_model)
        CompletionLogps(self.policy)  # refuses an output layer that token_logps would not reproduce
        if self.shares_backbone:
            setattr(self.reward_model, self.reward_model.base_model_prefix, self.ref_model.get_decoder())
        self.sampler = self.policy
        if self.precision != "fp32":
            for frozen in (self.ref_model, self.reward_model):
                hold_matrices_in(frozen, DTYPES[self.precision])
            let_go_of_files(self.ref_model)
            if not args.stock_sampling:
                self.sampler = freeze(copy.deepcopy(self.policy).to(DTYPES[self.precision]))
        let_go_of_files(self.reward_model.score)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.temperature = args.temperature + 1e-7  # as stock
        self.kl_coef = args.kl_coef
        self.score_mean, self.score_std = 0.0, 1.0
        self.permutations = np.random.default_rng(args.seed)
        self.evaluations: list[dict[str, float]] = []
        self.kept_update: int | None = None
        self.collapsed: str | None = None
        self.phase_seconds: dict[str, float] = defaultdict(float)
        self._best: dict[str, Tensor] = {}  # the kept policy's weights
        self._epochs_begun: list[Tensor] = []  # torch's random state as each pass over the prompts began
        self.tokens = 0  # of prompts and responses in rollouts, each counted once

    @property
    def shares_backbone(self) -> bool:
        reference, reward = self.ref_model.get_decoder(), backbone_of(self.reward_model)
        return reference is reward or (type(reference) is type(reward) and same_weights(reference, reward))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Stock's optimizer, its parameter groups split in two where the value model has its own rate."""
        optimizer = super().create_optimizer(model)
        if self.args.value_learning_rate is not None:
            of_value = {id(p) for p in self.value_model.parameters()}
            groups = []
            for group in optimizer.param_groups:
                policy = [p for p in group["params"] if id(p) not in of_value]
                value = [p for p in group["params"] if id(p) in of_value]
                groups.append(group | {"params": policy})
                groups.append(group | {"params": value, "lr": self.args.value_learning_rate})
            optimizer.param_groups[:] = [group for group in groups if group["params"]]
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The policy and its tokenizer, without stock's training_args.bin, which is a pickle."""
        folder = output_dir or self.args.output_dir
        self.policy.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)

    def train(self, checkpoints: Checkpoints | None = None) -> None:
        """Trains from the start, or from where `checkpoints` was left."""
        args = self.args
        self.model.train()
        self._start_state()
        batches = self._prompt_batches()
        if not (checkpoints and self._load(checkpoints, batches)):
            self._fit_score_scale()
        try:
            for update in range(self.state.global_step + 1, args.num_total_batches + 1):
                started = time.monotonic()
                self.state.episode += args.batch_size
                rollout = self.rollout(next(batches), update)
                self.tokens += sum(rollout.lengths)
                kl = token_kl(rollout.logps, rollout.ref_logps, args.kl_estimator)
                advantages, returns = self.advantages(rollout, kl)
                statistics = self.update(rollout, advantages, returns, update)
                metrics = self.metrics_of(rollout, kl, statistics)
                metrics["eps"] = int(args.batch_size / (time.monotonic() - started))
                self._end_update(metrics)
                self._check_health(metrics)
                if args.kl_target is not None:
                    self.kl_coef = adapted_kl_coef(self.kl_coef, metrics["objective/kl"], args.kl_target)
                if args.eval_every and (update % args.eval_every == 0 or update == args.num_total_batches):
                    self._evaluate(update)
                if checkpoints:
                    checkpoints.save_if_due(**self._position())
        except Collapse as collapse:
            self.collapsed = f"update {update} of {args.num_total_batches}: {collapse}"
            self.model.zero_grad()
        self._restore_best()
        self.control = self.callback_handler.on_train_end(args, self.state, self.control)
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(args, self.state, self.control)

    def _load(self, checkpoints: Checkpoints, batches: Iterator) -> bool:
        """Takes everything up where the last checkpoint was written; False if there is none."""
        saved = checkpoints.load(
            policy=self.policy,
            value_model=self.value_model,
            optimizer=getattr(self.optimizer, "optimizer", self.optimizer),
            lr_scheduler=self.lr_scheduler,
            scaler=self.scaler,
        )
        if not saved:
            return False
        for name, value in saved["state"].items():
            setattr(self.state, name, value)
        for name, value in saved["own"].items():
            setattr(self, name, value)
        self.permutations.bit_generator.state = saved["permutations"]
        self.phase_seconds.update(saved["phase_seconds"])
        now = torch.get_rng_state()
        for _ in range(self.state.global_step):  # prompts that have been answered, in the same order again
            next(batches)
        torch.set_rng_state(now)
        return True

    def _position(self) -> dict[str, Any]:
        """What `_load` needs beside models and optimizer."""
        state = ("global_step", "episode", "epoch", "log_history")
        own = (
            "kl_coef",
            "score_mean",
            "score_std",
            "evaluations",
            "kept_update",
            "tokens",
            "_epochs_begun",
            "_best",
        )
        return {
            "state": {name: getattr(self.state, name) for name in state},
            "own": {name: getattr(self, name) for name in own},
            "permutations": self.permutations.bit_generator.state,
            "phase_seconds": dict(self.phase_seconds),
        }

    # 1. rollout

    @torch.no_grad()
    def rollout(self, prompts: list[list[int]], update: int) -> Rollout:
        """Answers the prompts with the current policy and has the answers judged."""
        with self._phase("generation"):
            responses = self.sample(prompts, seed=self.args.seed + update)
        mask, value_mask = self.masks_of(responses)
        ended = torch.tensor([r[-1] == self.stop_token_id for r in responses], device=self.device)
        with self._phase("values"):
            values = self.values_of(prompts, responses, value_mask)
        with self._phase("reference and score"):
            ref_logps, raw_scores = self.judge(prompts, responses, mask)
        with self._phase("policy log-probs"):
            first_pass = self._first_pass(prompts, responses) if update > self.args.value_warmup_updates else None
            if first_pass:
                logps, entropies = (table_of(flat.detach(), mask) for flat in first_pass)
            else:
                logps, entropies = self.logps_of(prompts, responses, mask)
        scores = penalize_unfinished(
            (raw_scores - self.score_mean) / self.score_std, ended, self.args.missing_eos_penalty
        )
        return Rollout(
            prompts,
            responses,
            ended,
            mask,
            value_mask,
            logps,
            entropies,
            values,
            ref_logps,
            raw_scores,
            scores,
            first_pass,
        )

    @torch.no_grad()
    def sample(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        """One response to each prompt, EOS included where there is one; never empty."""
        if self.args.stock_sampling:
            return self._sample_like_stock(prompts)
        if self.sampler is not self.policy:
            for copied, trained in zip(self.sampler.parameters(), self.policy.parameters(), strict=True):
                copied.copy_(trained)
        return generate(
            self.sampler,
            self.processing_class,
            prompts,
            self.args.response_length,
            self.device,
            self.precision,
            temperature=self.args.temperature,
            seed=seed,
            batch_size=self.args.local_rollout_forward_batch_size,
        )

    def _sample_like_stock(self, prompts: list[list[int]]) -> list[list[int]]:
        pad_id = self.processing_class.pad_token_id
        queries = pad([torch.tensor(ids) for ids in prompts], pad_id, "left").to(self.device)
        settings = GenerationConfig(
            max_new_tokens=self.args.response_length,
            temperature=self.temperature,
            top_k=0.0,
            top_p=1.0,
            do_sample=True,
        )
        rows, _ = batch_generation(
            self.policy, queries, self.args.local_rollout_forward_batch_size, pad_id, settings
        )
        responses = []
        for row in rows[:, queries.shape[1] :].tolist():
            ends = [i + 1 for i, token in enumerate(row) if token == self.stop_token_id]
            pads = [i for i, token in enumerate(row) if token == pad_id]
            responses.append(row[: max(1, min(ends + pads + [len(row)]))])
        return responses

    def masks_of(self, responses: list[list[int]]) -> tuple[Tensor, Tensor]:
        """(B, T) True on each response's tokens; the same, or one position longer where T leaves room."""
        lengths = torch.tensor([len(r) for r in responses], device=self.device)[:, None]
        positions = torch.arange(int(lengths.max()), device=self.device)[None]
        mask = positions < lengths
        return mask, mask if self.args.score_on_last_token else positions < lengths + 1

    def logps_of(
        self, prompts: list[list[int]], responses: list[list[int]], mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(B, T) log-probs of the response tokens under the policy at the sampling temperature, and entropies."""
        logps, entropies = torch.zeros(mask.shape, device=self.device), torch.zeros(mask.shape, device=self.device)
        with use_packed_attention(self.policy), self._training_pass():
            for rows in self._groups(prompts, responses):
                flat, flat_entropies = self._policy_pass(prompts, responses, rows)
                scatter_rows(logps, rows, mask, flat)
                scatter_rows(entropies, rows, mask, flat_entropies)
        return logps, entropies

    def _first_pass(self, prompts: list[list[int]], responses: list[list[int]]) -> tuple[Tensor, Tensor] | None:
        """Where one micro-batch is the whole first step, its forward pass is the rollout's: made once, kept."""
        args = self.args
        one_step = args.local_mini_batch_size >= len(prompts)
        if not (one_step and args.micro_batch_tokens and len(self._groups(prompts, responses)) == 1):
            return None
        with torch.enable_grad(), use_packed_attention(self.policy), self._training_pass():
            return self._policy_pass(prompts, responses, list(range(len(prompts))))

    def _policy_pass(
        self, prompts: list[list[int]], responses: list[list[int]], rows: list[int]
    ) -> tuple[Tensor, Tensor]:
        """(N,) log-probs under the policy, and entropies, of the response tokens of `rows` in one forward pass."""
        batch = self._pack(prompts, responses, rows)
        with lean_embedding(self.policy):
            hidden = last_hidden_state(self.policy.get_decoder(), batch)
        return self._token_logps(self.policy, hidden, batch)

    def values_of(self, prompts: list[list[int]], responses: list[list[int]], value_mask: Tensor) -> Tensor:
        """(B, T) the value of the state before each response token."""
        values = torch.zeros(value_mask.shape, device=self.device)
        with use_packed_attention(backbone_of(self.value_model)), autocast(self.device, self.precision):
            for rows, batch in self._packed(prompts, responses):
                scatter_rows(values, rows, value_mask, self._values(batch, value_mask[rows]))
        return values

    # 2. the frozen side

    @torch.no_grad()
    def judge(self, prompts: list[list[int]], responses: list[list[int]], mask: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) reference log-probs and (B,) raw scores; in one forward pass where the backbone is shared."""
        closed = [self._closed(response) for response in responses]
        ref_logps = torch.zeros(mask.shape, device=self.device)
        scores = torch.zeros(len(prompts), device=self.device)
        reference, reward = self.ref_model.get_decoder(), backbone_of(self.reward_model)
        with use_packed_attention(self.ref_model), autocast(self.device, self.precision):
            for rows, batch in self._packed(prompts, closed):
                hidden = last_hidden_state(reference, batch)
                flat, _ = self._token_logps(self.ref_model, hidden, batch)
                real = mask_of_lengths([len(closed[i]) for i in rows], mask.shape[1] + 1, self.device)
                # an EOS added for scoring is not the policy's
                ref_logps[rows] = table_of(flat, real)[:, :-1] * mask[rows]
                if reward is reference:
                    scores[rows] = apply_head(self.reward_model, hidden[batch.last_index])
        if reward is not reference:
            with use_packed_attention(reward), autocast(self.device, self.precision):
                for rows, batch in self._packed(prompts, closed):
                    hidden = last_hidden_state(reward, batch)
                    scores[rows] = apply_head(self.reward_model, hidden[batch.last_index])
        return ref_logps, scores

    def _closed(self, response: list[int]) -> list[int]:
        if response[-1] == self.stop_token_id or not self.args.score_unfinished_at_eos:
            return response
        return [*response, self.stop_token_id]

    # 3. and 4.

    def advantages(self, rollout: Rollout, kl: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) advantages, whitened as configured, and returns."""
        args = self.args
        rewards = token_rewards(
            kl, rollout.scores, rollout.mask.sum(1), self.kl_coef, on_last_token=args.score_on_last_token
        )
        if args.whiten_rewards:
            rewards = whiten(rewards, rollout.value_mask, shift_mean=False)
        advantages = gae(rewards, rollout.values, args.gamma, args.lam)
        returns = advantages + rollout.values
        if args.whiten_advantages:
            advantages = whiten(advantages, rollout.mask)
        return torch.where(rollout.mask, advantages, 0.0), returns

    # 5. update

    def update(self, rollout: Rollout, advantages: Tensor, returns: Tensor, update: int) -> dict[str, list]:
        """`num_ppo_epochs` passes over the rollout, one optimizer step of each model per mini-batch.

        Returns:
            (weight, value) pairs by statistic, one per mini-batch (per micro-batch as in stock).
        """
        args = self.args
        statistics: dict[str, list[tuple[float, float]]] = defaultdict(list)
        policy_trains = update > args.value_warmup_updates
        size = args.local_mini_batch_size
        for _ in range(args.num_ppo_epochs):
            order = self._permutation(len(rollout.prompts))
            for start in range(0, len(order), size):
                rows = order[start : start + size]
                if policy_trains:
                    with self._phase("policy update"):
                        policy_trains = self._policy_step(rollout, advantages, rows, statistics)
                with self._phase("value update"):
                    self._value_step(rollout, returns, rows, statistics)
        return statistics

    def _policy_step(self, rollout: Rollout, advantages: Tensor, rows: list[int], statistics: dict) -> bool:
        """One step on the clipped policy loss; False if target_kl forbade it."""
        first_pass, rollout.first_pass = rollout.first_pass, None
        parts = [list(range(len(rows)))] if first_pass else self._parts(rollout, rows)
        counts = [int(rollout.mask[part].sum()) for part in parts]
        entries: list[tuple[int, dict[str, Tensor]]] = []
        with use_packed_attention(self.policy), self._training_pass():
            for part, count in zip(parts, counts, strict=True):
                mask = rollout.mask[part]
                logps, entropies = first_pass or self._policy_pass(rollout.prompts, rollout.responses, part)
                old_logps = rollout.logps[part][mask]
                losses, clipped = policy_losses(logps, old_logps, advantages[part][mask], self.args.cliprange)
                self._backward(losses.sum() * self._share(count, counts))
                with torch.no_grad():
                    difference = logps - old_logps
                    ratio = difference.exp()
                    pads = 0 if self.args.token_means else mask.numel() - count
                    means = {
                        "loss/policy_avg": losses.mean(),
                        "policy/clipfrac_avg": clipped.float().mean(),
                        "policy/entropy_avg": entropies.mean(),
                        # stock's means run over padding too, where ratio is 1 and the difference 0
                        "policy/approxkl_avg": 0.5 * (difference**2).sum() / (count + pads),
                        "val/ratio": (ratio.sum() + pads) / (count + pads),
                        "val/ratio_error": (ratio - 1).abs().max(),
                    }
                    entries.append((count, means))
        self._record(entries, statistics)
        approxkl = sum(count * means["policy/approxkl_avg"].item() for count, means in entries) / sum(counts)
        if self.args.target_kl is not None and approxkl > self.args.target_kl:
            self.optimizer.zero_grad()
            return False
        self._step(self.policy, "policy/grad_norm", statistics)
        return True

    def _value_step(self, rollout: Rollout, returns: Tensor, rows: list[int], statistics: dict) -> None:
        parts = self._parts(rollout, rows)
        counts = [int(rollout.value_mask[part].sum()) for part in parts]
        entries: list[tuple[int, dict[str, Tensor]]] = []
        with use_packed_attention(backbone_of(self.value_model)), self._training_pass():
            for part, count in zip(parts, counts, strict=True):
                mask = rollout.value_mask[part]
                batch = self._pack(rollout.prompts, rollout.responses, part)
                losses, clipped = value_losses(
                    self._values(batch, mask),
                    rollout.values[part][mask],
                    returns[part][mask],
                    self.args.cliprange_value,
                )
                self._backward(losses.sum() * self._share(count, counts) * self.args.vf_coef)
                with torch.no_grad():
                    means = {"loss/value_avg": losses.mean(), "val/clipfrac_avg": clipped.float().mean()}
                    entries.append((count, means))
        self._record(entries, statistics)
        self._step(self.value_model, "value/grad_norm", statistics)

    def _share(self, count: int, counts: list[int]) -> float:
        """What a micro-batch's summed loss is multiplied by to give the mini-batch's mean."""
        return 1 / sum(counts) if self.args.token_means else 1 / (count * len(counts))

    def _record(self, entries: list[tuple[int, dict[str, Tensor]]], statistics: dict) -> None:
        """Adds a mini-batch's statistics: token-weighted over its micro-batches, or each of them as in stock."""
        if not self.args.token_means:
            for _, means in entries:
                for name, value in means.items():
                    statistics[name].append((1, value.item()))
            return
        total = sum(count for count, _ in entries)
        for name in entries[0][1]:
            values = [(count, means[name].item()) for count, means in entries]
            worst = max(value for _, value in values)
            mean = sum(count * value for count, value in values) / total
            statistics[name].append((total, worst if name == "val/ratio_error" else mean))

    def _step(self, model: nn.Module, name: str, statistics: dict) -> None:
        """Clips this model's gradient and steps; the other model has none, and AdamW leaves it alone.

        Raises:
            Collapse: the gradient is not finite. Nothing has been changed then.
        """
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), self.args.max_grad_norm or math.inf).item()
        if not math.isfinite(norm) and not self.scaler.is_enabled():
            raise Collapse(f"the gradient of the {name.split('/')[0]} is {norm}")
        statistics[name].append((1, norm))
        self.scaler.step(optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    # 6. metrics

    def metrics_of(self, rollout: Rollout, kl: Tensor, statistics: dict[str, list]) -> dict[str, float]:
        """TRL's names, and ours beside them."""
        price = -self.kl_coef * kl.sum(1).mean().item()
        scores = rollout.scores.mean().item()
        entropy = masked_mean(rollout.entropies, rollout.mask).item()
        means = {name: _weighted_mean(entries) for name, entries in statistics.items()}
        ratios = [value for _, value in statistics.get("val/ratio", [])]
        return {
            "objective/kl": kl.sum(1).mean().item(),
            "objective/entropy": -rollout.logps.sum(1).mean().item(),
            "objective/non_score_reward": price,
            "objective/rlhf_reward": price + scores,
            "objective/scores": scores,
            "policy/approxkl_avg": means.get("policy/approxkl_avg", 0.0),
            "policy/clipfrac_avg": means.get("policy/clipfrac_avg", 0.0),
            "loss/policy_avg": means.get("loss/policy_avg", 0.0),
            "loss/value_avg": means["loss/value_avg"],
            "val/clipfrac_avg": means["val/clipfrac_avg"],
            "policy/entropy_avg": means.get("policy/entropy_avg", entropy),
            "val/ratio": means.get("val/ratio", 1.0),
            "val/ratio_var": float(np.var(ratios, ddof=1)) if len(ratios) > 1 else 0.0,
            "val/num_eos_tokens": int(rollout.ended.sum()),
            "lr": self.lr_scheduler.get_last_lr()[0],
            "episode": self.state.episode,
            # beyond TRL
            "objective/raw_scores": rollout.raw_scores.mean().item(),
            "objective/kl_coef": self.kl_coef,
            "val/response_length": rollout.mask.sum(1).float().mean().item(),
            # how far the ratio was from 1 before the update's first step: 0 but for rounding
            "val/first_ratio_error": statistics["val/ratio_error"][0][1]
            if "val/ratio_error" in statistics
            else 0.0,
            "policy/steps": len(statistics.get("policy/grad_norm", [])),
            "policy/grad_norm": means.get("policy/grad_norm", 0.0),
            "value/grad_norm": means["value/grad_norm"],
            "rollout/entropy": entropy,
        }

    # evaluation and guards

    @torch.no_grad()
    def answer(self, prompts: list[list[int]], seed: int) -> Answers:
        """Answers prompts with the current policy, as in training, and measures the answers."""
        with self._phase("evaluation"):
            responses = self.sample(prompts, seed)
            mask, _ = self.masks_of(responses)
            logps, entropies = self.logps_of(prompts, responses, mask)
            ref_logps, scores = self.judge(prompts, responses, mask)
        return Answers(
            responses=responses,
            ended=[response[-1] == self.stop_token_id for response in responses],
            scores=scores.tolist(),
            kl=(logps - ref_logps).sum(1).tolist(),
            entropy=masked_mean(entropies, mask).item(),
        )

    def _evaluate(self, update: int) -> None:
        """Answers eval_dataset; keeps the policy if its mean score is the best so far at a KL within max_kl."""
        answers = self.answer(list(self.eval_dataset["input_ids"]), seed=self.args.seed)
        score, kl = float(np.mean(answers.scores)), float(np.mean(answers.kl))
        best = max((row["score"] for row in self.evaluations if row["kept"]), default=-math.inf)
        kept = score > best and (self.args.max_kl is None or kl <= self.args.max_kl)
        self.evaluations.append(
            {
                "update": update,
                "episode": self.state.episode,
                "score": score,
                "kl": kl,
                "entropy": answers.entropy,
                "eos_rate": float(np.mean(answers.ended)),
                "response_length": float(np.mean([len(r) for r in answers.responses])),
                "kept": kept,
            }
        )
        if kept:
            self.kept_update = update
            self._best = {name: p.detach().to("cpu", copy=True) for name, p in self.policy.named_parameters()}

    @torch.no_grad()
    def _restore_best(self) -> None:
        """Puts the best evaluated policy back, if a later one is in the model."""
        if self.kept_update is not None and (self.collapsed or self.kept_update < self.state.global_step):
            for name, parameter in self.policy.named_parameters():
                parameter.copy_(self._best[name])

    def _check_health(self, metrics: dict[str, float]) -> None:
        """
        Raises:
            Collapse: a metric is not finite, KL is above max_kl or entropy below min_entropy.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise Collapse(f"{name} is {value}")
        if self.args.max_kl is not None and metrics["objective/kl"] > self.args.max_kl:
            raise Collapse(f"KL to the reference is {metrics['objective/kl']:.1f} nats per answer, above max_kl")
        if self.args.min_entropy is not None and metrics["rollout/entropy"] < self.args.min_entropy:
            raise Collapse(f"entropy is {metrics['rollout/entropy']:.3g} nats per token, below min_entropy")

    def _fit_score_scale(self) -> None:
        """Mean and spread of the reference's own scores, on training prompts."""
        if not self.args.score_norm_episodes:
            return
        prompts = list(self.train_dataset["input_ids"])
        picks = np.random.default_rng(self.args.seed).permutation(len(prompts))[: self.args.score_norm_episodes]
        scores = self.answer([prompts[i] for i in picks], seed=self.args.seed - 1).scores
        self.score_mean, self.score_std = score_scale(torch.tensor(scores))

    # what the phases share

    def _start_state(self) -> None:
        state, args = self.state, self.args
        state.global_step = state.episode = 0
        state.max_steps = args.num_total_batches
        state.num_train_epochs = args.total_episodes / self.train_dataset_len
        for name in ("logging_steps", "eval_steps", "save_steps"):
            value = getattr(args, name)
            if value is not None:  # below 1: a share of the run
                setattr(state, name, math.ceil(state.max_steps * value) if value < 1 else value)
        self.control = self.callback_handler.on_train_begin(args, state, self.control)

    def _end_update(self, metrics: dict[str, float]) -> None:
        self.state.epoch = self.state.episode / self.train_dataset_len
        self.state.global_step += 1
        self.log(metrics)
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        if self.control.should_save:
            self._save_checkpoint(self.model, trial=None)
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def _prompt_batches(self) -> Iterator[list[list[int]]]:
        """Batches of prompts without end, in the seed's order; a short last batch of an epoch is left out."""
        for epoch in itertools.count():
            if epoch < len(self._epochs_begun):  # goes on from a checkpoint
                torch.set_rng_state(self._epochs_begun[epoch])
            else:
                self._epochs_begun.append(torch.get_rng_state())
            for batch in self.dataloader:
                rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
                yield [ids[real.bool()].tolist() for ids, real in rows]

    def _permutation(self, count: int) -> list[int]:
        if self.args.seeded_permutation:
            return self.permutations.permutation(count).tolist()
        return np.random.permutation(count).tolist()

    def _parts(self, rollout: Rollout, rows: list[int]) -> list[list[int]]:
        """The micro-batches of a mini-batch."""
        if self.args.micro_batch_tokens:
            lengths = rollout.lengths
            groups = group_by_tokens([lengths[i] for i in rows], self.args.micro_batch_tokens)
            return [[rows[i] for i in group] for group in groups]
        size = self.args.per_device_train_batch_size
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _packed(
        self, prompts: list[list[int]], responses: list[list[int]]
    ) -> Iterator[tuple[list[int], PackedBatch]]:
        for rows in self._groups(prompts, responses):
            yield rows, self._pack(prompts, responses, rows)

    def _groups(self, prompts: list[list[int]], responses: list[list[int]]) -> list[list[int]]:
        lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
        return group_by_tokens(lengths, self.args.micro_batch_tokens or 4096)

    def _pack(self, prompts: list[list[int]], responses: list[list[int]], rows: list[int]) -> PackedBatch:
        texts = [prompts[i] for i in rows], [responses[i] for i in rows]
        return pack(*texts, shares_prefixes(self.device)).to(self.device)

    def _token_logps(self, model: PreTrainedModel, hidden: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        """(N,) log-probs and entropies of the response tokens, at the sampling temperature."""
        weight = model.get_output_embeddings().weight
        return token_logps_and_entropies(hidden[batch.completion_index] / self.temperature, weight, batch.labels)

    def _values(self, batch: PackedBatch, value_mask: Tensor) -> Tensor:
        """(N,) values where `value_mask` (rows of the batch, T) is True, from each prompt's last token on.

        Normalised as the scores are, so that the value model starts as the reward model's own estimate.
        """
        hidden = last_hidden_state(backbone_of(self.value_model), batch)
        lengths = batch.label_sequence.bincount()[:, None]
        positions = torch.arange(value_mask.shape[1], device=self.device)
        index = torch.zeros_like(value_mask, dtype=torch.int64)
        index[positions < lengths] = batch.completion_index
        after = value_mask & (positions == lengths)  # stock's one position more
        index[after] = batch.last_index[after.any(1)]
        values = apply_head(self.value_model, hidden[index[value_mask]])
        return (values - self.score_mean) / self.score_std

    @contextmanager
    def _training_pass(self) -> Iterator[None]:
        """Autocast around the micro-batches of one step, so that each weight is cast once for all of them."""
        with autocast(self.device, self.precision):
            yield

    def _backward(self, loss: Tensor) -> None:
        with torch.autocast(self.device.type, enabled=False):
            self.scaler.scale(loss).backward()

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.phase_seconds[name] += time.monotonic() - started


def mask_of_lengths(lengths: list[int], width: int, device: torch.device) -> Tensor:
    """(B, width) True on the first `lengths[i]` positions of row i."""
    return torch.arange(width, device=device)[None] < torch.tensor(lengths, device=device)[:, None]


def table_of(flat: Tensor, mask: Tensor) -> Tensor:
    """(B, T) holding (N,) numbers row after row where the mask is True, 0 elsewhere."""
    table = torch.zeros(mask.shape, dtype=flat.dtype, device=flat.device)
    table[mask] = flat
    return table


def scatter_rows(table: Tensor, rows: list[int], mask: Tensor, flat: Tensor) -> None:
    """Writes (N,) numbers of the tokens of `rows`, one row after another, into (B, T) where the mask is True."""
    table[rows] = table_of(flat.to(table.dtype), mask[rows])


def _weighted_mean(entries: list[tuple[float, float]]) -> float:
    return sum(weight * value for weight, value in entries) / sum(weight for weight, _ in entries)


def _check(args: PPOConfig, tokenizer, keywords: dict) -> None:
    if args.stop_token is None and args.stop_token_id is None:
        raise ValueError("stop_token is not set: no answer would ever end; set stop_token='eos'")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(
            "the pad token must exist and differ from EOS: with one token for both, the EOS would count as "
            "padding and never be trained"
        )
    if args.missing_eos_penalty is not None and args.missing_eos_penalty < 0:
        raise ValueError(
            f"missing_eos_penalty is taken off the score: {args.missing_eos_penalty} must not be negative"
        )
    if keywords.get("peft_config") is not None:
        raise ValueError("adapters are not supported here; pass a plain model")
