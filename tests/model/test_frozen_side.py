"""The frozen models in one pass against each of them alone, one text at a time."""

import math

import pytest
import torch

from stages.lib.model.frozen_side import FrozenSide
from stages.lib.model.loading import load_causal_lm, set_seed
from stages.lib.model.memory import MemoryDial
from stages.lib.model.reward import new_reward_model
from stages.lib.rl.rewards import sum_by_answer

EOS = 2
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [5, 6, 7], [5, 6, 20], [8, 9, 10, 11]]
RESPONSES = [[12, 13, EOS], [14], [15, 16, 17, 18], [EOS], [12, 13, 31]]
OWN = [[12, 13], [14], [15, 16, 17, 18], [EOS], [12, 13, 31]]  # up to the first EOS, itself if alone
SCORED = [[12, 13, EOS], [14, EOS], [15, 16, 17, 18, EOS], [EOS], [12, 13, 31, EOS]]  # none of them has a sentence


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 1000])
def test_all_say_of_an_answer_what_each_says_alone(tiny_base, tokenizer, shared, micro_batch_tokens):
    set_seed(0)
    reward_model = new_reward_model(tiny_base / "models/base", tokenizer.pad_token_id)
    base = load_causal_lm(tiny_base / "models/base")
    if not shared:
        base.get_decoder().layers[0].mlp.up_proj.weight.data *= 1.5
    with torch.no_grad():
        scores = [reward_model(torch.tensor([p + s])).logits.item() for p, s in zip(PROMPTS, SCORED, strict=True)]
    read = [True, False, True, True, False]
    frozen = FrozenSide(base, reward_model, 0.7, tokenizer, "fp32", lambda _: MemoryDial(micro_batch_tokens))
    assert frozen.shares_backbone == shared
    found = frozen.opinions(PROMPTS, RESPONSES, read, layer=1, with_features=True)
    assert found.scores.tolist() == pytest.approx(scores, abs=1e-6)
    lengths = torch.tensor([3, 4, 1])
    of_answers = zip(sum_by_answer(found.logps, lengths), sum_by_answer(found.entropies, lengths), strict=True)
    features = iter(found.features.split(lengths.tolist()))
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad():
            out = base(torch.tensor([prompt + response]), output_hidden_states=True)
            middle = base.model(torch.tensor([prompt + OWN[i]]), output_hidden_states=True).hidden_states[1]
        torch.testing.assert_close(found.means[i], middle[0, len(prompt) :].mean(0), atol=1e-5, rtol=1e-5)
        if read[i]:
            log_probs = (out.logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
            logp, entropy = next(of_answers)
            assert logp.item() == pytest.approx(log_probs.gather(1, torch.tensor(response)[:, None]).sum().item())
            assert entropy.item() == pytest.approx(-(log_probs.exp() * log_probs).sum().item(), rel=1e-5)
            before = out.hidden_states[-1][0, len(prompt) - 1 : -1]
            torch.testing.assert_close(next(features), before, atol=1e-5, rtol=1e-5)


def test_what_is_not_asked_for_is_not_there(tiny_base, tokenizer):
    reward_model = new_reward_model(tiny_base / "models/base", tokenizer.pad_token_id)
    frozen = FrozenSide(
        load_causal_lm(tiny_base / "models/base"), reward_model, 1.0, tokenizer, "fp32", lambda _: MemoryDial(99)
    )
    found = frozen.opinions(PROMPTS, RESPONSES, read=[False] * 5)
    assert found.logps.numel() == found.features.numel() == found.means.numel() == 0
    assert len(found.scores) == 5 and all(map(math.isfinite, found.scores.tolist()))
