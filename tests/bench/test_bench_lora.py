"""Adapters against all weights: both do the same work, and the ratios mean what they say."""

import json

import pytest

from bench import bench_lora


def test_summary_by_hand():
    def runs(*speeds, memory):
        return [{"speed": speed, "whole_peak_memory_mb": memory, "busy_elsewhere": 0.0} for speed in speeds]

    found = bench_lora.summary_of(
        {"full": runs(1.0, 2.0, 4.0, memory=8.0), "lora": runs(3.0, 5.0, 4.0, memory=2.0)}
    )
    assert found["speedup"] == 2.0 and found["memory_ratio"] == 0.25
    assert found["speedup_low"] == 0.75 and found["speedup_high"] == 5.0


@pytest.mark.slow  # five processes
def test_runs_both_sides_of_both_trainings(tiny_base, tmp_path):
    output = tmp_path / "result.json"
    sizes = ["--pairs", "4", "--batch-size", "4", "--updates", "1", "--rank", "2"]
    sizes += ["--rounds", "1", "--ppo-rounds", "1"]
    bench_lora.main(["--base", str(tiny_base / "models/base"), "--output", str(output), *sizes])
    result = json.loads(output.read_text())
    for training in ("dpo", "ppo"):
        assert all(side["speed"] > 0 and side["peak_memory_mb"] > 0 for side in result[training]["sides"].values())
