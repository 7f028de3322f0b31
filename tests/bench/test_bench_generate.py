"""bench_generate: its arithmetic by hand, and both sides on the tiny model."""

import pytest
import torch
from transformers import GenerationConfig

from bench import bench_generate
from bench.measure import in_fresh_process


def run(*seconds, memory=10.0):
    return {
        "seconds": dict(zip(("1", "4"), seconds, strict=True)),
        "peak_memory_mb": memory,
        "busy_elsewhere": 0.1,
    }


def test_rates_are_medians_and_the_ratio_has_its_ends():
    runs = {
        "ours": [run(1.0, 2.0), run(2.0, 4.0), run(4.0, 5.0, memory=12.0)],
        "transformers": [run(10.0, 10.0), run(20.0, 40.0), run(40.0, 20.0)],
    }
    summary = bench_generate.summary_of(runs, [1, 4], tokens=10)
    assert summary["tokens_per_second"] == {"ours": {1: 5.0, 4: 10.0}, "transformers": {1: 0.5, 4: 2.0}}
    assert summary["speedup"] == {1: 10.0, 4: 5.0}
    assert summary["speedup_low"] == {1: 2.5, 4: 2.0} and summary["speedup_high"] == {1: 40.0, 4: 20.0}
    assert summary["peak_memory_mb"]["ours"] == 12.0


def test_reading_is_no_faster_than_memory_can_be():
    # 80 MB: above 1 TB/s no processor reads them, and below 0.1 GB/s none is as slow
    assert 80e6 / 1e12 < bench_generate.reading_seconds(80_000_000, torch.device("cpu"), repeats=2) < 0.8


@pytest.mark.parametrize("side", bench_generate.SIDES)
def test_each_side_makes_as_many_tokens(side, tiny_base):
    GenerationConfig(eos_token_id=list(range(1, 512)), pad_token_id=0).save_pretrained(tiny_base / "models/base")
    spec = {"device": "cpu", "base": str(tiny_base / "models/base"), "precision": "fp32"}
    result = in_fresh_process("bench.generate_side", spec | {"side": side, "rows": [1, 3], "tokens": 6})
    assert set(result["seconds"]) == {"1", "3"} and min(result["seconds"].values()) > 0
