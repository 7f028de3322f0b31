"""The PPO benchmark on the tiny model: both sides run the same settings, and the ratios mean what they say."""

import json

import pytest
import torch
from trl.experimental.ppo import ppo_trainer

from bench import bench_ppo, ppo_run


def side(rate, memory):
    return {"episodes_per_second": rate, "peak_memory_mb": memory}


def test_ratios_by_hand():
    sides = {"trl": side(0.2, 8000), "ours_fp32": side(0.3, 6000), "ours": side(0.8, 4000)}
    assert bench_ppo.compare(sides) == pytest.approx(
        {"speedup": 4.0, "speedup_fp32": 1.5, "memory_ratio": 0.5, "memory_ratio_fp32": 0.75}
    )


def test_fp32_is_compared_with_fp32_where_trl_has_both():
    sides = {"trl": side(2.0, 10), "trl_fp32": side(1.0, 20), "ours_fp32": side(1.5, 10), "ours": side(4.0, 5)}
    assert bench_ppo.compare(sides) == pytest.approx(
        {"speedup": 2.0, "speedup_fp32": 1.5, "memory_ratio": 0.5, "memory_ratio_fp32": 0.5}
    )


def test_summary_takes_medians_of_rounds():
    runs = [
        {
            "episodes": 6,
            "seconds": seconds,
            "phase_seconds": {"generation": seconds / 2},
            "kl": [0.0, 0.1, 0.2, 0.3],
            "precision": {"policy": "x"},
            "peak_memory_mb": memory,
            "busy_elsewhere": busy,
        }
        for seconds, memory, busy in ((3.0, 10.0, 0.0), (1.0, 12.0, 0.5), (2.0, 11.0, 0.1))
    ]
    summary = bench_ppo.summary_of(runs)
    assert summary["episodes_per_second"] == 3.0 and summary["episodes_per_second_of_rounds"] == [2.0, 6.0, 3.0]
    assert summary["peak_memory_mb"] == 12.0 and summary["busy_elsewhere"] == 0.5
    assert summary["phase_seconds_per_update"] == {"generation": pytest.approx(1 / 3)}  # of the median run


def test_both_sides_run_the_same_settings(tiny_base, tmp_path, monkeypatch):
    for name in ("batch_generation", "forward", "get_reward"):  # measure puts clocks around them
        monkeypatch.setattr(ppo_trainer, name, getattr(ppo_trainer, name))
    monkeypatch.setenv("DEVICE", "cpu")
    torch.set_num_threads(1)
    root = tmp_path / "bench"
    root.mkdir()
    bench_ppo.prepare(tiny_base / "models/base", root, seed=1)
    options = bench_ppo.parse(["--batch-size", "2", "--updates", "2", "--response-length", "4"])
    settings = {name: getattr(options, name) for name in bench_ppo.SETTINGS}
    results = {}
    for name, spec in bench_ppo.sides_of(torch.device("cpu")).items():
        results[name] = ppo_run.measure({"root": str(root), "device": "cpu", **settings, **spec})
    for result in results.values():
        assert result["episodes"] == 4 and len(result["kl"]) == 3 and result["seconds"] > 0
        assert result["kl"][0] == pytest.approx(0, abs=0.05)
        assert 0 < sum(result["phase_seconds"].values()) <= result["seconds"] * 1.05
        json.dumps(result, allow_nan=False)
    assert set(results["trl"]["precision"].values()) == {"float32 weights, float32 products"}  # bf16=True or not
    assert results["ours_fp32"]["precision"]["policy"] == "float32 weights, float32 products"
    if bench_ppo.sides_of(torch.device("cpu"))["ours"]["bf16"]:
        assert results["ours"]["precision"]["policy"] == "float32 weights, bfloat16 products"
        assert results["ours"]["precision"]["reference"] == "bfloat16 weights, bfloat16 products"


def test_cuda_runs_trl_in_both_precisions():
    assert list(bench_ppo.sides_of(torch.device("cpu"))) == ["trl", "ours_fp32", "ours"]
