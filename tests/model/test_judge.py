"""The judge's read-out against transformers' own hidden states, one text at a time, and its files."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stages.lib.model.answer_means import answer_means
from stages.lib.model.judge import (
    Judge,
    fit_judge,
    load_judge,
    save_judge,
)
from stages.lib.run.artefacts import read_json
from stages.lib.run.errors import UserError

EOS = 2
PROMPTS = [[5, 6, 7], [8, 9, 10, 11], [5, 6, 7], [5, 6, 20], [8, 9, 10, 11]]
RESPONSES = [[12, 13, EOS, 30], [14], [15, 16, 17, 18], [EOS, 40], []]
READ = [[12, 13], [14], [15, 16, 17, 18], [EOS], [EOS]]  # worked by hand: up to the first EOS, itself if alone


def whole_means(model, layer):
    """The same by an ordinary forward pass over each text alone; hidden_states[0] are the embeddings."""
    means = []
    for prompt, answer in zip(PROMPTS, READ, strict=True):
        with torch.no_grad():
            states = model.model(torch.tensor([prompt + answer]), output_hidden_states=True).hidden_states
        means.append(states[layer][0, len(prompt) :].mean(0))
    return torch.stack(means)


@pytest.mark.parametrize("micro_batch_tokens", [1, 9, 1000])
def test_means_are_those_of_the_answers_own_tokens(tiny_model, micro_batch_tokens):
    # after the last layer transformers' list holds the normalised state, so only the one before can be compared
    means = answer_means(tiny_model, PROMPTS, RESPONSES, [1, 2], micro_batch_tokens, "fp32")
    assert means.shape == (2, 5, 32) and means.dtype == torch.float32
    torch.testing.assert_close(means[0], whole_means(tiny_model, 1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(means[0], means[1])


def test_the_last_layers_state_normalised_is_the_models_own(tiny_model):
    # with answers of one token the mean is the state itself, to which the final norm can be applied
    last = answer_means(tiny_model, PROMPTS[:2], [[12], [14]], [2], 1000, "fp32")[0]
    for row, ids in zip(last, ([5, 6, 7, 12], [8, 9, 10, 11, 14]), strict=True):
        with torch.no_grad():
            expected = tiny_model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        torch.testing.assert_close(tiny_model.model.norm(row).detach(), expected, atol=1e-5, rtol=1e-5)


def test_the_model_is_as_before_afterwards(tiny_model):
    ids = torch.tensor([[5, 6, 7, 8]])
    before = tiny_model(ids).logits.detach()
    answer_means(tiny_model, PROMPTS, RESPONSES, [1], 1000, "fp32")
    assert torch.equal(tiny_model(ids).logits, before)


@pytest.mark.parametrize("layers", [[0], [3], [1, -1]])
def test_a_layer_that_is_not_there_is_refused(tiny_model, layers):
    with pytest.raises(ValueError, match="of 2"):
        answer_means(tiny_model, PROMPTS, RESPONSES, layers, 1000, "fp32")


def test_scores_by_hand():
    judge = Judge(3, 0.01, torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), torch.tensor([1.0, -3.0]))
    # ((5 - 1) / 2) * 1 + ((6 - 2) / 4) * -3 = 2 - 3; the mean itself scores 0
    assert judge.scores(torch.tensor([[5.0, 6.0], [1.0, 2.0]])).tolist() == [-1.0, 0.0]


def test_a_judge_is_read_back_as_it_was_written_without_pickle(tmp_path):
    judge = Judge(3, 0.01, torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0]), torch.tensor([1.0, -3.0]))
    save_judge(judge, tmp_path / "judge")
    assert {path.name for path in (tmp_path / "judge").iterdir()} == {"judge.json", "judge.safetensors"}
    assert read_json(tmp_path / "judge/judge.json") == {"layer": 3, "strength": 0.01}
    assert set(load_file(tmp_path / "judge/judge.safetensors")) == {"weight", "mean", "scale"}
    again = load_judge(tmp_path / "judge")
    assert (again.layer, again.strength) == (3, 0.01)
    assert all(torch.equal(getattr(again, name), getattr(judge, name)) for name in ("weight", "mean", "scale"))
    with pytest.raises(UserError, match="no judge there; run: dvc repro train_judge"):
        load_judge(tmp_path / "nowhere")


def test_the_fit_solves_its_own_equation():
    # at the optimum of  sum w_i log(1 + exp(-d_i v)) over the pairs and their mirror images, + |v|^2 / (2 C),
    # the gradient is zero:  v = 2 C sum w_i d_i / (1 + exp(d_i v))
    rng = np.random.default_rng(0)
    differences, weights = rng.normal(size=(40, 3)) + [0.5, 0.0, -1.0], rng.uniform(0.5, 2.0, 40)
    fitted = fit_judge(differences, 0.3, weights)
    gradient_side = (weights / (1 + np.exp(differences @ fitted))) @ differences
    np.testing.assert_allclose(fitted, 0.3 * 2 * gradient_side, rtol=2e-3, atol=2e-3)
    assert fitted[2] < 0 < fitted[0]
