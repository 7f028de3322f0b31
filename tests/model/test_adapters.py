"""Adapters: off they are not there, at full rank they are full fine-tuning."""

import copy

import pytest
import torch
from pydantic import ValidationError

from stages.lib.model.adapters import FULL, TrainedWeights, adapters_learn, adapters_off, add_adapters
from stages.lib.model.loading import autocast
from stages.lib.run.errors import UserError

LORA = FULL.replace(rank=4, alpha=8.0)
IDS = torch.arange(3, 23)[None]


@torch.no_grad()
def disturb(model: torch.nn.Module) -> None:
    """Gives fresh adapters, whose products are 0, something to say."""
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.normal_(std=0.5)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_off_the_model_is_the_one_it_was_bit_for_bit(tiny_model, precision):
    original = copy.deepcopy(tiny_model)
    add_adapters(tiny_model, LORA, precision)

    @torch.no_grad()
    def logits_of(model):  # autocast keeps what it rounded until its block ends
        with autocast(model.device, precision):
            return model(IDS).logits

    expected = logits_of(original)
    assert torch.equal(logits_of(tiny_model), expected)  # fresh adapters say nothing
    disturb(tiny_model)
    assert not torch.allclose(logits_of(tiny_model), expected, atol=0.1)
    with adapters_off(tiny_model):
        assert torch.equal(logits_of(tiny_model), expected)
    assert not torch.allclose(logits_of(tiny_model), expected, atol=0.1)
    trained = {name for name, weight in tiny_model.named_parameters() if weight.requires_grad}
    assert trained and all("lora_" in name for name in trained)


def test_at_full_rank_a_linear_layer_learns_what_full_fine_tuning_learns(tiny_model):
    """W0 + B A with A = I and alpha = rank: the gradient of B is that of W, so SGD takes the same steps."""
    name = "model.layers.1.mlp.down_proj"
    full = copy.deepcopy(tiny_model)
    add_adapters(tiny_model, FULL.replace(rank=64, alpha=64.0, targets=["layers.1.mlp.down_proj"]), "fp32")
    layer = tiny_model.get_submodule(name)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(64))
    product, weight = layer.lora_B["default"].weight, full.get_submodule(name).weight
    start = weight.detach().clone()
    for _ in range(5):
        for model, trained in ((tiny_model, product), (full, weight)):
            (gradient,) = torch.autograd.grad(model(IDS, labels=IDS).loss, trained)
            with torch.no_grad():
                trained -= 0.5 * gradient
    assert (weight - start).abs().max() > 1e-3
    torch.testing.assert_close(start + product, weight, rtol=0, atol=1e-6)


def test_dropout_acts_where_adapters_learn_and_nowhere_else(tiny_model):
    add_adapters(tiny_model, LORA.replace(dropout=0.5), "fp32")
    disturb(tiny_model)
    with torch.no_grad():
        first = tiny_model(IDS).logits
        with adapters_learn(tiny_model):
            assert not torch.equal(tiny_model(IDS).logits, tiny_model(IDS).logits)
        assert torch.equal(tiny_model(IDS).logits, first)


def test_checkpoints_keep_the_adapters_alone_and_refuse_others(tiny_model):
    other = copy.deepcopy(tiny_model)
    add_adapters(tiny_model, LORA, "fp32")
    disturb(tiny_model)
    state = TrainedWeights(tiny_model).state_dict()
    assert len(state) == 2 * 2 * 7  # two matrices beside each of seven layers, twice
    add_adapters(other, LORA, "fp32")
    TrainedWeights(other).load_state_dict(state)
    assert torch.equal(other(IDS).logits, tiny_model(IDS).logits)
    state.pop(next(iter(state)))
    with pytest.raises(ValueError, match="other adapters: model.layers.0"):
        TrainedWeights(other).load_state_dict(state)


def test_layers_that_are_not_there_are_refused_by_name(tiny_model):
    with pytest.raises(UserError, match="lora.targets does not fit LlamaForCausalLM.*query"):
        add_adapters(tiny_model, LORA.replace(targets=["query"]), "fp32")


@pytest.mark.parametrize("changes", [{"rank": 0}, {"alpha": 0.0}, {"dropout": 1.0}, {"targets": []}])
def test_senseless_parameters_are_refused(changes):
    with pytest.raises(ValidationError):
        LORA.replace(**changes)


@pytest.mark.parametrize("targets", [["embed_tokens"], ["q_proj", "embed_tokens"]])
def test_an_adapter_of_the_embedding_which_merging_would_put_into_the_output_layer_too_is_refused(
    tiny_model, targets
):
    with pytest.raises(UserError, match="lora.targets names the embedding"):
        add_adapters(tiny_model, LORA.replace(targets=targets), "fp32")


def test_every_name_among_the_targets_is_a_layers(tiny_model):
    with pytest.raises(UserError, match="lora.targets: no layer of LlamaForCausalLM is named nonsense_proj"):
        add_adapters(tiny_model, LORA.replace(targets=["q_proj", "nonsense_proj"]), "fp32")


@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"]])
def test_an_adapter_of_the_output_layer_which_no_loss_would_train_is_refused(tiny_model, targets):
    with pytest.raises(UserError, match="lora.targets names the output layer"):
        add_adapters(tiny_model, LORA.replace(targets=targets), "fp32")
