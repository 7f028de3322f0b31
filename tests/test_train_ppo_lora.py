"""train_ppo with adapters: one set of weights is policy, reference and reward model, and resumes to the same bytes."""

import copy
import gc
import os
import signal

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from pydantic import ValidationError
from safetensors.torch import load_file

from stages import train_ppo
from stages.lib.model import loading
from stages.lib.model.adapters import Lora, add_adapters, save_adapted
from stages.lib.model.frozen_side import FrozenSide
from stages.lib.model.logps import read_answers
from stages.lib.model.memory import MemoryDial
from stages.lib.model.reward import load_reward_model, score_sequences
from stages.lib.rl import learner, rollout
from stages.lib.rl.rollout import Actor
from stages.lib.run.artefacts import read_json
from stages.lib.run.checkpoints import Stopped
from tests.support import fp16_on_cpu
from tests.support.two_processes import run_in_two
from tests.test_train_ppo import (
    BASE,
    PARAMS,
    RLOO,
    history_of,
    looks_of,
    looks_score,
    make_policy,
    metrics_of,
    run,
    save_model,
    write_project,
)

ADAPTERS = {"lora": Lora(rank=4, alpha=8.0, dropout=0.0, targets="all-linear"), "learning_rate": 1e-2}
LORA = PARAMS.replace(**ADAPTERS)


@pytest.fixture
def root(tmp_path, tokenizer):
    return write_project(tmp_path, tokenizer)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")


@torch.no_grad()
def adapt_reward_model(root, tokenizer):
    """models/reward as `backbone: lora` leaves it: its adapters say much, merged in and beside it."""
    model, folder = load_reward_model(root / "models/reward"), root / "models/reward"
    adapted = add_adapters(model, ADAPTERS["lora"], "fp32", task="SEQ_CLS")
    generator = torch.Generator().manual_seed(3)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    plain = load_reward_model(folder)
    save_adapted(adapted, model.state_dict(), root / "models/base", tokenizer, folder, lambda _: plain)


@pytest.fixture
def adapted_root(root, tokenizer):
    adapt_reward_model(root, tokenizer)
    return root


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def bytes_of(root) -> dict[str, bytes]:
    names = [*root.glob("models/ppo/**/*.safetensors"), *root.glob("reports/train_ppo/*.csv")]
    return {str(path.relative_to(root)): path.read_bytes() for path in names}


@pytest.mark.parametrize("policy", ["base", "dpo"])
def test_it_learns_and_leaves_start_plus_adapter_in_both_forms(root, tokenizer, monkeypatch, policy):
    dpo = make_policy()
    with torch.no_grad():
        dpo.model.layers[0].mlp.up_proj.weight.mul_(1.1)
    save_model(dpo, tokenizer, root / "models/dpo")
    before = (root / f"models/{policy}/model.safetensors").read_bytes()
    looks_score(monkeypatch, (0.0, 9.0, 30.0))
    rows = run(root, LORA.replace(policy=policy))
    assert rows[0]["val/first_ratio_error"] <= 1e-5 and abs(rows[0]["objective/kl"]) <= 1e-4
    assert abs(rows[2]["objective/kl"]) > 1e-3 and metrics_of(root)["kept_update"] == 3
    assert (root / f"models/{policy}/model.safetensors").read_bytes() == before
    full, start = weights_of(root / "models/ppo"), weights_of(root / f"models/{policy}")
    changed = {name for name in start if not torch.equal(full[name], start[name])}
    assert changed == {name for name in start if "_proj" in name} and full.keys() == start.keys()
    assert {weight.dtype for weight in full.values()} == {torch.float32}
    monkeypatch.chdir(root)  # the adapter names its start by a path
    settings = read_json(root / "models/ppo/adapter/adapter_config.json")
    assert settings["base_model_name_or_path"] == f"models/{policy}" and settings["r"] == 4
    by_peft = AutoPeftModelForCausalLM.from_pretrained("models/ppo/adapter", dtype=torch.float32)
    for name, weight in by_peft.merge_and_unload().state_dict().items():
        assert torch.equal(weight, full[name]), name


def test_the_start_is_kept_as_it_is_where_nothing_was_better(root, monkeypatch):
    looks_score(monkeypatch, (0.0, -9.0, -9.0))
    run(root, LORA)
    full, base = weights_of(root / "models/ppo"), weights_of(root / "models/base")
    assert metrics_of(root)["kept_update"] == 0 and all(torch.equal(full[name], base[name]) for name in base)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_frozen_side_says_all_along_what_base_and_reward_model_say_bit_for_bit(root, monkeypatch, precision):
    base = loading.load_causal_lm(root / "models/base")
    own = load_reward_model(root / "models/reward")
    tokenizer = loading.load_tokenizer(root / "models/reward")
    alone = FrozenSide(base, own, LORA.temperature, tokenizer, precision, lambda _: MemoryDial(4096))
    opinions, differ = FrozenSide.opinions, []

    def compared(self, prompts, responses, **how):
        found, expected = opinions(self, prompts, responses, **how), opinions(alone, prompts, responses, **how)
        for name in ("logps", "features", "scores"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        policy = read_answers(self.logps, prompts, responses, 4096, precision)[0]  # with adapters on
        differ.append(not torch.allclose(policy, expected.logps, atol=1e-3))
        return found

    monkeypatch.setattr(FrozenSide, "opinions", compared)
    run(root, LORA.replace(micro_batch_tokens=4096), BASE.replace(precision=precision))
    assert len(differ) == 6 and not any(differ[:2]) and all(differ[-2:])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_reward_models_adapters_say_what_it_says_merged_and_the_reference_is_the_base_bit_for_bit(
    adapted_root, monkeypatch, precision
):
    root, tokenizer = adapted_root, loading.load_tokenizer(adapted_root / "models/reward")
    base, merged = loading.load_causal_lm(root / "models/base"), load_reward_model(root / "models/reward")
    alone = FrozenSide(base, merged, LORA.temperature, tokenizer, precision, lambda _: MemoryDial(4096))
    opinions, moved, headless = FrozenSide.opinions, [], []

    def compared(self, prompts, responses, **how):
        found, expected = opinions(self, prompts, responses, **how), opinions(alone, prompts, responses, **how)
        assert self.shares_backbone and not self.one_pass and not alone.shares_backbone
        for name in ("logps", "entropies", "features"):
            assert torch.equal(getattr(found, name), getattr(expected, name)), name
        tolerance = 1e-5 if precision == "fp32" else 0.1  # in bf16 the merged weights are rounded as a whole
        torch.testing.assert_close(found.scores, expected.scores, rtol=0, atol=tolerance)
        policy = read_answers(self.logps, prompts, responses, 4096, precision)[0]  # with the policy's adapters on
        moved.append(not torch.allclose(policy, expected.logps, atol=1e-3))
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        plain, full = (
            torch.tensor(score_sequences(model, texts, 4096, precision)) for model in (self.reward_model, merged)
        )
        headless.append((plain - full).abs().max() > 0.1)  # without its own adapters it would say something else
        return found

    monkeypatch.setattr(FrozenSide, "opinions", compared)
    run(root, LORA.replace(micro_batch_tokens=4096), BASE.replace(precision=precision))
    assert len(moved) == 6 and not any(moved[:2]) and all(moved[-2:]) and all(headless)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_one_backbone_is_held_where_policy_and_reward_model_have_adapters(adapted_root, monkeypatch, precision):
    def held() -> set[int]:
        """Where the weights of the backbone's layers lie, whoever holds them: two of this shape in each of two."""
        gc.collect()
        found = (each for each in gc.get_objects() if isinstance(each, torch.nn.Parameter))
        return {each.data_ptr() for each in found if each.shape == (64, 32)}

    before, roll_out, seen = held(), Actor.roll_out, []

    def watched(self, *args):
        seen.append(len(held() - before))
        return roll_out(self, *args)

    monkeypatch.setattr(Actor, "roll_out", watched)
    facts = train_ppo.main(BASE.replace(precision=precision), LORA, adapted_root)
    assert seen == [4] * 6 and facts["shared_backbone"]
    monkeypatch.chdir(adapted_root)
    by_peft = AutoPeftModelForCausalLM.from_pretrained("models/ppo/adapter", dtype=torch.float32)
    full = weights_of(adapted_root / "models/ppo")
    assert list(by_peft.peft_config) == ["default"]  # not the reward model's
    assert all(torch.equal(weight, full[name]) for name, weight in by_peft.merge_and_unload().state_dict().items())


def test_a_reward_model_on_another_start_stays_a_model_of_its_own(adapted_root, tokenizer):
    dpo = make_policy()
    with torch.no_grad():
        dpo.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    save_model(dpo, tokenizer, adapted_root / "models/dpo")
    assert not train_ppo.main(BASE, LORA.replace(policy="dpo"), adapted_root)["shared_backbone"]


def test_the_policy_may_have_adapters_beside_fewer_layers_than_the_reward_model(adapted_root):
    few = LORA.lora.replace(targets=["q_proj"])
    assert train_ppo.main(BASE.replace(precision="bf16"), LORA.replace(lora=few), adapted_root)["shared_backbone"]
    full, base = weights_of(adapted_root / "models/ppo"), weights_of(adapted_root / "models/base")
    assert all(torch.equal(full[name], base[name]) for name in base if "q_proj" not in name)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_there_is_one_set_of_weights_which_the_sampler_shares(root, monkeypatch, precision):
    if precision == "fp16":
        monkeypatch.setattr(loading, "make_accelerator", fp16_on_cpu.make_accelerator)
    load, loaded, seen = loading.load_causal_lm, [], {}
    monkeypatch.setattr(loading, "load_causal_lm", lambda *args: loaded.append(load(*args)) or loaded[-1])
    roll_out = Actor.roll_out

    def watched(self, *args):
        for name, model in (("policy", self.policy.model), ("sampler", self.sampler)):
            seen[name] = {key: (w.dtype, w.data_ptr()) for key, w in model.named_parameters() if "_proj" in key}
        return roll_out(self, *args)

    monkeypatch.setattr(Actor, "roll_out", watched)
    rows = run(root, LORA, BASE.replace(precision=precision))
    assert len(loaded) == 1  # the policy; no reference, no value model
    assert [row["policy/steps"] for row in rows] == [4, 4, 4] and abs(rows[2]["objective/kl"]) > 1e-3
    half = loading.DTYPES[precision]
    for key, (dtype, place) in seen["policy"].items():
        assert dtype == (torch.float32 if "lora_" in key else half), key
        assert seen["sampler"][key][0] == half and (seen["sampler"][key][1] == place) == ("lora_" not in key), key


@pytest.mark.parametrize("kind", ["gae", "rloo", "adapted reward"])
def test_a_stopped_run_goes_on_to_the_same_bytes_from_adapters_alone(root, tokenizer, monkeypatch, kind):
    if kind == "adapted reward":
        adapt_reward_model(root, tokenizer)
        kind = "gae"
    params = {"gae": LORA, "rloo": RLOO.replace(**ADAPTERS)}[kind].replace(look_every=1)
    run(root, params)
    expected = copy.deepcopy(bytes_of(root))
    assert len(expected) == 4
    update, calls = train_ppo.update_policy, []

    def stopping(*args):
        calls.append(len(calls))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args)

    monkeypatch.setattr(train_ppo, "update_policy", stopping)
    with pytest.raises(Stopped):
        run(root, params)
    (path,) = root.glob("checkpoints/train_ppo/*/checkpoint.pt")
    saved = torch.load(path, weights_only=True)
    for kept in (saved["tracked"]["policy"]["model"], saved["values"]["state"]["best"]["weights"]):
        assert kept and all("lora_" in name and ".default." in name for name in kept)
    run(root, params)
    assert len(calls) == 3 and bytes_of(root) == expected


@pytest.mark.parametrize(("params", "passes"), [(LORA.replace(micro_batch_tokens=1), 1), (PARAMS, 0)])
def test_with_adapters_every_pass_gives_back_what_it_freed_or_fragments_add_up(root, monkeypatch, params, passes):
    """Where all weights are trained it would cost a tenth of the time and save less."""
    returned: list[str] = []
    monkeypatch.setattr(learner, "return_freed_memory", lambda _: returned.append("pass"))
    monkeypatch.setattr(rollout, "return_freed_memory", lambda _: returned.append("rollout"))
    run(root, params)
    assert returned.count("pass") == passes * params.episodes * params.num_ppo_epochs  # a pass for each answer
    assert ("rollout" in returned) == bool(passes)


def test_a_full_run_leaves_no_adapter_of_an_earlier_one(root):
    run(root, LORA)
    assert len(looks_of(root)) == 3 and (root / "models/ppo/adapter").exists()
    run(root, PARAMS.replace(episodes=8))
    assert not (root / "models/ppo/adapter").exists()


def test_a_value_model_beside_adapters_is_refused_by_both_names():
    with pytest.raises(ValidationError, match="critic: separate.*lora.rank"):
        LORA.replace(critic="separate")
    RLOO.replace(critic="separate", **ADAPTERS)  # has no critic


SCRIPT = """
import sys
from pathlib import Path
from stages import train_ppo
from tests.test_train_ppo_lora import BASE, LORA
train_ppo.main(BASE, LORA, Path(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
def test_two_processes_train_as_one(root, tokenizer, adapted):
    if adapted:
        adapt_reward_model(root, tokenizer)
    single, weights = run(root, LORA), weights_of(root / "models/ppo")
    run_in_two(SCRIPT, root)
    for one, two in zip(single, history_of(root), strict=True):
        assert one == pytest.approx(two, abs=1e-4, rel=1e-3)
    for name, weight in weights_of(root / "models/ppo").items():
        torch.testing.assert_close(weight, weights[name], rtol=0, atol=1e-4)
