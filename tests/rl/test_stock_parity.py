"""Three updates composed of our functions equal TRL 1.12.0's PPOTrainer, as tests/support/stock_ppo.py saw it.

What only the stock trainer does stands here: it pays the score one position after an answer that ended early and
trains a value there, reads the score of an unfinished answer at whatever token came last, and dilutes approxkl and
ratio with the padding.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from stages.lib.model.attention import hidden_states, use_packed_attention
from stages.lib.model.logps import TokenLogps, read_answers
from stages.lib.model.memory import MemoryDial
from stages.lib.model.packing import pack
from stages.lib.model.reward import apply_head, backbone_of
from stages.lib.rl.advantages import gae, whiten
from stages.lib.rl.critics import SeparateCritic, ValueHead
from stages.lib.rl.learner import Learner
from stages.lib.rl.rewards import penalize_unfinished, token_kl, token_rewards
from stages.lib.rl.rollout import Rollout
from stages.train_ppo import metrics_of, update_policy
from tests.support.tiny_ppo import EOS, PAD, make_policy, make_reward_model
from tests.test_train_ppo import PARAMS

STOCK = json.loads((Path(__file__).parent / "stock_ppo.json").read_text())
WIDTH = STOCK["defaults"]["response_length"]


def cut(response: list[int]) -> list[int]:
    """Up to the first EOS; the stock trainer pads what follows."""
    return response[: response.index(EOS) + 1] if EOS in response else response


@torch.no_grad()
def stock_scores(model, prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    """(B,) read at each response's last token, EOS or not."""
    with use_packed_attention(backbone_of(model)):
        batch = pack(prompts, responses)
        return apply_head(model, hidden_states(backbone_of(model), batch)[batch.last_index])


@pytest.mark.parametrize("case", STOCK["cases"])
def test_three_updates_equal_stock(case):
    options = {"whiten_rewards": False, "gamma": 1.0, "lam": 0.95, "kl_coef": 0.05, "kl_estimator": "k1"}
    options |= {"cliprange": 0.2} | STOCK["defaults"] | STOCK["cases"][case]["options"]
    params = PARAMS.replace(
        batch_size=8,
        num_mini_batches=1,
        num_ppo_epochs=options["num_ppo_epochs"],
        cliprange=options["cliprange"],
        max_grad_norm=0.0,
    )
    accelerator = Accelerator(cpu=True)
    policy = TokenLogps(make_policy(), 0.7 + 1e-7)
    reference = TokenLogps(make_policy(), 0.7 + 1e-7)
    reward_model = make_reward_model(make_policy())
    how = accelerator, MemoryDial(512), options["learning_rate"], ("linear", 0, 3), 0.0
    learner = Learner(policy, *how)
    head = ValueHead(make_reward_model(make_policy()))
    critic = SeparateCritic(head, Learner(head, *how), 0.1, "fp32", 0.2)

    for update in STOCK["cases"][case]["updates"]:
        prompts, responses = update["prompts"], [cut(response) for response in update["responses"]]
        logps, entropies = read_answers(policy, prompts, responses, 512, "fp32")
        ref_logps, _ = read_answers(reference, prompts, responses, 512, "fp32")
        ended = torch.tensor([EOS in response for response in responses])
        raw_scores = stock_scores(reward_model, prompts, responses)
        nothing = torch.zeros(0)
        places = list(range(8))
        rollout = Rollout(places, prompts, responses, ended, logps, entropies, ref_logps, raw_scores, nothing)
        kl = token_kl(logps, ref_logps, options["kl_estimator"])
        scores = penalize_unfinished(raw_scores, ended, options["missing_eos_penalty"])

        # stock's one position more where an answer ended early
        longer = dataclasses.replace(rollout, responses=[r + [PAD] * (len(r) < WIDTH) for r in responses])
        values = critic.values(longer, nothing)
        longer = dataclasses.replace(longer, values=values)
        real = torch.cat([torch.arange(n) < len(r) for n, r in zip(longer.lengths, responses, strict=True)])
        longer_kl = torch.zeros(len(values)).masked_scatter(real, kl)
        rewards = token_rewards(longer_kl, scores, longer.lengths, options["kl_coef"])
        if options["whiten_rewards"]:
            rewards = whiten(rewards) + rewards.mean()
        advantages = gae(rewards, values, longer.lengths, options["gamma"], options["lam"])
        returns = advantages + values

        epochs = [places] * options["num_ppo_epochs"]
        whitened = whiten(advantages[real])
        steps = update_policy(learner, rollout, whitened, epochs, params)
        learning_rate = learner.next_learning_rate()
        learned = critic.learn(longer, returns, longer, nothing, epochs)

        share = len(logps) / (8 * WIDTH)  # of the padded table that is answers
        diluted = [s | {"approxkl": s["approxkl"] * share, "ratio": s["ratio"] * share + 1 - share} for s in steps]
        ours = metrics_of(rollout, kl, scores, diluted, options["kl_coef"]) | learned | {"lr": learning_rate}
        for name, expected in update["metrics"].items():
            if name not in ("policy/entropy_avg", "episode", "epoch", "step"):  # stock's entropy: padding's too
                assert ours[name] == pytest.approx(expected, abs=1e-4), name
    assert 0 < sum(EOS in r for u in STOCK["cases"][case]["updates"] for r in u["responses"]) < 24
