"""bench_dpo: its arithmetic by hand, its refusals, and one comparison on the tiny model in fresh processes."""

import gzip
import json

import pytest
import torch
from torch import nn

from bench import bench_dpo, dpo_growth, measure, worker
from bench.random_base import smollm2_135m, write_random_base
from stages.lib.model.loading import load_causal_lm, load_tokenizer
from stages.lib.run.artefacts import read_json

RUN = {
    "seconds": 3.0,
    "reference_seconds": 1.0,
    "tokens": 800,
    "losses": [0.69, 0.5],
    "precision": "float32 weights, bfloat16 products",
    "peak_memory_mb": 40.0,
    "busy_elsewhere": 0.01,
}


def test_ratios_worked_example():
    # ours: 8 pairs in 3 s + 1 s; TRL at best 8 pairs in 12 s, its default 16 s and 100 MB
    sides = {
        "ours": bench_dpo.summary_of([RUN], 8),
        "trl_default": bench_dpo.summary_of(
            [RUN | {"seconds": 16.0, "reference_seconds": None, "peak_memory_mb": 100.0}], 8
        ),
        "trl_precomputed": bench_dpo.summary_of([RUN | {"seconds": 9.0, "reference_seconds": 3.0}], 8),
    }
    assert sides["ours"]["pairs_per_second"] == 2.0 and sides["ours"]["tokens_per_second"] == 200.0
    # 6 GFLOP of training and 2 of reference on a machine of 4 GFLOP/s: 2 s are needed, 4 were taken
    result = bench_dpo.ratios(sides, {"training": 6e9, "reference": 2e9}, limit=4e9)
    assert result["fastest_trl"] == "trl_precomputed"
    assert result["speedup"] == pytest.approx(3.0)
    assert result["speedup_cached"] == pytest.approx(3.0)  # 3 s against 9 s
    assert result["memory_ratio"] == pytest.approx(0.4)
    assert result["limit_share"] == pytest.approx(0.5)
    assert result["limit_share_cached"] == pytest.approx(0.5)


def test_a_side_is_the_median_of_its_rounds():
    runs = [RUN | {"seconds": seconds, "peak_memory_mb": seconds} for seconds in (3.0, 7.0, 4.0)]
    summary = bench_dpo.summary_of(runs, 10)
    assert summary["pairs_per_second"] == 2.0 and summary["peak_memory_mb"] == 7.0
    assert summary["pairs_per_second_of_rounds"] == [2.5, 1.25, 2.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"precision": "float32 weights, float32 products"},
            "trl_default: float32 weights, float32 products instead",
        ),
        ({"tokens": 801}, "trl_default: 801 tokens, ours 800"),
        ({"losses": [0.69, 0.4]}, "trl_default: losses"),
    ],
)
def test_sides_that_did_other_work_are_not_compared(changes, message):
    bench_dpo.require_same_work({"ours": [RUN], "trl_default": [RUN]}, "bf16")
    with pytest.raises(AssertionError, match=message):
        bench_dpo.require_same_work({"ours": [RUN], "trl_default": [RUN, RUN | changes]}, "bf16")


def test_required_flops_worked_example(tiny_base, tiny_model):
    rows = [{"prompt_input_ids": [5] * 10, "chosen_input_ids": [6] * 3, "rejected_input_ids": [7] * 2}] * 2
    bench_dpo.write_token_tables(tiny_base, rows, rows[:1])
    # a layer: q 32 x 32, k and v 32 x 16, o 32 x 32, three of 32 x 64 in the MLP = 9,216 weights; two layers.
    # tokens: 10 + 3 and 10 + 2 = 25; the output layer, 32 x 512, for 5 of them
    forward = 2 * (2 * 9_216 * 25 + 32 * 512 * 5)
    flops = bench_dpo.required_flops(tiny_base, tiny_model, counted=[1])
    assert flops == {"training": 3 * forward, "reference": forward}


def test_pairs_are_spread_over_the_file_and_repeated_only_if_short(tmp_path):
    path = tmp_path / "pairs.jsonl.gz"
    with gzip.open(path, "wt") as file:
        for i in range(6):
            print(json.dumps({"topic": "t", "prompt": str(i), "chosen": "c", "rejected": "r"}), file=file)
    assert [row["prompt"] for row in bench_dpo.read_pairs(path, 3)] == ["0", "2", "4"]
    assert [row["prompt"] for row in bench_dpo.read_pairs(path, 8)] == ["0", "1", "2", "3", "4", "5", "0", "1"]
    assert set(bench_dpo.read_pairs(path, 1)[0]) == {"prompt", "chosen", "rejected"}


def test_precision_is_what_the_layers_did_and_probes_do_not_count():
    layer, watch = nn.Linear(4, 4), worker.PrecisionWatch()
    watch.on(layer)
    layer(torch.zeros(1, 4))  # a probe
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.zeros(200, 4))
    assert watch.seen() == "float32 weights, bfloat16 products"
    layer(torch.zeros(200, 4))
    assert watch.seen() == "float32 weights, bfloat16 products and float32 weights, float32 products"


def test_the_limit_is_over_the_models_own_shapes(tiny_model):
    shapes = measure.linear_shapes(tiny_model)
    assert shapes == {(32, 32): 4, (32, 16): 4, (32, 64): 4, (64, 32): 2, (32, 512): 1}
    assert measure.matmul_limit(shapes, 64, torch.float32, torch.device("cpu"), repeats=1) > 0


def test_a_failing_process_says_why():
    with pytest.raises(measure.WorkerError, match="KeyError: 'device'"):
        measure.in_fresh_process("bench.dpo_ours", {})


def test_random_base_is_one_the_stages_load(tmp_path):
    config = smollm2_135m(
        vocab_size=300, hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1
    )
    config.num_key_value_heads, config.head_dim = 1, 4
    write_random_base(tmp_path, config, ["some words", "some more"])
    assert load_causal_lm(tmp_path).config.vocab_size == 300
    assert load_tokenizer(tmp_path)("some words")["input_ids"]


def test_growth_exponent_and_pairs():
    assert dpo_growth.exponent([1, 2, 4], [3, 6, 12]) == pytest.approx(1.0)
    assert dpo_growth.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2.0)
    for row in dpo_growth.random_pairs(3, 100, 512):
        assert len(row["prompt_input_ids"]) + len(row["chosen_input_ids"]) == 100
        assert 3 <= min(row["rejected_input_ids"]) and max(row["rejected_input_ids"]) < 512


def compare_on_the_tiny_model(tiny_base, tmp_path, *arguments):
    output = tmp_path / "dpo_cpu.json"
    base = str(tiny_base / "models/base")
    bench_dpo.main(["--quick", "--base", base, "--batch-size", "4", "--output", str(output), *arguments])
    return read_json(output)


@pytest.mark.slow
def test_compares_in_fresh_processes(tiny_base, tmp_path):
    result = compare_on_the_tiny_model(tiny_base, tmp_path, "--no-growth", "--trl", "trl_precomputed")
    assert result["fastest_trl"] == "trl_precomputed" and result["speedup"] > 0
    assert 0 < result["limit_share"] < 1
    assert result["sides"]["ours"]["losses"] == pytest.approx(
        result["sides"]["trl_precomputed"]["losses"], abs=0.02
    )
    assert result["versions"]["trl"] and result["machine"] and result["date"] and "bench" in result["command"]


@pytest.mark.slow
def test_compares_with_every_setting_and_measures_growth(tiny_base, tmp_path):
    result = compare_on_the_tiny_model(tiny_base, tmp_path)
    assert set(result["sides"]) == {"ours", *bench_dpo.TRL_SETTINGS} and result["memory_ratio"] > 0
    assert len(result["growth"]["memory_over_vocabulary"]) == 2
    assert (tmp_path / "dpo_cpu_growth.png").stat().st_size > 1000
