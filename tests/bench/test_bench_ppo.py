"""The PPO benchmark on the tiny model: both sides run the same settings, and the ratios mean what they say."""

import ast
import sys

import pytest
import torch

from bench import bench_ppo
from stages.lib.run.params import read_params
from tests.conftest import REPO


def side(rate, memory):
    rounds = [0.9 * rate, rate, 1.1 * rate]
    return {"episodes_per_second": rate, "episodes_per_second_of_rounds": rounds, "peak_memory_mb": memory}


def test_ratios_by_hand():
    sides = {"trl": side(0.2, 8000), "ours_fp32": side(0.3, 6000), "ours": side(0.8, 4000)}
    sides["ours_frozen_critic"] = side(1.0, 2000)
    assert bench_ppo.compare(sides) == pytest.approx(
        {
            "speedup": 4.0,
            "speedup_low": 0.72 / 0.22,
            "speedup_high": 0.88 / 0.18,
            "speedup_frozen_critic": 5.0,
            "speedup_fp32": 1.5,
            "memory_ratio": 0.5,
            "memory_ratio_frozen_critic": 0.25,
            "memory_ratio_fp32": 0.75,
        }
    )


def test_fp32_is_compared_with_fp32_where_trl_has_both():
    sides = {"trl": side(2.0, 10), "trl_fp32": side(1.0, 20), "ours_fp32": side(1.5, 10), "ours": side(4.0, 5)}
    ratios = bench_ppo.compare(sides | {"ours_frozen_critic": side(4.0, 5)})
    assert ratios["speedup"] == pytest.approx(2.0) and ratios["speedup_fp32"] == pytest.approx(1.5)
    assert ratios["memory_ratio"] == pytest.approx(0.5) and ratios["memory_ratio_fp32"] == pytest.approx(0.5)


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


STOCK_PYTHON = REPO / ".venv-trl112/bin/python"


def specs_of(shapes, tiny_base, root):
    """A spec of every side, over the tiny model."""
    root.mkdir()
    arguments = ["--batch-size", "8", "--updates", "2", "--response-length", "4", "--stock-python", sys.executable]
    options = bench_ppo.parse([*arguments, "--shapes", shapes])
    bench_ppo.prepare(tiny_base / "models/base", root, seed=1, count=12)
    settings = {name: getattr(options, name) for name in bench_ppo.SETTINGS}
    sides = bench_ppo.sides_of(torch.device("cpu"), shapes)
    return {name: {"root": str(root), "device": "cpu", **settings, **side} for name, side in sides.items()}


@pytest.fixture
def specs(tiny_base, tmp_path):
    return specs_of("stock", tiny_base, tmp_path / "bench")


def check(result):
    assert result["episodes"] == 16 and len(result["kl"]) == 3 and result["seconds"] > 0
    assert result["kl"][0] == pytest.approx(0, abs=0.05)
    assert 0 < sum(result["phase_seconds"].values()) <= result["seconds"] * 1.05
    assert result["peak_memory_mb"] > 0


def test_our_sides_do_what_their_names_say(specs):
    fp32, ours, frozen = (
        bench_ppo.run_side(specs[name], STOCK_PYTHON) for name in ("ours_fp32", "ours", "ours_frozen_critic")
    )
    for result in (fp32, ours, frozen):
        check(result)
    assert set(fp32["precision"].values()) == {"float32 weights, float32 products"}
    # the reward model shares the reference's pass
    assert set(fp32["precision"]) == {"policy", "reference", "value"}
    if specs["ours"]["bf16"]:
        assert ours["precision"]["policy"] == "float32 weights, bfloat16 products"
        assert ours["precision"]["reference"] == "bfloat16 weights, bfloat16 products"
        assert ours["precision"]["sampler"] == "bfloat16 weights, bfloat16 products"
    assert "value" in ours["precision"] and "value" not in frozen["precision"]


def test_the_defaults_are_those_of_params_yaml(tiny_base, tmp_path):
    spec = specs_of("defaults", tiny_base, tmp_path / "bench")["ours"]
    section = read_params(REPO)["train_ppo"]
    assert spec["num_ppo_epochs"] == section["num_ppo_epochs"] and spec["response_length"] == 4
    result = bench_ppo.run_side(spec, STOCK_PYTHON)
    check(result)
    assert "value" not in result["precision"]  # rloo has no critic


@pytest.mark.slow
@pytest.mark.skipif(not STOCK_PYTHON.exists(), reason="make bench-ppo makes TRL 1.12.0's environment")
def test_the_stock_side_runs_in_its_own_environment(specs):
    result = bench_ppo.run_side(specs["trl"], STOCK_PYTHON)
    check(result)
    assert set(result["precision"]) == {"policy", "value", "reference", "reward"}
    assert set(result["precision"].values()) == {"float32 weights, float32 products"}  # bf16=True or not
    assert result["versions"]["trl"] == "1.12.0"


def test_the_stock_side_imports_nothing_that_its_environment_lacks():
    for name in ("ppo_stock", "worker"):
        tree = ast.parse((REPO / f"bench/{name}.py").read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not any(module.startswith(("stages", "bench")) for module in modules - {"bench.worker"})


def test_a_missing_stock_environment_is_named_with_its_remedy(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_ppo.parse(["--stock-python", str(tmp_path / "nowhere")])
    assert "make bench-ppo" in capsys.readouterr().err


def test_cuda_runs_trl_in_both_precisions():
    assert list(bench_ppo.sides_of(torch.device("cpu"), "stock")) == [
        "trl",
        "ours_fp32",
        "ours",
        "ours_frozen_critic",
    ]
