"""The stage end to end on the tiny model, against an ordinary RewardTrainer run, and by hand."""

import json
import math
import os
import signal

import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForSequenceClassification
from pydantic import ValidationError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer

from stages import train_reward
from stages.lib.model.adapters import Lora
from stages.lib.model.loading import freeze, set_seed
from stages.lib.model.reward import load_reward_model, new_reward_model, score_sequences
from stages.lib.model.reward_trainer import EndWhenAsked, HeadOnFeatures, KeepAtRows, OneDevice
from stages.lib.run.artefacts import read_parquet, write_parquet
from stages.lib.run.checkpoints import Stopped
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, load_params
from stages.train_reward import Params, heldout_figures, main
from tests.conftest import REPO
from tests.support import short_of_memory
from tests.support.corrupted_tables import write_reward_negatives

BASE = Base(seed=42, precision="fp32")
PARAMS = Params(
    backbone="frozen",
    learning_rate=1e-2,
    backbone_learning_rate=1e-3,
    center_rewards_coefficient=None,
    epochs=3,
    batch_size=4,
    logging_steps=5,
    hard_negatives=False,
    micro_batch_tokens=512,
)
LORA = PARAMS.replace(
    backbone="lora",
    lora=Lora(rank=4, alpha=8.0, dropout=0.1, targets="all-linear"),
    epochs=1,
    micro_batch_tokens=1000,
)


def conversation(tokenizer, row, side, max_length=200):
    messages = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
    ids = tokenizer.apply_chat_template(messages, return_dict=False)
    end = len(ids) - ids[::-1].index(tokenizer.eos_token_id)
    return ids[: min(end, max_length) - 1] + [tokenizer.eos_token_id]


@pytest.fixture
def root(tiny_base, tokenizer, embedded_pairs):
    """A project root with the base and 22 tokenized pairs for training, 9 held out."""
    for split, first, last in (("train", 0, 22), ("heldout", 22, 31)):
        columns = {"row": list(range(first + 1, last + 1)), "prompt_id": list(range(first, last))}
        for side in ("chosen", "rejected"):
            columns[f"{side}_ids"] = [conversation(tokenizer, row, side) for row in embedded_pairs[first:last]]
        write_parquet(tiny_base / f"data/tokenized/reward_{split}.parquet", columns)
    write_reward_negatives(tiny_base)
    return tiny_base


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")


def test_writes_a_reward_model_anyone_can_load(root, tokenizer):
    facts = main(BASE, PARAMS, root)

    model = AutoModelForSequenceClassification.from_pretrained(root / "models/reward")
    assert model.config.num_labels == 1
    assert model.config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert AutoTokenizer.from_pretrained(root / "models/reward").pad_token_id == tokenizer.pad_token_id
    names = {path.name for path in (root / "models/reward").iterdir()}
    assert "model.safetensors" in names and not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)

    # the backbone is the base's, bit for bit: PPO relies on it to share one forward pass
    base = AutoModelForCausalLM.from_pretrained(root / "models/base").model.state_dict()
    assert all(torch.equal(weight, base[name]) for name, weight in model.model.state_dict().items())

    heldout = read_parquet(root / "data/tokenized/reward_heldout.parquet")
    scores = pd.read_csv(root / "reports/train_reward/heldout_scores.csv")
    assert scores["row"].tolist() == heldout["row"] and scores["prompt_id"].tolist() == heldout["prompt_id"]
    for side in ("chosen", "rejected"):
        expected = score_sequences(model.eval(), heldout[f"{side}_ids"], 512, "fp32")
        assert scores[f"{side}_score"].tolist() == pytest.approx(expected, abs=1e-5)

    metrics = json.loads((root / "reports/train_reward/metrics.json").read_text())
    assert metrics["steps"] == 3 * math.ceil(22 / 4)
    assert metrics["heldout"]["accuracy"] == pytest.approx(
        (scores.chosen_score > scores.rejected_score).mean(), 1e-5
    )
    assert metrics["heldout"]["margin"] == pytest.approx(
        (scores.chosen_score - scores.rejected_score).mean(), 1e-4
    )
    assert facts["precision"] == "fp32" and facts["tokens"] > 0


def test_hard_negatives_are_learnt_from_and_accuracy_is_told_by_kind(root, capsys):
    by_kind = {}
    for hard in (False, True):
        main(BASE, PARAMS.replace(hard_negatives=hard, epochs=20), root)
        metrics = json.loads((root / "reports/train_reward/metrics.json").read_text())
        by_kind[hard] = metrics["by_kind"]
        told = capsys.readouterr().out
        for kind, accuracy in metrics["by_kind"].items():
            assert (f"pairs made by '{kind}' in" in told) == (accuracy < 0.5)
        pairs = 22 * 2 + 44 if hard else 22  # every pair twice, and two copies of it
        assert metrics["steps"] == 20 * math.ceil(pairs / 4) and metrics["hard_negatives"] == 44 * hard
    assert set(by_kind[True]) == {"loop", "shuffle"}
    assert sum(by_kind[True].values()) > sum(by_kind[False].values())


def test_history_has_training_and_heldout_figures_of_every_logged_step(root):
    main(BASE, PARAMS, root)
    history = pd.read_csv(root / "reports/train_reward/history.csv")
    assert history["step"].tolist() == [5, 10, 15]
    assert history["eval_loss"].iloc[-1] < history["eval_loss"].iloc[0]
    assert {"loss", "accuracy", "margin", "eval_accuracy", "eval_margin", "grad_norm"} <= set(history.columns)
    assert history.notna().all(axis=None)


def test_a_run_shorter_than_the_logging_interval_has_a_history(root):
    main(BASE, PARAMS.replace(epochs=1, batch_size=16, logging_steps=25), root)
    assert pd.read_csv(root / "reports/train_reward/history.csv")["step"].tolist() == [2]


def test_out_of_memory_halves_the_dial_and_changes_no_result(root, monkeypatch, capsys):
    scores = []
    for _ in range(2):
        main(BASE, PARAMS.replace(epochs=1, micro_batch_tokens=2000), root)
        scores.append(pd.read_csv(root / "reports/train_reward/heldout_scores.csv"))
        short_of_memory.install(monkeypatch)
    pd.testing.assert_frame_equal(scores[1], scores[0], atol=1e-3)
    assert "train_reward: memory ran out: goes on with micro-batches of" in capsys.readouterr().out


def test_same_seed_same_bytes_other_seed_other_head(root):
    weights, histories = [], []
    for seed in (1, 1, 2):
        main(Base(seed=seed, precision="fp32"), PARAMS, root)
        model = AutoModelForSequenceClassification.from_pretrained(root / "models/reward")
        weights.append(model.score.weight)
        histories.append((root / "reports/train_reward/history.csv").read_bytes())
    assert torch.equal(weights[0], weights[1]) and histories[0] == histories[1]
    assert not torch.allclose(weights[0], weights[2])


def test_equals_an_ordinary_reward_trainer_run_over_tokens(root, tokenizer, tmp_path):
    main(BASE, PARAMS, root)
    ours = AutoModelForSequenceClassification.from_pretrained(root / "models/reward").score.weight

    set_seed(BASE.seed)
    model = freeze(new_reward_model(root / "models/base", tokenizer.pad_token_id))
    model.score.requires_grad_(True)
    columns = read_parquet(root / "data/tokenized/reward_train.parquet")
    RewardTrainer(
        model=model,
        args=RewardConfig(
            output_dir=str(tmp_path / "plain"),
            learning_rate=PARAMS.learning_rate,
            num_train_epochs=PARAMS.epochs,
            per_device_train_batch_size=PARAMS.batch_size,
            seed=BASE.seed,
            bf16=False,
            max_length=None,
            activation_checkpointing=False,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({side: columns[side] for side in ("chosen_ids", "rejected_ids")}),
        processing_class=tokenizer,
    ).train()
    # fp32 rounding of two batch layouts, after 18 AdamW steps of 1e-2
    torch.testing.assert_close(ours, model.score.weight, atol=2e-4, rtol=1e-3)


# a backbone that is trained


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_a_trained_backbone_learns_and_every_later_stage_reads_it_as_any_other(root, tokenizer, backbone):
    main(BASE, LORA.replace(backbone=backbone, epochs=2, center_rewards_coefficient=0.01), root)
    metrics = json.loads((root / "reports/train_reward/metrics.json").read_text())
    history = pd.read_csv(root / "reports/train_reward/history.csv")
    assert metrics["steps"] == 2 * math.ceil(22 / 4) and history["step"].tolist() == [5, 10]
    assert history["loss"].iloc[-1] < history["loss"].iloc[0]
    assert history["learning_rate"].iloc[0] == pytest.approx(1e-2 * (12 - 4) / 12)  # of the head, before step 5

    found, base = weights_of(root / "models/reward"), weights_of(root / "models/base")
    assert found.keys() - base.keys() == {"score.weight"} and {w.dtype for w in found.values()} == {torch.float32}
    changed = {name for name in base.keys() & found.keys() if not torch.equal(found[name], base[name])}
    assert changed == ({name for name in base if "_proj" in name} if backbone == "lora" else set(base))
    assert (root / "models/reward/adapter").exists() == (backbone == "lora")

    model = load_reward_model(root / "models/reward")
    heldout = read_parquet(root / "data/tokenized/reward_heldout.parquet")
    scores = pd.read_csv(root / "reports/train_reward/heldout_scores.csv")
    for side in ("chosen", "rejected"):
        expected = score_sequences(model, heldout[f"{side}_ids"], 512, "fp32")
        assert scores[f"{side}_score"].tolist() == pytest.approx(expected, abs=1e-5)


def test_the_adapter_is_what_was_merged(root, monkeypatch):
    main(BASE, LORA, root)
    monkeypatch.chdir(root)  # the adapter names models/base
    by_peft = AutoPeftModelForSequenceClassification.from_pretrained(
        "models/reward/adapter", num_labels=1, dtype=torch.float32
    ).merge_and_unload()
    found = weights_of(root / "models/reward")
    assert all(torch.equal(weight, found[name]) for name, weight in by_peft.state_dict().items() if name in found)


def test_full_training_in_parts_is_that_in_whole_batches(root, tokenizer, tmp_path):
    """And is an ordinary run of TRL's trainer with one learning rate."""
    params = LORA.replace(backbone="full", learning_rate=1e-3, micro_batch_tokens=100_000)
    main(BASE, params, root)
    whole = weights_of(root / "models/reward")
    main(
        BASE, params.replace(micro_batch_tokens=500), root
    )  # of 22 pairs the last 2 are a part of their own anyhow
    for name, weight in weights_of(root / "models/reward").items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=2e-4)

    set_seed(42)
    model = new_reward_model(root / "models/base", tokenizer.pad_token_id)
    rows = {split: read_parquet(root / f"data/tokenized/reward_{split}.parquet") for split in ("train", "heldout")}
    names = ("chosen_ids", "rejected_ids")
    tables = {split: Dataset.from_dict({name: columns[name] for name in names}) for split, columns in rows.items()}
    arguments = RewardConfig(
        output_dir=str(tmp_path / "trl"), learning_rate=1e-3, num_train_epochs=1, per_device_train_batch_size=4,
        seed=42, max_length=None, bf16=False, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = RewardTrainer(model=model, args=arguments, train_dataset=tables["train"], processing_class=tokenizer)
    trainer.train()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weight, whole[name], rtol=0, atol=1e-5)


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_out_of_memory_in_a_backbone_run_begins_again_in_smaller_parts(root, monkeypatch, capsys, backbone):
    """With the weights and random numbers of the start, whatever the steps before have made of them."""
    params = LORA.replace(backbone=backbone, learning_rate=1e-2)
    columns = read_parquet(root / "data/tokenized/reward_train.parquet")
    longest = max(len(ids) for side in ("chosen_ids", "rejected_ids") for ids in columns[side])
    main(BASE, params.replace(micro_batch_tokens=2 * 2 * longest), root)
    expected = {file: file.read_bytes() for file in sorted(root.glob("models/reward/**/*.safetensors"))}
    compute_loss, calls = RewardTrainer.compute_loss, []

    def short(self, model, inputs, *args, **how):
        calls.append(len(inputs["input_ids"]))
        loss = compute_loss(self, model, inputs, *args, **how)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return loss

    monkeypatch.setattr(RewardTrainer, "compute_loss", short)
    main(BASE, params.replace(micro_batch_tokens=2 * 4 * longest), root)
    assert "train_reward: memory ran out: goes on with micro-batches of" in capsys.readouterr().out
    assert calls[:4] == [8, 8, 8, 4]  # both sides of a pair
    assert {file: file.read_bytes() for file in sorted(root.glob("models/reward/**/*.safetensors"))} == expected


@pytest.mark.parametrize("precision", ["bf16"])
def test_half_precision_multiplies_in_it_and_scores_in_fp32(root, monkeypatch, precision):
    seen = set()
    forward = torch.nn.functional.linear

    def watched(input, weight, bias=None):
        out = forward(input, weight, bias)
        seen.add((weight.shape[0] == 1, out.dtype))
        return out

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    main(Base(seed=42, precision=precision), LORA.replace(epochs=1), root)
    assert (True, torch.float32) in seen and (True, torch.bfloat16) not in seen
    assert (False, torch.bfloat16) in seen
    found, base = weights_of(root / "models/reward"), weights_of(root / "models/base")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.linalg.matrix_rank(found[name] - base[name], atol=1e-6) <= 4  # the base was rounded nowhere


@pytest.mark.parametrize("backbone", ["lora", "full"])
def test_a_stopped_backbone_run_goes_on_to_the_same_bytes(root, monkeypatch, backbone):
    """With dropout in the adapters, whose random numbers a checkpoint keeps too."""
    monkeypatch.setenv("CHECKPOINT_MINUTES", "0")
    params = LORA.replace(backbone=backbone, epochs=2, logging_steps=2)
    main(BASE, params, root)
    expected = {file: file.read_bytes() for file in sorted(root.glob("models/reward/**/*.safetensors"))}
    history = (root / "reports/train_reward/history.csv").read_bytes()
    steps, on_step_end = [], KeepAtRows.on_step_end

    def stopping(self, *args, **how):
        steps.append(1)
        if len(steps) == 9:  # one after the checkpoint of step 8
            os.kill(os.getpid(), signal.SIGTERM)
        return on_step_end(self, *args, **how)

    with monkeypatch.context() as patched:
        patched.setattr(KeepAtRows, "on_step_end", stopping)
        with pytest.raises(Stopped, match="stopped by SIGTERM; `dvc repro` goes on from"):
            main(BASE, params, root)
    (kept,) = root.glob("checkpoints/train_reward/*/trainer/checkpoint-*")
    assert kept.name == "checkpoint-8"
    main(BASE, params, root)
    assert {file: file.read_bytes() for file in sorted(root.glob("models/reward/**/*.safetensors"))} == expected
    assert (root / "reports/train_reward/history.csv").read_bytes() == history
    assert not list(root.glob("checkpoints/train_reward/*/trainer"))


def test_fp16_where_accelerate_has_none_is_refused(root):
    with pytest.raises(UserError, match="accelerate has no autocast to fp16 on cpu"):
        main(Base(seed=42, precision="fp16"), LORA, root)


def test_adapters_need_a_rank():
    with pytest.raises(ValidationError, match="backbone is lora, and lora.rank is null"):
        PARAMS.replace(backbone="lora")


def test_one_device_whatever_is_visible(root, tokenizer, tmp_path, monkeypatch):
    main(BASE, PARAMS, root)
    expected = (root / "reports/train_reward/history.csv").read_bytes()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="DataParallel"):  # what OneDevice is there for
        RewardTrainer(
            model=HeadOnFeatures(torch.nn.Linear(32, 1), tokenizer),
            args=RewardConfig(output_dir=str(tmp_path), use_cpu=False, bf16=False, activation_checkpointing=False),
            train_dataset=Dataset.from_dict({"chosen_ids": [[5]], "rejected_ids": [[6]]}),
            processing_class=tokenizer,
        )
    # two GPUs do not count under use_cpu, which main sets here
    monkeypatch.setattr(train_reward, "OneDevice", lambda **knobs: OneDevice(**knobs | {"use_cpu": False}))
    main(BASE, PARAMS, root)
    assert (root / "reports/train_reward/history.csv").read_bytes() == expected


def test_long_pairs_are_kept(root):
    # RewardConfig's own max_length of 1024 would drop this pair without a word
    path = root / "data/tokenized/reward_train.parquet"
    columns = read_parquet(path)
    columns["chosen_ids"][0] = [5] * 1500 + [2]
    write_parquet(path, columns)
    main(BASE, PARAMS, root)
    metrics = json.loads((root / "reports/train_reward/metrics.json").read_text())
    assert metrics["train_pairs"] == 22


def test_heldout_figures_by_hand():
    # margins 2, 0, -1: one and a half of three right (a tie counts half), mean 1/3
    figures = heldout_figures(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 1.0]))
    assert figures["accuracy"] == pytest.approx(1 / 2)
    assert figures["margin"] == pytest.approx(1 / 3)
    assert figures["chosen_score"] == pytest.approx(4 / 3) and figures["rejected_score"] == pytest.approx(1)
    # log(1 + e^-2) = 0.126928, ln 2 = 0.693147, log(1 + e) = 1.313262
    assert figures["loss"] == pytest.approx((0.126928 + 0.693147 + 1.313262) / 3, abs=1e-6)


def test_committed_params_are_valid_and_bad_ones_are_named():
    load_params("train_reward", Params, REPO)
    with pytest.raises(ValidationError, match="learning_rate"):
        PARAMS.replace(learning_rate=0.0)


def test_stopped_while_the_head_is_fitted_it_keeps_the_features(root, monkeypatch):
    main(BASE, PARAMS, root)
    expected = (root / "models/reward/model.safetensors").read_bytes()
    read = []
    pooled, on_step_end = train_reward.pooled_features, EndWhenAsked.on_step_end

    def stopping(self, *args, **how):
        os.kill(os.getpid(), signal.SIGTERM)
        return on_step_end(self, *args, **how)

    with monkeypatch.context() as patched:
        patched.setattr(EndWhenAsked, "on_step_end", stopping)
        with pytest.raises(Stopped, match="stopped by SIGTERM; `dvc repro` goes on from"):
            main(BASE, PARAMS, root)
    monkeypatch.setattr(train_reward, "pooled_features", lambda *a, **how: read.append(1) or pooled(*a, **how))
    main(BASE, PARAMS, root)
    assert not read and (root / "models/reward/model.safetensors").read_bytes() == expected


def test_a_reward_model_of_answers_that_could_not_be_corrupted(root):
    path = root / "data/tokenized/reward_negatives_heldout.parquet"
    columns = read_parquet(path)
    types = {name: pa.list_(pa.int32()) if name.endswith("_ids") else pa.string() for name in columns}
    write_parquet(path, {name: pa.array([], types[name]) for name in columns})
    main(BASE, PARAMS, root)
    metrics = json.loads((root / "reports/train_reward/metrics.json").read_text())
    assert metrics["by_kind"] == {} and metrics["heldout_pairs"] == 9
