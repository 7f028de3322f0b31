"""train_dpo: the same trajectory as TRL's DPOTrainer, the same history twice, the same with two processes."""

import csv
import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from datasets import Dataset
from pydantic import ValidationError
from safetensors.torch import load_file
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from stages import reference_logps, train_dpo
from stages.lib.data.chat import apply_chat_template, to_implicit_prompt_preferences, tokenize_row
from stages.lib.model import loading
from stages.lib.model.memory import MemoryDial
from stages.lib.rl import learner as learning
from stages.lib.run.artefacts import read_json, read_parquet, write_parquet
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base
from tests.conftest import REPO
from tests.support import fp16_on_cpu, short_of_memory
from tests.support.corrupted_tables import write_judge_prompts, write_negatives
from tests.support.fake_gpu import OnGpu, on_gpu
from tests.support.two_processes import TORCHRUN, run_in_two

BASE = Base(seed=42, precision="fp32")
PARAMS = train_dpo.Params(
    loss="sigmoid",
    beta=0.1,
    label_smoothing=0.0,
    sft_coef=0.0,
    learning_rate=1.0e-3,
    schedule="linear",
    warmup_steps=0,
    weight_decay=0.0,
    max_grad_norm=1.0,
    epochs=1,
    max_steps=None,
    batch_size=4,
    hard_negatives=0.0,
    eval_steps=10,
    look_steps=10,
    look_prompts=2,
    response_length=4,
    temperature=0.7,
    micro_batch_tokens=500,
)


@pytest.fixture(autouse=True)
def cpu_and_fresh_accelerate(monkeypatch):
    monkeypatch.setenv("DEVICE", "cpu")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def project(tiny_base, tokenizer, embedded_pairs) -> Path:
    """A root with a tiny base, 80 training and 6 held-out pairs, and their reference log-probs in fp32."""
    return write_project(tiny_base, tokenizer, embedded_pairs[:80], embedded_pairs[80:86])


def write_project(root: Path, tokenizer, train: list[dict], heldout: list[dict]) -> Path:
    """What train_dpo reads beside the base that is there, reference log-probs in fp32."""
    for split, rows in (("train", train), ("heldout", heldout)):
        ids = [
            tokenize_row(apply_chat_template(to_implicit_prompt_preferences(row), tokenizer), tokenizer)
            for row in rows
        ]
        columns = {"row": list(range(1, len(rows) + 1)), "prompt_id": list(range(len(rows)))}
        for name in ids[0]:
            columns[name] = pa.array([row[name] for row in ids], pa.list_(pa.int32()))
        write_parquet(root / f"data/tokenized/pairs_{split}.parquet", columns)
    write_negatives(root)
    write_judge_prompts(root)
    reference_logps.main(BASE, reference_logps.Params(micro_batch_tokens=2000), root)
    return root


def history_of(root: Path) -> list[dict[str, float]]:
    with open(root / "reports/train_dpo/history.csv") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def trl_trajectory(project, tokenizer, rows) -> list[dict[str, float]]:
    """Loss, mean margin and gradient norm of each step of TRL's DPOTrainer over `rows`, in their order."""
    steps = []

    class Recorder(DPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            steps.append({"loss": loss.item(), "margin": self._metrics["train"]["rewards/margins"][-1]})
            return loss

    def conversation(row):
        return {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "chosen": [{"role": "assistant", "content": row["chosen"]}],
            "rejected": [{"role": "assistant", "content": row["rejected"]}],
        }

    trainer = Recorder(
        model=AutoModelForCausalLM.from_pretrained(project / "models/base", dtype=torch.float32),
        args=DPOConfig(
            output_dir=str(project / "trl"),
            beta=PARAMS.beta,
            learning_rate=PARAMS.learning_rate,
            lr_scheduler_type=PARAMS.schedule,
            weight_decay=PARAMS.weight_decay,
            max_grad_norm=PARAMS.max_grad_norm,
            per_device_train_batch_size=PARAMS.batch_size,
            num_train_epochs=1,
            max_length=None,
            gradient_checkpointing=False,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([conversation(row) for row in rows]),
        processing_class=tokenizer,
    )
    trainer.train()
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    return [{**step, "grad_norm": norm} for step, norm in zip(steps, norms, strict=True)]


def test_twenty_steps_equal_trls_trainer(project, tokenizer, embedded_pairs):
    train_dpo.main(BASE, PARAMS, project)
    ours = history_of(project)
    order = [i for _, index in train_dpo.batches_of(80, PARAMS, BASE.seed) for i in index]
    AcceleratorState._reset_state(reset_partial_state=True)
    theirs = trl_trajectory(project, tokenizer, [embedded_pairs[i] for i in order])
    assert len(ours) == len(theirs) == 20
    assert theirs[-1]["loss"] < 0.6  # it did learn, so the comparison is of more than ln 2
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], abs=1e-4)
        assert our["rewards/margins"] == pytest.approx(their["margin"], abs=1e-4)
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-3)


def test_step_0_gives_ln_2_in_fp32(project):
    train_dpo.main(BASE, PARAMS, project)
    first = history_of(project)[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert read_json(project / "reports/train_dpo/metrics.json")["step_0_loss"] == pytest.approx(
        math.log(2), abs=1e-5
    )


def test_step_0_in_bf16_stays_within_its_bound(project):
    # policy and reference run the same kernels, but rounding depends on the shape of the micro-batch
    base = BASE.replace(precision="bf16")
    reference_logps.main(base, reference_logps.Params(micro_batch_tokens=2000), project)
    train_dpo.main(base, PARAMS, project)
    assert history_of(project)[0]["loss"] == pytest.approx(math.log(2), abs=0.03)


def test_the_same_seed_gives_the_same_files_and_another_seed_another_history(project):
    outputs = []
    for seed in (42, 42, 7):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_dpo.main(BASE.replace(seed=seed), PARAMS, project)
        files = ["models/dpo/model.safetensors", "reports/train_dpo/history.csv", "reports/train_dpo/heldout.csv"]
        outputs.append([(project / name).read_bytes() for name in files])
    assert outputs[0] == outputs[1]
    assert outputs[0][1] != outputs[2][1]


def test_the_memory_dial_changes_no_result(project):
    histories, weights = [], []
    for micro_batch_tokens in (1, 400, 100_000):
        AcceleratorState._reset_state(reset_partial_state=True)
        params = PARAMS.replace(micro_batch_tokens=micro_batch_tokens, learning_rate=5e-5)
        train_dpo.main(BASE, params, project)
        histories.append(history_of(project))
        weights.append(load_file(project / "models/dpo/model.safetensors"))
    for history in histories[1:]:
        for row, other in zip(histories[0], history, strict=True):
            assert row["loss"] == pytest.approx(other["loss"], abs=1e-5)
            assert row["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
    for other in weights[1:]:
        for name, tensor in weights[0].items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-4)


def test_each_epoch_covers_every_pair_once_in_a_new_order():
    params = PARAMS.replace(epochs=2, batch_size=4)
    batches = list(train_dpo.batches_of(10, params, seed=1))
    assert [epoch for epoch, _ in batches] == pytest.approx([0.4, 0.8, 1.0, 1.4, 1.8, 2.0])
    first = [i for _, index in batches[:3] for i in index]
    second = [i for _, index in batches[3:] for i in index]
    assert sorted(first) == sorted(second) == list(range(10)) and first != second


def test_it_says_which_pairs_it_met(project):
    params = PARAMS.replace(max_steps=2, batch_size=2, hard_negatives=0.0)
    train_dpo.main(BASE, params, project)
    rows = read_parquet(project / "data/tokenized/pairs_train.parquet")["row"]
    expected = sorted(rows[i] for _, index in train_dpo.batches_of(len(rows), params, BASE.seed) for i in index)
    assert read_parquet(project / "data/dpo_pairs.parquet")["row"] == expected and len(expected) == 4
    metrics = read_json(project / "reports/train_dpo/metrics.json")
    assert (metrics["pairs_met"], metrics["hard_negatives_met"]) == (4, 0) and metrics["train_pairs"] == len(rows)


def test_max_steps_ends_the_epoch_and_the_schedule(project):
    train_dpo.main(BASE, PARAMS.replace(max_steps=6), project)
    history = history_of(project)
    assert [row["step"] for row in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1]["learning_rate"] == pytest.approx(1e-3 / 6)  # 0 after the last


def test_without_looks_nothing_is_sampled_and_no_judge_prompt_read(project):
    (project / "data/tokenized/prompts_judge.parquet").unlink()
    train_dpo.main(BASE, PARAMS.replace(look_steps=0), project)
    assert read_parquet(project / "data/courses/dpo.parquet")["step"] == []
    assert "rep_4" not in history_of(project)[-1]


def test_heldout_evaluations_come_every_eval_steps_and_at_the_end(project):
    train_dpo.main(BASE, PARAMS.replace(eval_steps=7), project)
    with open(project / "reports/train_dpo/heldout.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [0, 7, 14, 20]


@pytest.mark.parametrize(
    "changes",
    [{"loss": "ipo"}, {"label_smoothing": 0.2}, {"sft_coef": 0.5}, {"schedule": "cosine", "warmup_steps": 3}],
)
def test_variants_train(project, changes):
    train_dpo.main(BASE, PARAMS.replace(**changes), project)
    history = history_of(project)
    assert sum(row["loss"] for row in history[-5:]) < sum(row["loss"] for row in history[:5])
    if "warmup_steps" in changes:
        assert [row["learning_rate"] for row in history[:4]] == pytest.approx([0, 1e-3 / 3, 2e-3 / 3, 1e-3])


def test_the_sft_term_holds_the_chosen_log_prob_up(project):
    final = {}
    for sft_coef in (0.0, 1.0):
        AcceleratorState._reset_state(reset_partial_state=True)
        train_dpo.main(BASE, PARAMS.replace(sft_coef=sft_coef), project)
        final[sft_coef] = read_json(project / "reports/train_dpo/metrics.json")["heldout"]["logps/chosen"]
    assert final[1.0] > final[0.0]


def test_a_non_finite_loss_stops_with_step_and_rows_and_leaves_the_old_model(project):
    old = project / "models/dpo/model.safetensors"
    old.parent.mkdir(parents=True)
    old.write_text("the model of an earlier run")
    with pytest.raises(
        UserError, match=r"step \d+: the (loss|gradient.s norm) is (nan|inf); pairs of rows \[.*learning_rate"
    ):
        train_dpo.main(BASE, PARAMS.replace(learning_rate=1e8, max_grad_norm=None), project)
    assert old.read_text() == "the model of an earlier run"
    record = json.loads((project / "checkpoints/train_dpo/non_finite.json").read_text())
    assert record["step"] >= 2 and len(record["rows"]) == 4


def spoilt_gradient(monkeypatch, when):
    """The loss of a training batch stays finite, its gradient does not `when(number of the try)`; rows of all tries."""
    original, tries = train_dpo.run_batch, []

    def run_batch(learner, params, pairs, index, **how):
        metrics = original(learner, params, pairs, index, **how)
        if torch.is_grad_enabled():
            tries.append(index)
            if when(len(tries)):
                next(learner.module.parameters()).grad[0, 0] = math.nan
        return metrics

    monkeypatch.setattr(train_dpo, "run_batch", run_batch)
    return tries


def test_a_gradient_that_is_not_finite_stops_before_its_step_and_the_checkpoint_stays_good(project, monkeypatch):
    train_dpo.main(BASE, PARAMS, project)
    expected = (project / "models/dpo/model.safetensors").read_bytes()
    index = list(train_dpo.batches_of(80, PARAMS, BASE.seed))[3][1]
    monkeypatch.setenv("CHECKPOINT_MINUTES", "0")
    with monkeypatch.context() as spoiling:
        spoilt_gradient(spoiling, lambda number: number == 4)
        with pytest.raises(UserError, match="step 4: the gradient's norm is nan; pairs of rows") as error:
            train_dpo.main(BASE, PARAMS, project)
    assert str([i + 1 for i in index]) in str(error.value)
    record = json.loads((project / "checkpoints/train_dpo/non_finite.json").read_text())
    assert record["step"] == 4 and record["rows"] == [i + 1 for i in index]
    train_dpo.main(BASE, PARAMS, project)  # goes on from step 3, whose weights are numbers
    assert (project / "models/dpo/model.safetensors").read_bytes() == expected


FP16 = BASE.replace(precision="fp16")


@pytest.fixture
def fp16(project, monkeypatch):
    monkeypatch.setattr(train_dpo, "make_accelerator", fp16_on_cpu.make_accelerator)
    reference_logps.main(FP16, reference_logps.Params(micro_batch_tokens=2000), project)


def test_accelerate_gets_the_loss_scale_that_fits_summed_log_probs():
    assert loading.make_accelerator(torch.device("cpu"), "bf16").scaler_handler.init_scale == 2**10


def test_fp16_trains_from_its_first_step(project, fp16):
    train_dpo.main(FP16, PARAMS, project)
    history = history_of(project)
    assert [row["skipped"] for row in history] == [0] * 20
    assert history[-1]["loss"] < history[0]["loss"] and all(row["grad_norm"] > 0 for row in history)


def test_a_batch_that_overflows_is_taken_again_and_the_run_is_as_if_it_had_not(project, fp16, monkeypatch):
    train_dpo.main(FP16, PARAMS, project)
    expected = history_of(project)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setattr(loading, "INITIAL_LOSS_SCALE", 2.0**24)
    train_dpo.main(FP16, PARAMS, project)
    history = history_of(project)
    skipped = sum(int(row["skipped"]) for row in history)
    assert skipped >= 4 and read_json(project / "reports/train_dpo/metrics.json")["skipped"] == skipped
    # what fits at 2^10 fits at its multiples below the overflow: the same steps but for fp16's smallest numbers
    assert [row["learning_rate"] for row in history] == pytest.approx([1e-3 * (20 - i) / 20 for i in range(20)])
    for one, other in zip(expected, history, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=5e-3)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2)


def test_a_gradient_that_overflows_at_any_scale_is_an_error(project, fp16, monkeypatch):
    tries = spoilt_gradient(monkeypatch, lambda number: number >= 3)
    with pytest.raises(UserError, match="step 3: the gradient's norm is .*; pairs of rows .*base.precision=fp32"):
        train_dpo.main(FP16, PARAMS, project)
    assert len(tries) == 2 + 11  # at the scales 2^10 to 2^0
    assert not (project / "models/dpo").exists()


def test_all_processes_plan_with_the_fewest_tokens_that_one_has_room_for(project, monkeypatch):
    """FSDP gathers weights in every pass: with other numbers of passes they would wait for each other for ever."""
    monkeypatch.setattr(learning, "gather_object", lambda own: [512, *own, 384])
    accelerator = loading.make_accelerator(torch.device("cpu"), "fp32")
    policy = train_dpo.CompletionLogps(loading.load_causal_lm(project / "models/base"))
    learner = learning.Learner(policy, accelerator, MemoryDial(1024), 1e-3, ("constant", 0, 1), 1.0)
    assert learner.dial.tokens == 384


def test_a_batch_is_read_from_the_device_once_and_in_no_precision_it_lacks(project, monkeypatch):
    """MPS has no float64; and each copy to the host waits for the device."""
    pairs = train_dpo.Pairs(project, "heldout", True)
    original, calls = train_dpo.losses_and_metrics, []

    def on_device(*args):
        losses, metrics = original(*args)
        calls.append(len(args[2]))
        return losses, {name: on_gpu(values) for name, values in metrics.items()}

    accelerator = loading.make_accelerator(torch.device("cpu"), "fp32")
    model = loading.load_causal_lm(project / "models/base")
    dial = MemoryDial(PARAMS.micro_batch_tokens)
    learner = learning.Learner(train_dpo.CompletionLogps(model), accelerator, dial, 1e-3, ("constant", 0, 1), 1.0)
    index = list(range(len(pairs)))
    with train_dpo.use_packed_attention(model), torch.no_grad():
        expected = dial.run(train_dpo.run_batch, learner, PARAMS, pairs, index)
        monkeypatch.setattr(train_dpo, "losses_and_metrics", on_device)
        monkeypatch.setattr(OnGpu, "refuses_float64", True)
        OnGpu.waits.clear()
        assert dial.run(train_dpo.run_batch, learner, PARAMS, pairs, index) == expected
    assert len(calls) > 1 and dict(OnGpu.waits) == {"cpu": 1}


def test_out_of_memory_in_a_step_halves_the_dial_and_changes_no_result(project, monkeypatch, capsys):
    train_dpo.main(BASE, PARAMS.replace(learning_rate=5e-5), project)
    expected = history_of(project)
    AcceleratorState._reset_state(reset_partial_state=True)
    short_of_memory.install(monkeypatch, module=learning)
    train_dpo.main(BASE, PARAMS.replace(micro_batch_tokens=4000, learning_rate=5e-5), project)
    assert "train_dpo: memory ran out: goes on with micro-batches of" in capsys.readouterr().out
    for one, other in zip(expected, history_of(project), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)  # nothing was added twice


def test_reference_log_probs_of_another_precision_are_used_and_warned_about(project, capsys):
    train_dpo.main(BASE, PARAMS, project)
    assert "warning" not in capsys.readouterr().out
    bf16 = BASE.replace(precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    train_dpo.main(bf16, PARAMS, project)
    assert "train_dpo: warning: data/reference_logps is of fp32, this run of bf16" in capsys.readouterr().out


def test_reference_log_probs_of_another_model_are_refused(project, tiny_model, tokenizer):
    with torch.no_grad():
        tiny_model.model.embed_tokens.weight[5, 0] += 1
    tiny_model.save_pretrained(project / "models/base")
    with pytest.raises(UserError, match="another models/base/model.safetensors; run: dvc repro reference_logps"):
        train_dpo.main(BASE, PARAMS, project)


def test_reference_log_probs_of_other_tokens_are_refused(project):
    columns = {"row": [1], "prompt_id": [0]}
    for name in ("prompt", "chosen", "rejected"):
        columns[f"{name}_input_ids"] = pa.array([[5, 6]], pa.list_(pa.int32()))
    write_parquet(project / "data/tokenized/pairs_train.parquet", columns)
    with pytest.raises(UserError, match="another data/tokenized/pairs_train.parquet"):
        train_dpo.main(BASE, PARAMS, project)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"beta": 0.0}, "beta"),
        ({"learning_rate": -1e-5}, "learning_rate"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "sigmoid"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
    ],
)
def test_senseless_parameters_are_refused(changes, message):
    with pytest.raises(ValidationError, match=message):
        PARAMS.replace(**changes)


SCRIPT = """
import sys
from pathlib import Path
from accelerate import DistributedType, PartialState
from stages import train_dpo
from tests.test_train_dpo import BASE, PARAMS
root, precision, launcher = sys.argv[1:]
if launcher == "fsdp":  # accelerate 1.15 shards on accelerators only; torch does on CPUs too
    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
base = BASE.replace(precision=precision)
train_dpo.main(base, PARAMS.replace(learning_rate=5e-5), Path(root))
"""
LAUNCHERS = {
    "ddp": TORCHRUN,
    "fsdp": ("accelerate.commands.launch", "--config_file", "recipes/fsdp.yaml"),
}


def in_two_processes(project: Path, precision: str, launcher: str) -> list[dict[str, float]]:
    run_in_two(SCRIPT, project, precision, launcher, launcher=LAUNCHERS[launcher], timeout=120)
    return history_of(project)


@pytest.mark.parametrize(("launcher", "bound"), [("ddp", 1e-5), ("fsdp", 5e-5)])
def test_two_processes_train_as_one(project, launcher, bound):
    train_dpo.main(BASE, PARAMS.replace(learning_rate=5e-5), project)
    single = history_of(project)
    single_weights = load_file(project / "models/dpo/model.safetensors")
    double = in_two_processes(project, "fp32", launcher)
    assert len(double) == len(single) == 20
    for one, two in zip(single, double, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["rewards/margins"] == pytest.approx(one["rewards/margins"], abs=bound)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
    double_weights = load_file(project / "models/dpo/model.safetensors")
    assert double_weights.keys() == single_weights.keys()
    for name, tensor in double_weights.items():
        torch.testing.assert_close(tensor, single_weights[name], rtol=0, atol=1e-4)


@pytest.mark.slow
def test_fsdp_in_bf16_rounds_products_and_nothing_else(project):
    # left to accelerate, FSDP2 would round weights and log-probs as well, or, without its policy, nothing at all
    base = BASE.replace(precision="bf16")
    reference_logps.main(base, reference_logps.Params(micro_batch_tokens=2000), project)
    train_dpo.main(base, PARAMS.replace(learning_rate=5e-5), project)
    single = history_of(project)
    exact = in_two_processes(project, "fp32", "ddp")
    sharded = in_two_processes(project, "bf16", "fsdp")
    for one, two in zip(single, sharded, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=5e-3)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=2e-2)

    def apart(history):  # nats per answer, before rounding has led training elsewhere
        return sum(
            abs(row["logps/chosen"] - one["logps/chosen"]) for row, one in zip(history, single[:5], strict=True)
        )

    assert apart(sharded[:5]) < 0.5 * apart(exact[:5])  # bf16 products, as in one process
    assert apart(sharded[:5]) < 1.0  # and float32 log-probs: near -1,000 those of bf16 lie 4 nats apart
    weights = load_file(project / "models/dpo/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.slow
def test_two_machines_train_as_one(project):
    """Two launchers that meet at one address, each with a process of its own."""
    train_dpo.main(BASE, PARAMS.replace(learning_rate=5e-5), project)
    single = history_of(project)
    script = project / "script.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    launch = ["torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    launch += [f"--rdzv_endpoint={meeting}", str(script), str(project), "fp32", "ddp"]
    environment = os.environ | {"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "DEVICE": "cpu"}
    nodes = [subprocess.Popen([sys.executable, "-m", *launch], cwd=REPO, env=environment) for _ in range(2)]
    assert [node.wait(300) for node in nodes] == [0, 0]
    double = history_of(project)
    assert len(double) == len(single) == 20
    for one, two in zip(single, double, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
