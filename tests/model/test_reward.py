"""Scores are read where they are trained, whatever the batch, and never from a random head."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from stages.lib.model.loading import set_seed
from stages.lib.model.reward import (
    backbone_of,
    closed,
    load_reward_model,
    new_reward_model,
    pooled_features,
    score_sequences,
)
from stages.lib.run.errors import UserError

EOS = 2


@pytest.fixture
def reward_model(tiny_base, tokenizer):
    set_seed(0)
    return new_reward_model(tiny_base / "models/base", tokenizer.pad_token_id)


@pytest.fixture
def sequences():
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 31, 2, 18, 31]
    return [torch.randint(3, 512, (n - 1,), generator=generator).tolist() + [EOS] for n in lengths]


def test_scores_equal_transformers_own_pooling(reward_model, sequences):
    # one row at a time there is no padding, and transformers reads the last token
    expected = [reward_model(torch.tensor([ids])).logits.item() for ids in sequences]
    assert score_sequences(reward_model, sequences, 64, "fp32") == pytest.approx(expected, abs=1e-6)


def test_scores_equal_transformers_pooling_of_a_padded_batch(reward_model, sequences, tokenizer):
    padded = torch.full((len(sequences), 40), tokenizer.pad_token_id)
    for row, ids in zip(padded, sequences, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    expected = reward_model(padded, attention_mask=(padded != tokenizer.pad_token_id)).logits[:, 0].tolist()
    assert score_sequences(reward_model, sequences, 64, "fp32") == pytest.approx(expected, abs=1e-6)


def test_scores_do_not_depend_on_batch_mates(reward_model, sequences):
    alone = score_sequences(reward_model, sequences, 1, "fp32")
    together = score_sequences(reward_model, sequences, 10_000, "fp32")
    assert alone == pytest.approx(together, abs=1e-6)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_precision_reaches_the_backbone_and_never_the_head(reward_model, sequences, precision, dtype):
    seen = {}
    layer = backbone_of(reward_model).layers[0].mlp.down_proj
    layer.register_forward_hook(lambda *args: seen.update(backbone=args[-1].dtype))
    reward_model.score.register_forward_hook(lambda *args: seen.update(head=args[-1].dtype))
    score_sequences(reward_model, sequences, 64, precision)
    assert seen == {"backbone": dtype, "head": torch.float32}


def test_pooled_features_leave_the_attention_as_it_was(reward_model, sequences):
    before = reward_model.config._attn_implementation
    pooled_features(reward_model, sequences, 64, "fp32")
    assert reward_model.config._attn_implementation == before
    assert not any(isinstance(module, nn.Dropout) and module.p for module in reward_model.modules())


def test_a_saved_head_comes_back(reward_model, sequences, tmp_path):
    reward_model.save_pretrained(tmp_path / "reward")
    loaded = load_reward_model(tmp_path / "reward")
    assert torch.equal(loaded.score.weight, reward_model.score.weight)


def test_a_checkpoint_without_its_head_is_refused(reward_model, tmp_path):
    # transformers alone draws a random head and only warns
    reward_model.save_pretrained(tmp_path / "reward")
    weights = load_file(tmp_path / "reward/model.safetensors")
    del weights["score.weight"]
    save_file(weights, tmp_path / "reward/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="score.weight is missing.*train_reward"):
        load_reward_model(tmp_path / "reward")


def test_the_base_is_no_reward_model(tiny_base):
    with pytest.raises(UserError, match="score.weight"):
        load_reward_model(tiny_base / "models/base")


@pytest.mark.parametrize(
    ("said", "read"),
    [
        ("I do. Why", "I do."),
        ("I do! And you? I", "I do! And you?"),
        ("It is 3.14 or", "It is 3.14 or"),  # no whole sentence
        ("I do.", "I do."),
        ("Why not? I do! ", "Why not? I do!"),
    ],
)
def test_a_cut_answer_is_read_up_to_its_last_whole_sentence(tokenizer, said, read):
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    found = closed(ids, tokenizer)
    assert found[-1] == tokenizer.eos_token_id and found[:-1] == ids[: len(found) - 1]
    assert tokenizer.decode(found[:-1]).strip() == read


def test_an_answer_that_ended_is_read_as_it_is(tokenizer):
    ids = [*tokenizer("I do. Why", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert closed(ids, tokenizer) == ids
