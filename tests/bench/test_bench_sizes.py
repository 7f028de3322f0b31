"""Costs by model size: how many weights there are, and every point on a tiny model."""

import json

import pytest
import torch

from bench import bench_sizes
from bench.dpo_growth import TINY


@pytest.mark.parametrize(
    ("name", "parameters"), [("135M", 134_515_008), ("360M", 361_821_120), ("1.7B", 1_711_376_384)]
)
def test_the_sizes_are_smollm2s(name, parameters):
    # as safetensors metadata on the Hub has them
    assert bench_sizes.parameters_of(bench_sizes.SIZES[name]) == parameters


def test_all_weights_are_left_out_where_their_state_fills_memory(monkeypatch):
    ranks = []
    monkeypatch.setattr(bench_sizes, "decode", lambda *args: {})
    monkeypatch.setattr(bench_sizes, "measure_point", lambda *args, rank, **how: ranks.append(rank) or {})
    monkeypatch.setattr(bench_sizes, "memory_of", lambda device: 25 * 10**9)
    for sizes in bench_sizes.SIZES.values():
        bench_sizes.measure_size(torch.device("cpu"), sizes, [32])
    assert ranks == [None, 16, None, 16, 16]  # 1.7B: 27 GB of weights, gradients and moments


@pytest.mark.slow  # seven processes
def test_measures_and_draws_every_point(tmp_path):
    output = tmp_path / "sizes.json"
    sizes = {"tiny": TINY | {"vocab_size": 512}, "wider": TINY | {"vocab_size": 512, "intermediate_size": 256}}
    bench_sizes.main(["--sizes", json.dumps(sizes), "--lengths", "4", "8", "--output", str(output)])
    result = json.loads(output.read_text())
    for size in result["sizes"].values():
        assert size["adapters"]["seconds_per_step"] > 0 < size["all weights"]["peak_memory_mb"]
        assert set(size["decoding"]["seconds"]) == {"4", "8"}
    assert output.with_suffix(".png").stat().st_size > 10_000
