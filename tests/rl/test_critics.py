"""The critics' values against fits by NumPy and by hand."""

import types

import numpy as np
import pytest
import torch

from stages.lib.model.attention import use_packed_attention
from stages.lib.model.packing import pack
from stages.lib.model.reward import load_reward_model
from stages.lib.rl.critics import FrozenCritic, ValueHead
from stages.lib.rl.rollout import Rollout
from tests.support.tiny_ppo import make_policy, make_reward_model

ONE_PROCESS = types.SimpleNamespace(num_processes=1)
H = 6


def rollout_of(*lengths) -> Rollout:
    nothing = torch.empty(0)
    responses = [[5] * length for length in lengths]
    return Rollout(list(range(len(lengths))), [[3]] * len(lengths), responses, *[nothing] * 6)


def fit(updates) -> np.ndarray:
    """(H + 1,) weights of ridge regression, the last update's returns counting 1, those before it 0.8 as much each."""
    gram, moment = 30 * np.eye(H + 1), np.zeros(H + 1)
    for age, (features, returns) in enumerate(reversed(updates)):
        columns = features * (H**0.5 / np.linalg.norm(features, axis=1, keepdims=True))
        columns = np.hstack([columns, np.ones((len(features), 1))])
        gram, moment = gram + 0.8**age * columns.T @ columns, moment + 0.8**age * columns.T @ returns
    return np.linalg.solve(gram, moment)


def test_the_frozen_critic_is_ridge_regression_of_the_returns_seen_so_far():
    random = np.random.default_rng(0)
    updates = [(random.normal(size=(9, H)), random.normal(size=9)) for _ in range(3)]
    critic, rollout = FrozenCritic(H, ONE_PROCESS), rollout_of(4, 2, 3)
    new = torch.tensor(random.normal(size=(5, H)), dtype=torch.float32)
    assert critic.values(rollout, new).tolist() == [0.0] * 5
    columns = np.hstack(
        [new.numpy() * (H**0.5 / np.linalg.norm(new.numpy(), axis=1, keepdims=True)), np.ones((5, 1))]
    )
    for count, (features, returns) in enumerate(updates, start=1):
        critic.learn(rollout, torch.tensor(returns), rollout, torch.tensor(features), [])
        expected = columns @ fit(updates[:count])
        assert critic.values(rollout, new).numpy() == pytest.approx(expected, abs=1e-6)


def test_how_long_a_feature_is_says_nothing():
    features = torch.randn(7, H, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    critic, rollout = FrozenCritic(H, ONE_PROCESS), rollout_of(7)
    critic.learn(rollout, torch.arange(7.0), rollout, features, [])
    assert torch.allclose(critic.values(rollout, features), critic.values(rollout, features * 40))


def test_a_value_is_the_normalised_score_of_the_state_before_the_token(tmp_path, tokenizer):
    policy = make_policy()
    make_reward_model(policy).save_pretrained(tmp_path)
    model = load_reward_model(tmp_path)
    prompts, responses = [[4, 5, 6], [7, 8]], [[9, 10], [11, 12, 13]]
    head = ValueHead(model)
    head.score_mean, head.score_std = 0.5, 4.0
    with torch.no_grad(), use_packed_attention(model):
        values = head(pack(prompts, responses, share_prefixes=False))
    expected = []
    with torch.no_grad():
        for prompt, response in zip(prompts, responses, strict=True):
            states = model.get_decoder()(torch.tensor([prompt + response])).last_hidden_state[0]
            expected += ((model.score(states)[len(prompt) - 1 : -1, 0] - 0.5) / 4.0).tolist()
    assert values.tolist() == pytest.approx(expected, abs=1e-5)
