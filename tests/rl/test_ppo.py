"""PPO against hand-worked cases, against the stock trainer, and against each trap known of it."""

import copy
import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback
from trl.experimental import ppo as trl_ppo

from stages.lib.analysis.stats import mean_interval
from stages.lib.model.loading import set_seed
from stages.lib.model.reward import backbone_of, new_reward_model, score_sequences
from stages.lib.rl.ppo import Answers, PPOTrainer, hold_matrices_in
from stages.lib.rl.ppo_config import STOCK, PPOConfig
from tests.conftest import ShapesMade

PAD, EOS, VOCABULARY = 0, 2, 32


def make_policy(eos_logit: float = 2.0, seed: int = 0, hidden_size: int = 32) -> LlamaForCausalLM:
    """A tiny Llama whose EOS is common and whose pad token is out of reach.

    The first feature is near constant at the output, so that its output weights act as a bias.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = 1.0  # about sqrt(32) = 5.7 after the final norm
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[PAD, 0] = -10.0
        model.lm_head.weight[EOS, 0] = eos_logit / 5.0
    return model.eval()


def make_reward_model(policy: LlamaForCausalLM, folder, seed: int = 7):
    policy.save_pretrained(folder)
    torch.manual_seed(seed)
    return new_reward_model(folder, PAD)


def make_prompts(count: int = 40, seed: int = 3) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 9, (count,), generator=generator).tolist()
    prompts = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
    return Dataset.from_dict({"input_ids": prompts})


DEFAULTS = {
    "per_device_train_batch_size": 8,
    "total_episodes": 24,
    "num_ppo_epochs": 2,
    "num_mini_batches": 1,
    "response_length": 12,
    "stop_token": "eos",
    "missing_eos_penalty": 1.0,
    "learning_rate": 1e-3,
    "local_rollout_forward_batch_size": 8,
    "num_sample_generations": 0,
    "report_to": "none",
    "save_strategy": "no",
    "bf16": False,
    "use_cpu": True,
    "seed": 5,
    "disable_tqdm": True,
    "logging_steps": 1,
}


@pytest.fixture
def build(tokenizer, tmp_path):
    """build(trainer class, **options): a trainer on tiny models, the same each time."""
    torch.set_num_threads(1)  # the models are too small to share
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.padding_side = "left"

    def build(
        trainer_class=PPOTrainer, config_class=PPOConfig, policy=None, reference=None, reward_model=None, **options
    ):
        policy = policy or make_policy()
        reward_model = reward_model or make_reward_model(policy, tmp_path / "reward")
        args = config_class(output_dir=str(tmp_path / "out"), **DEFAULTS | options)
        set_seed(args.seed)
        return trainer_class(
            args=args,
            processing_class=tokenizer,
            model=copy.deepcopy(policy),
            ref_model=copy.deepcopy(reference or policy),
            reward_model=copy.deepcopy(reward_model),
            value_model=copy.deepcopy(reward_model),
            train_dataset=make_prompts(),
            eval_dataset=make_prompts(6, seed=9),
        )

    return build


def history_of(trainer) -> list[dict]:
    trainer.train()
    return [{k: v for k, v in row.items() if k != "eps"} for row in trainer.state.log_history]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kl_estimator": "k3", "whiten_rewards": True},
        # 40 prompts: at the last batch of its data loader stock steps after every micro-batch, by accident
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "kl_coef": 0.5},
        {"local_rollout_forward_batch_size": 3, "num_ppo_epochs": 3, "gamma": 0.9, "lam": 0.8},
    ],
    ids=["plain", "k3 whitened", "accumulation", "small rollout batches"],
)
def test_three_updates_equal_stock(build, options):
    stock = history_of(build(trl_ppo.PPOTrainer, trl_ppo.PPOConfig, **options))
    ours = history_of(build(**options | STOCK))
    assert len(stock) == len(ours) == 3
    assert 0 < sum(row["val/num_eos_tokens"] for row in stock) < 24  # some end early, some do not
    for expected, row in zip(stock, ours, strict=True):
        for name, value in expected.items():
            if name != "policy/entropy_avg":  # stock averages it over what the model says after the end
                assert row[name] == pytest.approx(value, abs=1e-4), name


def test_entropy_equals_stock_where_no_answer_ends_early(build):
    policy = make_policy(eos_logit=-50.0)
    stock = history_of(build(trl_ppo.PPOTrainer, trl_ppo.PPOConfig, policy=policy))
    ours = history_of(build(policy=policy, **STOCK))
    for expected, row in zip(stock, ours, strict=True):
        assert row["policy/entropy_avg"] == pytest.approx(expected["policy/entropy_avg"], abs=1e-4)


# the traps of the stock trainer


def prompts_of(trainer, count=8):
    return list(trainer.train_dataset["input_ids"])[:count]


def plain_logps(model, prompt, response, temperature):
    """(len(response),) log-probs from the whole logits of one sequence: no packing, no mask, no chunks."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0].detach()


def test_a_tokenizer_whose_pad_is_its_eos_is_refused(build, tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    policy = make_policy()
    with pytest.raises(ValueError, match="differ from EOS"):
        PPOTrainer(PPOConfig(**DEFAULTS), tokenizer, policy, None, policy, make_prompts(), policy)


def test_prompt_tokens_that_equal_pad_or_eos_are_seen(build):
    # stock masks every pad id of the prompt and reads token 0 in its place
    trainer = build()
    prompt, response = [5, PAD, EOS, 9, EOS, 7], [11, 4, EOS]
    mask, _ = trainer.masks_of([response])
    logps, _ = trainer.logps_of([prompt], [response], mask)
    expected = plain_logps(trainer.policy, prompt, response, trainer.temperature)
    torch.testing.assert_close(logps[0].detach(), expected, atol=1e-5, rtol=1e-5)


def test_the_eos_action_is_trained(build):
    # advantage on the EOS alone: a trainer that drops it has no gradient at all
    trainer = build()
    prompts, responses = prompts_of(trainer, 1), [[11, 4, EOS]]
    rollout = rollout_of(trainer, prompts, responses)
    assert rollout.mask.tolist() == [[True, True, True]]
    steps = watch_steps(trainer)
    trainer._policy_step(rollout, torch.tensor([[0.0, 0.0, 1.0]]), [0], defaultdict(list))
    assert steps[0]["lm_head.weight"][EOS].norm() > 1e-3


def rollout_of(trainer, prompts, responses, value=0.0):
    """A rollout of given responses."""
    trainer.sample = lambda *_, **__: responses
    rollout = trainer.rollout(prompts, update=1)
    del trainer.sample
    return rollout


def watch_steps(trainer) -> list[dict[str, torch.Tensor]]:
    """A list that receives the gradients present at each optimizer step, by name within policy or value model."""
    optimizer, steps = trainer.optimizer.optimizer, []
    models = (trainer.policy, trainer.value_model)

    def record(*_):
        steps.append({n: p.grad.clone() for m in models for n, p in m.named_parameters() if p.grad is not None})

    optimizer.register_step_pre_hook(record)
    return steps


def test_the_pad_token_is_never_sampled(build):
    policy = make_policy()
    with torch.no_grad():
        policy.lm_head.weight[PAD, 0] = 2.0  # by far the likeliest token
    responses = build(policy=policy).sample(prompts_of(build()), seed=1)
    assert not any(PAD in response for response in responses)
    stock = build(policy=policy, **STOCK).sample(prompts_of(build()), seed=1)
    assert any(PAD in response for response in stock)  # the trap is real


def test_the_score_is_read_where_the_head_was_trained(build):
    # training and analysis score whole conversations that end in EOS; so must PPO, finished or not
    trainer = build()
    prompts, responses = prompts_of(trainer, 3), [[11, 4, EOS], [5, 6, 7, 8, 9], [EOS]]
    mask, _ = trainer.masks_of(responses)
    _, scores = trainer.judge(prompts, responses, mask)
    conversations = [prompts[0] + [11, 4, EOS], prompts[1] + [5, 6, 7, 8, 9, EOS], prompts[2] + [EOS]]
    expected = score_sequences(trainer.reward_model, conversations, 64, "fp32")
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_what_follows_an_answer_in_its_row_changes_neither_score_nor_logps(build):
    trainer = build()
    prompts, responses = prompts_of(trainer, 3), [[11, 4, EOS], [5, 6, 7, 8, 9], [12, EOS]]
    mask, _ = trainer.masks_of(responses)
    together = trainer.judge(prompts, responses, mask)
    for i in range(3):
        ref_logps, score = trainer.judge(prompts[i : i + 1], responses[i : i + 1], mask[i : i + 1])
        torch.testing.assert_close(ref_logps[0], together[0][i], atol=1e-5, rtol=1e-5)
        assert score.item() == pytest.approx(together[1][i].item(), abs=1e-5)


def test_answers_stop_at_their_first_eos(build):
    trainer = build()
    responses = trainer.sample(prompts_of(trainer, 24), seed=3)
    assert all(EOS not in response[:-1] for response in responses)
    ended = [response for response in responses if response[-1] == EOS]
    assert ended and all(len(response) == 12 for response in responses if response[-1] != EOS)


def test_an_unset_stop_token_is_refused(build):
    with pytest.raises(ValueError, match="stop_token"):
        build(stop_token=None)


def test_the_missing_eos_penalty_is_paid_by_unfinished_answers_alone(build):
    trainer = build(missing_eos_penalty=0.75)
    rollout = rollout_of(trainer, prompts_of(trainer, 3), [[11, 4, EOS], [5, 6, 7], [12, EOS]])
    assert rollout.ended.tolist() == [True, False, True]
    torch.testing.assert_close(rollout.scores, rollout.raw_scores - torch.tensor([0.0, 0.75, 0.0]))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_each_mini_batch_is_one_step_of_each_model(build, accumulation):
    # stock with gradient accumulation takes one step per epoch, however many mini-batches
    trainer = build(
        num_mini_batches=2,
        gradient_accumulation_steps=accumulation,
        per_device_train_batch_size=8 // accumulation,
        total_episodes=8,
        num_ppo_epochs=3,
    )
    steps = watch_steps(trainer)
    trainer.train()
    assert sum("lm_head.weight" in step for step in steps) == 3 * 2
    assert sum("score.weight" in step for step in steps) == 3 * 2
    assert trainer.state.log_history[0]["policy/steps"] == 6


def test_the_global_random_state_of_numpy_changes_nothing(build):
    histories = []
    for state in (1, 2):
        trainer = build(num_mini_batches=4)
        np.random.seed(state)
        histories.append(history_of(trainer))
    assert histories[0] == histories[1]


def test_the_same_seed_gives_the_same_history_and_another_seed_another(build):
    first, second, other = (history_of(build(seed=seed, num_mini_batches=2)) for seed in (5, 5, 6))
    assert first == second != other


def test_gradients_are_clipped(build):
    trainer = build(max_grad_norm=1e-3, total_episodes=8)
    steps = watch_steps(trainer)
    trainer.train()
    norms = [torch.stack([g.norm() for g in step.values()]).norm().item() for step in steps]
    assert max(norms) == pytest.approx(1e-3, rel=1e-3)
    assert trainer.state.log_history[0]["policy/grad_norm"] > 1e-2  # what they were before


@pytest.mark.parametrize(("bf16", "bound"), [(False, 1e-5), (True, 0.05)])
def test_before_the_first_step_ratio_is_one_and_kl_zero(build, bf16, bound):
    trainer = build(bf16=bf16, num_mini_batches=2, total_episodes=8, micro_batch_tokens=40)
    (row,) = history_of(trainer)
    assert row["val/first_ratio_error"] <= bound
    assert abs(row["objective/kl"]) <= 12 * bound
    rollout = trainer.rollout(prompts_of(build()), update=2)  # and it moves afterwards
    assert (rollout.logps - rollout.ref_logps).abs().max() > 10 * 1e-5


def test_statistics_are_means_over_tokens_not_over_padding(build):
    trainer = build(learning_rate=0.0)
    prompts, responses = prompts_of(trainer, 4), [[5] * 12, [EOS], [6, EOS], [7, 8, EOS]]
    rollout = rollout_of(trainer, prompts, responses)
    with torch.no_grad():
        trainer.policy.lm_head.weight.mul_(1.1)
    rollout.first_pass = None  # the policy is another by now
    new = [plain_logps(trainer.policy, p, r, trainer.temperature) for p, r in zip(prompts, responses, strict=True)]
    difference = torch.cat(new) - rollout.logps[rollout.mask]
    statistics = defaultdict(list)
    trainer._policy_step(rollout, torch.zeros(4, 12), [0, 1, 2, 3], statistics)
    ((count, approxkl),) = statistics["policy/approxkl_avg"]
    assert count == 12 + 1 + 2 + 3
    assert approxkl == pytest.approx(0.5 * (difference**2).mean().item(), rel=1e-3)
    assert statistics["val/ratio"][0][1] == pytest.approx(difference.exp().mean().item(), rel=1e-4)


def test_lone_tokens_give_numbers(build):
    # answers of one token, one per micro-batch: stock divides by zero tokens less one
    trainer = build(policy=make_policy(eos_logit=60.0), micro_batch_tokens=1, num_mini_batches=8)
    for row in history_of(trainer):
        assert row["val/response_length"] == 1
        assert all(math.isfinite(value) for value in row.values())


def test_scores_without_spread_survive_normalisation(build):
    trainer = build(constant_scores(1.5), score_norm_episodes=8)
    rows = history_of(trainer)
    assert (trainer.score_mean, trainer.score_std) == (1.5, 1.0)
    assert all(math.isfinite(value) for row in rows for value in row.values())


# options and guards


def with_scores(score):
    """A trainer class whose scores are `score(response)`."""

    class Scored(PPOTrainer):
        def judge(self, prompts, responses, mask):
            ref_logps, _ = super().judge(prompts, responses, mask)
            return ref_logps, torch.tensor([float(score(response)) for response in responses])

    return Scored


def constant_scores(score):
    return with_scores(lambda _: score)


def share_of_class(response) -> float:
    """Four times the share of tokens 3 to 10."""
    return 4 * sum(3 <= token < 11 for token in response) / len(response)


def test_scores_are_normalised_by_the_references_own(build):
    scorer = with_scores(lambda response: 100 + 10 * len(response))
    trainer = build(scorer, score_norm_episodes=40, learning_rate=1e-2)
    rows = history_of(trainer)
    fresh = build(scorer)  # its policy is still the reference
    prompts = list(fresh.train_dataset["input_ids"])
    order = np.random.default_rng(5).permutation(40)
    lengths = [len(response) for response in fresh.sample([prompts[i] for i in order], seed=4)]
    assert trainer.score_mean == pytest.approx(100 + 10 * np.mean(lengths))
    assert trainer.score_std == pytest.approx(10 * np.std(lengths, ddof=1))
    unpaid = (rows[0]["objective/raw_scores"] - trainer.score_mean) / trainer.score_std
    assert rows[0]["objective/scores"] == pytest.approx(unpaid - (8 - rows[0]["val/num_eos_tokens"]) / 8, abs=1e-5)


@pytest.mark.parametrize("tokens", [1, 40, 10_000])
def test_micro_batches_change_nothing_but_memory(build, tokens):
    expected = history_of(build(micro_batch_tokens=100, num_mini_batches=2))
    rows = history_of(build(micro_batch_tokens=tokens, num_mini_batches=2))
    for one, other in zip(expected, rows, strict=True):
        assert one == pytest.approx(other, abs=2e-4)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({}, 2),  # the rollout's, which is the first epoch's too, and the second epoch's
        ({"num_mini_batches": 2}, 1 + 2 * 2),
        ({"micro_batch_tokens": 100}, 3 * 2),
        ({"value_warmup_updates": 1}, 1),
    ],
)
def test_the_rollouts_pass_is_the_first_steps_where_that_step_is_one_micro_batch(build, options, passes):
    trainer = build(**{"total_episodes": 8, "num_ppo_epochs": 2, "num_mini_batches": 1} | options)
    seen = []
    trainer.policy.model.register_forward_pre_hook(
        lambda module, args, named: seen.append("sequence_lengths" in named), with_kwargs=True
    )
    history_of(trainer)
    assert sum(seen) == passes  # and not those of generation


def test_a_kept_pass_trains_like_one_of_the_steps_own(build, monkeypatch):
    rows = history_of(build(num_mini_batches=1))
    monkeypatch.setattr(PPOTrainer, "_first_pass", lambda *_: None)
    expected = history_of(build(num_mini_batches=1))
    assert len(rows) == 3
    for one, other in zip(expected, rows, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_one_pass_serves_reference_and_reward_where_their_backbones_are_one(build, tmp_path):
    shared = build()
    assert backbone_of(shared.reward_model) is shared.ref_model.get_decoder()
    other_policy = make_policy(seed=1)
    apart = build(reward_model=make_reward_model(other_policy, tmp_path / "other"))
    assert not apart.shares_backbone
    prompts, responses = prompts_of(shared, 3), [[11, 4, EOS], [5, 6, 7], [12, EOS]]
    mask, _ = shared.masks_of(responses)
    for trainer in (shared, apart):
        ref_logps, scores = trainer.judge(prompts, responses, mask)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            expected = plain_logps(make_policy(), prompt, response, trainer.temperature)
            torch.testing.assert_close(ref_logps[i, : len(response)], expected, atol=1e-5, rtol=1e-5)
        closed = [p + r + [EOS] * (r[-1] != EOS) for p, r in zip(prompts, responses, strict=True)]
        assert scores.tolist() == pytest.approx(
            score_sequences(trainer.reward_model, closed, 64, "fp32"), abs=1e-5
        )


def test_matrices_held_in_bf16_give_autocasts_bits():
    policy = make_policy()
    ids = torch.randint(3, VOCABULARY, (2, 9))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        expected = policy(ids).logits
        hold_matrices_in(policy, torch.bfloat16)
        assert torch.equal(policy(ids).logits, expected)
    assert policy.model.embed_tokens.weight.dtype == policy.model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize(("bf16", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_precision_is_really_applied(build, bf16, dtype):
    trainer = build(bf16=bf16, total_episodes=8)
    models = {
        "policy": trainer.policy.model,
        "value": trainer.value_model.model,
        "reference": trainer.ref_model.model,
        "sampler": trainer.sampler.model,
    }
    seen = defaultdict(set)
    for name, model in models.items():
        model.layers[0].mlp.up_proj.register_forward_hook(lambda *a, name=name: seen[name].add(a[-1].dtype))
    trainer.value_model.score.register_forward_hook(lambda *a: seen["head"].add(a[-1].dtype))
    trainer.train()
    assert seen == {**{name: {dtype} for name in models}, "head": {torch.float32}}
    assert all(p.dtype == torch.float32 for p in trainer.model.parameters())


def test_no_logits_of_a_whole_batch_exist(build, monkeypatch):
    monkeypatch.setattr("stages.lib.model.logps.SLICE_ELEMENTS", 256)
    policy = make_policy(eos_logit=-50.0, hidden_size=48)  # no other dimension is the vocabulary's 32
    trainer = build(policy=policy, total_episodes=8)
    with ShapesMade() as shapes:
        trainer.train()
    rows = {shape[:-1].numel() for shape in shapes if len(shape) > 1 and shape[-1] == VOCABULARY}
    assert 8 in rows  # one step of generation: a row of logits for each answer
    assert max(rows) < 8 * 12  # never one for each token


def test_value_warm_up_leaves_the_policy_alone(build):
    trainer = build(value_warmup_updates=3)
    before = [p.clone() for p in trainer.policy.parameters()], trainer.value_model.score.weight.clone()
    rows = history_of(trainer)
    assert all(torch.equal(one, other) for one, other in zip(before[0], trainer.policy.parameters(), strict=True))
    assert not torch.equal(before[1], trainer.value_model.score.weight)
    assert [row["policy/steps"] for row in rows] == [0, 0, 0] and [row["val/ratio"] for row in rows] == [1, 1, 1]


def test_target_kl_ends_an_update(build):
    assert [row["policy/steps"] for row in history_of(build(num_ppo_epochs=4))] == [4, 4, 4]
    # the first pass has approxkl 0, the second more than nothing: one step each, and the value model goes on
    trainer = build(num_ppo_epochs=4, target_kl=1e-9)
    steps = watch_steps(trainer)
    assert [row["policy/steps"] for row in history_of(trainer)] == [1, 1, 1]
    assert sum("score.weight" in step for step in steps) == 12


def test_the_value_model_has_its_own_learning_rate(build):
    trainer = build(learning_rate=0.0, value_learning_rate=1e-2, total_episodes=8)
    before = [p.clone() for p in trainer.policy.parameters()], trainer.value_model.score.weight.clone()
    trainer.train()
    assert all(torch.equal(one, other) for one, other in zip(before[0], trainer.policy.parameters(), strict=True))
    assert not torch.equal(before[1], trainer.value_model.score.weight)


def test_kl_coef_follows_its_target(build):
    rows = history_of(build(kl_target=1e-6, kl_coef=0.1))  # any KL above 1.2e-6 is an error of more than 20 %
    assert rows[0]["objective/kl_coef"] == 0.1
    assert rows[2]["objective/kl_coef"] == pytest.approx(rows[1]["objective/kl_coef"] * 1.02)


def test_log_names_are_trls(build):
    stock = history_of(build(trl_ppo.PPOTrainer, trl_ppo.PPOConfig))[0]
    assert set(stock) <= set(history_of(build())[0])


def scripted(scores, kl=0.0):
    """A trainer class whose looks at held-out prompts give these mean scores, one after another."""

    class Scripted(PPOTrainer):
        def answer(self, prompts, seed):
            number = len(self.evaluations)
            self.weights = [*getattr(self, "weights", []), self.policy.lm_head.weight.clone()]
            kls = kl if isinstance(kl, list) else [kl] * len(scores)
            return Answers([[EOS]], [True], [scores[number]], [kls[number]], 1.0)

    return Scripted


def test_the_best_policy_on_held_out_prompts_is_kept(build):
    trainer = build(scripted([1.0, 3.0, 2.0]), eval_every=1)
    trainer.train()
    assert trainer.kept_update == 2 and [row["kept"] for row in trainer.evaluations] == [True, True, False]
    assert torch.equal(trainer.policy.lm_head.weight, trainer.weights[1])
    assert not torch.equal(trainer.weights[1], trainer.weights[2])


def test_a_policy_too_far_from_the_reference_is_not_kept(build):
    trainer = build(scripted([1.0, 3.0, 2.0], kl=[0.0, 99.0, 0.0]), eval_every=1, max_kl=50.0)
    trainer.train()
    assert trainer.kept_update == 3 and torch.equal(trainer.policy.lm_head.weight, trainer.weights[2])


def test_a_collapse_stops_with_the_last_good_policy(build):
    class Runaway(scripted([1.0, 2.0])):
        def metrics_of(self, *arguments):
            metrics = super().metrics_of(*arguments)
            return metrics | ({"objective/kl": 80.0} if self.state.global_step == 2 else {})

    trainer = build(Runaway, eval_every=1, max_kl=50.0, total_episodes=80)
    trainer.train()
    assert trainer.collapsed == "update 3 of 10: KL to the reference is 80.0 nats per answer, above max_kl"
    assert trainer.kept_update == 2 and torch.equal(trainer.policy.lm_head.weight, trainer.weights[1])


def test_low_entropy_is_a_collapse(build):
    trainer = build(min_entropy=50.0)
    trainer.train()
    assert "entropy is 3" in trainer.collapsed and trainer.kept_update is None


def test_a_gradient_that_is_not_finite_is_never_applied(build):
    trainer = build(constant_scores(math.nan))
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.train()
    assert trainer.collapsed.startswith("update 1 of 3: the gradient of the policy is nan")
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))


def test_saved_folders_hold_no_pickle(build, tmp_path):
    trainer = build(save_strategy="steps", save_steps=1, total_episodes=8)
    trainer.train()
    trainer.save_model()
    names = [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert "model.safetensors" in names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, trainer.policy.lm_head.weight)


def test_callbacks_are_called(build):
    calls = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            calls.append((state.global_step, state.episode))

    trainer = build()
    trainer.add_callback(Recorder)
    trainer.train()
    assert calls == [(1, 8), (2, 16), (3, 24)]


def test_too_few_prompts_are_refused(build):
    # stock waits for ever for a batch that never fills
    with pytest.raises(ValueError, match="40 prompts do not fill"):
        build(per_device_train_batch_size=64)


# tasks with a known answer

TASK = {
    "per_device_train_batch_size": 16,
    "num_mini_batches": 2,
    "total_episodes": 16 * 40,
    "missing_eos_penalty": None,
    "value_learning_rate": 3e-3,
    "value_warmup_updates": 4,
    "whiten_advantages": False,
}


def test_a_reward_with_a_known_answer_is_learned_and_a_constant_one_moves_little(build):
    trainer = build(with_scores(share_of_class), **TASK)
    prompts = list(make_prompts(200, seed=11)["input_ids"])
    before = trainer.answer(prompts, seed=77)
    rows = history_of(trainer)
    after = trainer.answer(prompts, seed=77)

    quarters = np.array([row["objective/scores"] for row in rows]).reshape(4, 10).mean(1)
    assert (np.diff(quarters) > 0).all(), quarters
    gain = mean_interval(np.subtract(after.scores, before.scores), None, 2000, 0.95, 0)
    assert gain.low > 1.0

    idle = history_of(build(constant_scores(1.5), **TASK))
    assert max(abs(row["objective/kl"]) for row in idle) < 0.05 * rows[-1]["objective/kl"]
