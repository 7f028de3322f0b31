"""The stage on tiny models: what it learns, guards, writes and refuses."""

import dataclasses
import json
import math
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages import train_ppo
from stages.lib.model import loading
from stages.lib.model.frozen_side import FrozenSide
from stages.lib.model.loading import save_model
from stages.lib.model.logps import TokenLogps
from stages.lib.model.memory import MemoryDial
from stages.lib.rl import learner
from stages.lib.rl.rollout import Actor
from stages.lib.run.artefacts import read_parquet, write_parquet
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, load_params
from stages.train_ppo import Params, main, mini_batches_of_update, prompts_of_update
from tests.conftest import REPO, ShapesMade
from tests.support import fp16_on_cpu, short_of_memory
from tests.support.tiny_ppo import EOS, VOCABULARY, make_policy, make_prompts, make_reward_model

BASE = Base(seed=42, precision="fp32")
PARAMS = Params(
    policy="base",
    episodes=24,
    batch_size=8,
    answers_per_prompt=1,
    num_mini_batches=2,
    num_ppo_epochs=2,
    learning_rate=1e-3,
    schedule="linear",
    warmup_updates=0,
    adam_beta1=0.9,
    response_length=12,
    temperature=0.7,
    kl_coef=0.05,
    kl_target=None,
    kl_estimator="k1",
    target_kl=None,
    missing_eos_penalty=1.0,
    score_norm_episodes=0,
    advantages="gae",
    critic="frozen",
    value_warmup_updates=0,
    value_learning_rate=1e-3,
    cliprange_value=0.2,
    vf_coef=0.1,
    whiten_advantages=True,
    gamma=1.0,
    lam=0.95,
    cliprange=0.2,
    max_grad_norm=1.0,
    max_kl=50.0,
    min_entropy=0.0,
    look_prompts=5,
    look_every=2,
    micro_batch_tokens=512,
)
SEPARATE = PARAMS.replace(critic="separate")
RLOO = PARAMS.replace(advantages="rloo", answers_per_prompt=2)
KINDS = {"frozen": PARAMS, "separate": SEPARATE, "rloo": RLOO}


def write_project(root, tokenizer, policy=None):
    """Tiny models and prompt tables; the tokenizer's pad is 0 and its EOS 2, as the models'."""
    policy = policy or make_policy()
    save_model(policy, tokenizer, root / "models/base")
    save_model(make_reward_model(policy), tokenizer, root / "models/reward")
    for split, prompts in (("train", make_prompts()), ("judge", make_prompts(6, seed=9))):
        columns = {"prompt_id": [100 + i for i in range(len(prompts))], "prompt": ["?"] * len(prompts)}
        write_parquet(root / f"data/tokenized/prompts_{split}.parquet", columns | {"input_ids": prompts})
    return root


@pytest.fixture
def root(tmp_path, tokenizer):
    return write_project(tmp_path, tokenizer)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")


def history_of(root) -> list[dict]:
    return pd.read_csv(root / "reports/train_ppo/history.csv").to_dict("records")


def looks_of(root) -> list[dict]:
    return pd.read_csv(root / "reports/train_ppo/evaluations.csv").to_dict("records")


def metrics_of(root) -> dict:
    return json.loads((root / "reports/train_ppo/metrics.json").read_text())


def run(root, params, base=BASE) -> list[dict]:
    main(base, params, root)
    return history_of(root)


def weights_of(folder) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).named_parameters())


def score_by(monkeypatch, score):
    """The reward model's score becomes `score(response)`."""
    opinions = FrozenSide.opinions

    def scored(self, prompts, responses, **how):
        scores = torch.tensor([float(score(response)) for response in responses])
        return dataclasses.replace(opinions(self, prompts, responses, **how), scores=scores)

    monkeypatch.setattr(FrozenSide, "opinions", scored)


# what it writes


@pytest.mark.parametrize("kind", KINDS)
def test_writes_policy_and_reports(root, tokenizer, kind):
    facts = main(BASE, KINDS[kind], root)
    before, after = weights_of(root / "models/base"), weights_of(root / "models/ppo")
    metrics = metrics_of(root)
    assert torch.equal(after["lm_head.weight"], before["lm_head.weight"]) == (metrics["kept_update"] == 0)
    policy = AutoModelForCausalLM.from_pretrained(root / "models/ppo")
    assert policy.generation_config.eos_token_id == tokenizer.eos_token_id
    assert policy.generation_config.pad_token_id == policy.config.pad_token_id == tokenizer.pad_token_id
    assert AutoTokenizer.from_pretrained(root / "models/ppo").chat_template == tokenizer.chat_template
    names = {path.name for path in (root / "models/ppo").iterdir()}
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in names)

    history = history_of(root)
    assert [row["step"] for row in history] == [1, 2, 3] and [row["episode"] for row in history] == [8, 16, 24]
    assert all(math.isfinite(value) for row in history for value in row.values())
    trls = {"objective/kl", "objective/scores", "objective/rlhf_reward", "policy/approxkl_avg", "val/ratio", "lr"}
    assert trls | {"rep_4", "ended", "tokens", "val/explained_variance"} <= set(history[0])
    assert ("loss/value_avg" in history[0]) == (kind == "separate")

    looks = looks_of(root)
    assert [row["update"] for row in looks] == [0, 2, 3] and looks[0]["kl"] == pytest.approx(0, abs=1e-5)
    best = max(looks, key=lambda row: row["objective"])
    assert metrics["kept_update"] == best["update"]
    assert metrics["objective_gain"] == pytest.approx(
        best["objective"] - looks[0]["objective"], rel=1e-4, abs=1e-6
    )
    assert metrics["episodes"] == 24 and metrics["updates"] == 3 and metrics["stopped_early"] is None
    course = read_parquet(root / "data/courses/ppo.parquet")
    assert course["step"] == [0] * 5 + [2] * 5 + [3] * 5 and course["episode"][-1] == 24
    assert np.mean(course["score"][5:10]) == pytest.approx(looks[1]["score"], rel=1e-5)
    kl = np.subtract(course["logp"], course["ref_logp"])[5:10].mean()
    assert kl == pytest.approx(looks[1]["kl"], abs=1e-4)
    assert facts["tokens"] > 0 and facts["precision"] == "fp32" and facts["shared_backbone"]


@pytest.mark.parametrize("kind", KINDS)
def test_one_seed_one_history_and_another_seed_another(root, kind):
    files = sorted(["history.csv", "evaluations.csv", "metrics.json"])
    runs = []
    for seed, numpy_seed in ((42, 1), (42, 2), (43, 1)):
        np.random.seed(numpy_seed)  # the global state changes nothing
        torch.manual_seed(numpy_seed)
        main(BASE.replace(seed=seed), KINDS[kind], root)
        runs.append([(root / "reports/train_ppo" / name).read_bytes() for name in files])
        runs[-1].append((root / "models/ppo/model.safetensors").read_bytes())
    assert runs[0] == runs[1] and runs[0][1] != runs[2][1]


def test_starts_from_the_dpo_model_and_prices_kl_to_it(root, tokenizer):
    dpo = make_policy()
    with torch.no_grad():
        dpo.lm_head.weight.mul_(1.5)
        dpo.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    save_model(dpo, tokenizer, root / "models/dpo")
    for params in (PARAMS, SEPARATE):
        facts = main(BASE, params.replace(policy="dpo"), root)
        assert history_of(root)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
        assert not facts["shared_backbone"]


# order


def test_every_pass_over_the_prompts_takes_each_once_without_gaps():
    params = PARAMS.replace(batch_size=4, num_mini_batches=2)
    taken = [prompt for update in range(1, 11) for prompt in prompts_of_update(10, params, 42, update)]
    passes = [taken[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(one) == list(range(10)) for one in passes) and passes[0] != passes[1]
    assert prompts_of_update(10, params, 42, 7) == taken[24:28]  # whatever came before
    assert prompts_of_update(10, params, 43, 1) != taken[:4]


def test_answers_to_one_prompt_stand_together():
    params = RLOO.replace(answers_per_prompt=4)
    prompts = prompts_of_update(10, params, 42, 1)
    assert len(prompts) == 8 and prompts[:4] == [prompts[0]] * 4 and prompts[4:] == [prompts[4]] * 4


def test_more_answers_than_prompts_begin_a_new_pass():
    assert sorted(prompts_of_update(3, PARAMS.replace(batch_size=6), 42, 1)) == [0, 0, 1, 1, 2, 2]


def test_mini_batches_cut_fresh_orders():
    steps = mini_batches_of_update(PARAMS, 42, 1)
    assert [len(step) for step in steps] == [4] * 4
    assert sorted(steps[0] + steps[1]) == sorted(steps[2] + steps[3]) == list(range(8))
    assert steps[:2] != steps[2:] and steps != mini_batches_of_update(PARAMS, 42, 2)


# the traps


def test_each_mini_batch_is_one_step(root, monkeypatch):
    rows = run(root, PARAMS.replace(num_ppo_epochs=3))
    assert [row["policy/steps"] for row in rows] == [6, 6, 6]


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_before_the_first_step_ratio_is_one_and_kl_zero(root, precision, bound):
    rows = run(root, PARAMS.replace(micro_batch_tokens=40), BASE.replace(precision=precision))
    assert rows[0]["val/first_ratio_error"] <= bound and abs(rows[0]["objective/kl"]) <= 12 * bound
    assert abs(rows[2]["objective/kl"]) > 1e-4  # and it moves afterwards


def test_answers_of_one_token_give_numbers(tmp_path, tokenizer):
    # stock divides by zero tokens less one
    root = write_project(tmp_path, tokenizer, make_policy(eos_logit=60.0))
    for params in KINDS.values():
        for row in run(root, params.replace(micro_batch_tokens=1, num_mini_batches=4)):
            assert row["tokens"] == 1 and all(math.isfinite(value) for value in row.values())


def test_scores_without_spread_survive_normalisation(root, monkeypatch):
    score_by(monkeypatch, lambda response: 1.5)
    rows = run(root, PARAMS.replace(score_norm_episodes=8))
    assert (metrics_of(root)["score_mean"], metrics_of(root)["score_std"]) == (1.5, 1.0)
    assert all(math.isfinite(value) for row in rows for value in row.values())


def test_scores_are_normalised_by_the_references_own(root, monkeypatch):
    score_by(monkeypatch, lambda response: 100 + 10 * len(response))
    seen = []
    roll_out = Actor.roll_out
    monkeypatch.setattr(Actor, "roll_out", lambda self, *a: seen.append(roll_out(self, *a)) or seen[-1])
    rows = run(root, PARAMS.replace(score_norm_episodes=40))
    lengths = [len(response) for response in seen[0].responses]
    metrics = metrics_of(root)
    assert len(lengths) == 40
    assert metrics["score_mean"] == pytest.approx(100 + 10 * np.mean(lengths), rel=1e-5)
    assert metrics["score_std"] == pytest.approx(10 * np.std(lengths, ddof=1), rel=1e-5)
    unpaid = (rows[0]["objective/raw_scores"] - metrics["score_mean"]) / metrics["score_std"]
    assert rows[0]["objective/scores"] == pytest.approx(unpaid - (1 - rows[0]["ended"]), abs=1e-4)


def test_the_missing_eos_penalty_is_paid_by_unfinished_answers_alone(root, monkeypatch):
    score_by(monkeypatch, lambda response: 2.0)
    rows = run(root, PARAMS.replace(missing_eos_penalty=0.75))
    assert 0 < rows[0]["ended"] < 1
    assert rows[0]["objective/scores"] == pytest.approx(2.0 - 0.75 * (1 - rows[0]["ended"]), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 40])
def test_micro_batches_change_nothing_but_memory(root, kind, tokens):
    expected = run(root, KINDS[kind].replace(micro_batch_tokens=10_000))
    for one, other in zip(expected, run(root, KINDS[kind].replace(micro_batch_tokens=tokens)), strict=True):
        assert one == pytest.approx(other, abs=5e-4)


def test_no_logits_of_a_whole_batch_exist(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("stages.lib.model.logps.SLICE_ELEMENTS", 256)
    policy = make_policy(eos_logit=-50.0, hidden_size=48)  # no other dimension is the vocabulary's 32
    root = write_project(tmp_path, tokenizer, policy)
    with ShapesMade() as shapes:
        main(BASE, PARAMS.replace(episodes=8), root)
    rows = {shape[:-1].numel() for shape in shapes if len(shape) > 1 and shape[-1] == VOCABULARY}
    assert 8 in rows  # one step of generation: a row of logits for each answer
    assert max(rows) < 8 * 12  # never one for each token


def test_a_rollout_carries_no_graph(root, monkeypatch):
    seen = []
    update = train_ppo.update_policy
    monkeypatch.setattr(train_ppo, "update_policy", lambda *a: seen.append(a[1]) or update(*a))
    main(BASE, SEPARATE, root)
    tensors = [value for rollout in seen for value in vars(rollout).values() if isinstance(value, torch.Tensor)]
    assert len(seen) == 3 and tensors and not any(tensor.requires_grad for tensor in tensors)


@pytest.mark.parametrize("kind", ["frozen", "separate"])
def test_out_of_memory_in_a_step_halves_the_dial_and_changes_no_result(root, monkeypatch, capsys, kind):
    expected = run(root, KINDS[kind].replace(micro_batch_tokens=10_000))
    short_of_memory.install(monkeypatch, most=1, module=learner)
    for one, other in zip(expected, run(root, KINDS[kind].replace(micro_batch_tokens=10_000)), strict=True):
        assert one == pytest.approx(other, abs=5e-4)
    assert "train_ppo: memory ran out: goes on with micro-batches of" in capsys.readouterr().out


# options and guards


def test_value_warm_up_leaves_the_policy_alone(root):
    for params in (PARAMS, SEPARATE):
        rows = run(root, params.replace(value_warmup_updates=2))
        assert [row["policy/steps"] for row in rows] == [0, 0, 4]
        assert [row["val/ratio"] for row in rows[:2]] == [1, 1]
        assert abs(rows[1]["objective/kl"]) < 1e-5


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_the_optimizer_remembers_as_much_as_is_asked_for(root, monkeypatch, beta1):
    update, betas = train_ppo.update_policy, []

    def watched(policy, *args):
        betas.extend(group["betas"] for group in policy.optimizer.param_groups)
        return update(policy, *args)

    monkeypatch.setattr(train_ppo, "update_policy", watched)
    run(root, PARAMS.replace(adam_beta1=beta1))
    assert betas == [(beta1, 0.999)] * 3


def test_without_a_critic_there_is_nothing_to_warm_up(root):
    assert run(root, RLOO.replace(value_warmup_updates=9)) == run(root, RLOO)


def test_target_kl_ends_an_update(root):
    # the first pass has approxkl 0, the second more than nothing: one step each, and the value model goes on
    params = SEPARATE.replace(num_mini_batches=1, num_ppo_epochs=4)
    assert [row["policy/steps"] for row in run(root, params)] == [4, 4, 4]
    assert [row["policy/steps"] for row in run(root, params.replace(target_kl=1e-9))] == [1, 1, 1]


def test_kl_coef_follows_its_target(root):
    rows = run(root, PARAMS.replace(kl_target=1e-6, kl_coef=0.1))
    assert rows[0]["objective/kl_coef"] == 0.1
    over = [np.clip(row["objective/kl"] / 1e-6 - 1, -0.2, 0.2) for row in rows]
    assert rows[2]["objective/kl_coef"] == pytest.approx(rows[1]["objective/kl_coef"] * (1 + 0.1 * over[1]))


def test_looks_are_compared_at_one_price_whatever_becomes_of_kl_coef(root):
    params = PARAMS.replace(kl_target=1e-6, kl_coef=0.5, missing_eos_penalty=0.0, look_every=1)
    rows, looks = run(root, params), looks_of(root)
    # scores are not normalised here: the objective is they, less the price
    assert rows[2]["objective/kl_coef"] != 0.5
    assert [row["objective"] for row in looks] == pytest.approx([row["score"] - 0.5 * row["kl"] for row in looks])
    assert metrics_of(root)["kl_coef"] == 0.5


def looks_score(monkeypatch, scores):
    """The judge's prompts get these scores, one look after another; training prompts that of their first token."""
    waiting = iter(scores)
    opinions = FrozenSide.opinions

    def scored(self, prompts, responses, **how):
        scores = torch.tensor([float(response[0] % 2) for response in responses])
        if len(prompts) == 5:
            scores = torch.full((5,), next(waiting))
        return dataclasses.replace(opinions(self, prompts, responses, **how), scores=scores)

    monkeypatch.setattr(FrozenSide, "opinions", scored)


def watch_weights(monkeypatch):
    """A list that receives the policy's output weights as each update begins."""
    seen = []
    roll_out = Actor.roll_out

    def watched(self, prompts, seed):
        if len(prompts) == 5:
            seen.append(self.policy.model.lm_head.weight.detach().clone())
        return roll_out(self, prompts, seed)

    monkeypatch.setattr(Actor, "roll_out", watched)
    return seen


@pytest.mark.parametrize(("scores", "kept"), [((0.0, 9.0, 30.0, 5.0), 2), ((0.0, -9.0, -9.0, -9.0), 0)])
def test_the_best_look_is_kept_and_the_start_is_a_candidate(root, monkeypatch, capsys, scores, kept):
    looks_score(monkeypatch, scores)
    seen = watch_weights(monkeypatch)
    main(BASE, PARAMS.replace(look_every=1, missing_eos_penalty=0.0), root)
    assert metrics_of(root)["kept_update"] == kept and len(seen) == 4
    assert torch.equal(weights_of(root / "models/ppo")["lm_head.weight"], seen[kept])
    assert not torch.equal(seen[2], seen[3])
    assert ("models/ppo is the start itself" in capsys.readouterr().out) == (kept == 0)


def test_without_looks_the_last_policy_is_kept(root, monkeypatch):
    looks_score(monkeypatch, (0.0, -9.0))
    seen = watch_weights(monkeypatch)
    main(BASE, PARAMS.replace(look_every=0), root)
    assert metrics_of(root)["kept_update"] == 3
    assert torch.equal(weights_of(root / "models/ppo")["lm_head.weight"], seen[1])


@pytest.mark.parametrize(("far", "kept"), [(60.0, 0), (40.0, 3)])
def test_a_policy_too_far_from_the_reference_is_not_kept(root, monkeypatch, far, kept):
    """At the looks after training its answers are `far` nats from it; what they score outweighs the price."""
    looks_score(monkeypatch, (0.0, 90.0, 91.0))
    scored, looks = FrozenSide.opinions, []

    def at_a_distance(self, prompts, responses, **how):
        found = scored(self, prompts, responses, **how)
        looks.extend([True] if len(prompts) == 5 else [])
        if len(prompts) != 5 or len(looks) == 1:
            return found
        return dataclasses.replace(found, logps=found.logps - far * len(responses) / len(found.logps))

    monkeypatch.setattr(FrozenSide, "opinions", at_a_distance)
    main(BASE, PARAMS.replace(max_kl=50.0, missing_eos_penalty=0.0), root)
    assert [row["kl"] for row in looks_of(root)] == pytest.approx([0.0, far, far], abs=2.0)
    assert metrics_of(root)["kept_update"] == kept


def test_a_collapse_stops_with_the_last_good_policy(root, monkeypatch, capsys):
    looks_score(monkeypatch, (0.0, 30.0, 40.0))
    check = train_ppo.check_health
    monkeypatch.setattr(
        train_ppo,
        "check_health",
        lambda row, params: check(row | ({"objective/kl": 80.0} if row["step"] == 3 else {}), params),
    )
    main(BASE, PARAMS.replace(episodes=80, look_every=1, missing_eos_penalty=0.0), root)
    expected = "update 3 of 10: KL to the reference is 80.0 nats per answer, above max_kl"
    assert metrics_of(root)["stopped_early"] == expected and metrics_of(root)["kept_update"] == 2
    assert f"stopped early, {expected}" in capsys.readouterr().out


def test_a_collapse_before_anything_was_better_is_an_error(root):
    with pytest.raises(UserError, match="collapsed before.*entropy is 3.*learning_rate"):
        main(BASE, PARAMS.replace(min_entropy=50.0, look_every=0), root)
    assert not (root / "models/ppo").exists()


def test_an_objective_that_is_not_a_number_ends_the_run(root, monkeypatch):
    score_by(monkeypatch, lambda response: math.nan)
    with pytest.raises(UserError, match="update 0 of 3: the objective is nan"):
        main(BASE, PARAMS, root)


def test_a_gradient_that_is_not_finite_ends_the_run_before_its_step(root, monkeypatch):
    losses_of = train_ppo.policy_losses

    def steep(logps, *others):
        losses, clipped = losses_of(logps, *others)
        return losses + (logps - logps.detach()).sqrt(), clipped  # finite itself; the slope of sqrt at 0 is not

    monkeypatch.setattr(train_ppo, "policy_losses", steep)
    with pytest.raises(UserError, match="the start: update . of 3: the gradient's norm is (nan|inf)"):
        main(BASE, PARAMS, root)
    assert not (root / "models/ppo").exists()


def test_the_price_of_kl_may_be_k3s(root):
    """Whose tokens cost what exp(r) - 1 - r says: never less than nothing, where k1's may."""
    k1, k3 = (run(root, PARAMS.replace(kl_estimator=name, learning_rate=3e-3)) for name in ("k1", "k3"))
    assert k1[0] == pytest.approx(k3[0], abs=1e-4)  # at the start there is no distance
    assert all(row["objective/kl"] >= 0 for row in k3) and k3[2]["objective/kl"] != k1[2]["objective/kl"]


@pytest.mark.parametrize("kind", KINDS)
def test_steps_that_overflow_fp16_are_counted_and_no_collapse(root, monkeypatch, kind):
    monkeypatch.setattr(loading, "make_accelerator", fp16_on_cpu.make_accelerator)
    fp16 = BASE.replace(precision="fp16")
    rows = run(root, KINDS[kind], fp16)
    assert [row["policy/skipped"] for row in rows] == [0, 0, 0]
    monkeypatch.setattr(loading, "INITIAL_LOSS_SCALE", 2.0**40)
    rows = run(root, KINDS[kind].replace(num_mini_batches=4, episodes=40, batch_size=8), fp16)
    assert rows[0]["policy/skipped"] > 0 and sum(row["policy/steps"] for row in rows) > 0
    assert all(row["policy/skipped"] + row["policy/steps"] == 8 for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert metrics_of(root)["stopped_early"] is None


def test_a_run_of_which_fp16_made_no_step_is_an_error(root, monkeypatch):
    monkeypatch.setattr(loading, "make_accelerator", fp16_on_cpu.make_accelerator)
    monkeypatch.setattr(loading, "INITIAL_LOSS_SCALE", 2.0**80)
    with pytest.raises(UserError, match="every step overflowed fp16; set base.precision=fp32"):
        main(BASE.replace(precision="fp16"), PARAMS, root)


def test_a_gradient_that_no_scale_makes_finite_is_a_collapse(root, monkeypatch):
    monkeypatch.setattr(loading, "make_accelerator", fp16_on_cpu.make_accelerator)
    monkeypatch.setattr(loading, "INITIAL_LOSS_SCALE", 2.0)
    losses = train_ppo.policy_losses
    monkeypatch.setattr(train_ppo, "policy_losses", lambda *a: (losses(*a)[0] * math.inf, losses(*a)[1]))
    with pytest.raises(UserError, match="at a loss scale below 1 too; try base.precision=fp32"):
        main(BASE.replace(precision="fp16"), PARAMS, root)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_sampler_keeps_its_rotary_frequencies_in_float32(precision):
    policy = TokenLogps(make_policy(), 1.0)
    actor = Actor(policy, None, None, precision, 8, MemoryDial(512))
    assert {p.dtype for p in actor.sampler.parameters()} == {loading.DTYPES[precision]}
    assert torch.equal(actor.sampler.model.rotary_emb.inv_freq, policy.model.model.rotary_emb.inv_freq)
    assert actor.sampler.model.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_precision_is_really_applied(root, monkeypatch, precision):
    seen = {}
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    roll_out, opinions, values = Actor.roll_out, FrozenSide.opinions, train_ppo.SeparateCritic.values

    def watching(name, model_of, method):
        def watched(self, *args, **how):
            handle = model_of(self).register_forward_hook(lambda *a: seen.setdefault(name, set()).add(a[-1].dtype))
            try:
                return method(self, *args, **how)
            finally:
                handle.remove()

        return watched

    policy = watching("policy", lambda actor: actor.policy.model.model.layers[0].mlp.up_proj, roll_out)
    sampler = watching("sampler", lambda actor: actor.sampler.model.layers[0].mlp.up_proj, policy)
    monkeypatch.setattr(Actor, "roll_out", sampler)
    reference = watching("reference", lambda side: side.base.model.layers[0].mlp.up_proj, opinions)
    monkeypatch.setattr(FrozenSide, "opinions", reference)
    critic = watching("value", lambda critic: critic.head.model.model.layers[0].mlp.up_proj, values)
    monkeypatch.setattr(train_ppo.SeparateCritic, "values", critic)
    main(BASE.replace(precision=precision), SEPARATE.replace(episodes=8), root)
    assert seen == {name: {dtype} for name in ("policy", "sampler", "reference", "value")}
    assert weights_of(root / "models/ppo")["lm_head.weight"].dtype == torch.float32


def test_a_reward_model_without_its_head_is_an_error(root, tokenizer):
    save_model(make_policy(), tokenizer, root / "models/reward")
    with pytest.raises(UserError, match="score.weight"):
        main(BASE, PARAMS, root)


def test_committed_params_are_valid():
    params = load_params("train_ppo", Params, REPO)
    assert params.episodes >= 96 and params.response_length >= 64 and params.missing_eos_penalty > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"lam": 1.5}, "lam"),
        ({"target_kl": -1.0}, "target_kl"),
        ({"num_mini_batches": 3}, "multiple of num_mini_batches"),
        ({"kl_target": 1.0, "kl_coef": 0.0}, "with kl_coef 0 it would stay 0"),
        ({"answers_per_prompt": 3}, "multiple of answers_per_prompt"),
        ({"advantages": "rloo"}, "rloo needs answers_per_prompt of at least 2"),
        ({"value_warmup_updates": 3}, "leave no update"),
        ({"missing_eos_penalty": -1.0}, "missing_eos_penalty"),
    ],
)
def test_bad_params_are_named(change, message):
    with pytest.raises(ValidationError, match=message):
        PARAMS.replace(**change)


# several processes


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_as_one(tmp_path, tokenizer, kind):
    for name in ("one", "two"):
        write_project(tmp_path / name, tokenizer)
    expected = run(tmp_path / "one", KINDS[kind])
    code = (
        "import sys, torch; from pathlib import Path; from stages.train_ppo import main; from tests import "
        f"test_train_ppo as t; torch.set_num_threads(1); main(t.BASE, t.KINDS['{kind}'], Path(sys.argv[1]))"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "DEVICE": "cpu"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        environment |= {"ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, "-c", code, str(tmp_path / "two")]
        processes.append(subprocess.Popen(command, cwd=REPO, env=environment, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-3000:]
    for one, other in zip(expected, history_of(tmp_path / "two"), strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-6)


# a task with a known answer


def share_of_class(response) -> float:
    """Four times the share of tokens 3 to 10."""
    return 4 * sum(3 <= token < 11 for token in response) / len(response)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_with_a_known_answer_is_learned_and_a_constant_one_moves_little(root, monkeypatch, kind):
    task = {"batch_size": 16, "episodes": 16 * 40, "missing_eos_penalty": 0.0, "whiten_advantages": False}
    task |= {"value_learning_rate": 3e-3, "value_warmup_updates": 4, "look_every": 0, "look_prompts": 6}
    with monkeypatch.context() as patched:
        score_by(patched, share_of_class)
        rows = run(root, KINDS[kind].replace(**task))
        looks = looks_of(root)
    quarters = np.array([row["objective/scores"] for row in rows]).reshape(4, 10).mean(1)
    assert (np.diff(quarters) > 0).all() or quarters[2:].min() > 3.4, quarters  # of 4 at most
    assert quarters[3] - quarters[0] > 0.8, quarters
    assert looks[-1]["score"] > looks[0]["score"] + 1.0

    score_by(monkeypatch, lambda response: 1.5)
    idle = run(root, KINDS[kind].replace(**task))
    assert max(abs(row["objective/kl"]) for row in idle) < 0.05 * rows[-1]["objective/kl"]


def test_the_eos_action_is_trained(root, monkeypatch):
    # paid for ending early, the policy learns to end: a trainer that drops the EOS from its loss never does
    score_by(monkeypatch, lambda response: 3.0 if response[-1] == EOS else 0.0)
    rows = run(root, PARAMS.replace(episodes=8 * 40, learning_rate=3e-3, schedule="constant"))
    assert np.mean([row["ended"] for row in rows[-5:]]) > 0.95 > np.mean([row["ended"] for row in rows[:3]])


def test_fewer_prompts_than_processes_are_refused(root, tokenizer):
    actor = Actor(TokenLogps(make_policy(), 1.0), tokenizer, Accelerator(cpu=True), "fp32", 4, MemoryDial(64))
    actor.accelerator = SimpleNamespace(num_processes=3, process_index=2)
    with pytest.raises(UserError, match="3 processes and 2 prompts to answer: LAUNCH fewer"):
        actor.sample(make_prompts(2), seed=0)


def test_hidden_states_are_copied_for_a_critic_alone(root, monkeypatch):
    asked = []
    opinions = FrozenSide.opinions

    def watched(self, *texts, **how):
        asked.append(how["with_features"])
        return opinions(self, *texts, **how)

    monkeypatch.setattr(FrozenSide, "opinions", watched)
    run(root, RLOO.replace(score_norm_episodes=4))
    assert not any(asked)
    asked.clear()
    run(root, PARAMS)
    assert sum(asked) == 3  # an update each, and no look
