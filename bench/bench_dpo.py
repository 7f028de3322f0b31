"""Compare this project's DPO with TRL's DPOTrainer, alternating in fresh processes, and see how its cost grows.

Same pairs in the same batches of 8, same model, max_length 1024, TRL's default hyperparameters, fp32 weights
under bf16 products (looked at, not assumed); the first step of every process warms up and does not count. TRL
runs with its defaults, without checkpointing of activations, and with the reference log-probs computed beforehand,
with and without it.

pairs_per_second   reference log-probs and training, medians over rounds; loading, tokenizing, evaluating and
                   saving are left out on both sides. `speedup_cached` leaves the reference out on both sides: it was
                   computed in an earlier run.
peak_memory_mb     of the process (on a GPU: allocated there) up to the end of training
limit_share        of what the machine's matrix products allow: 2 x parameters x real tokens x (3 for training
                   + 1 for the reference), the output layer for completion tokens only, nothing recomputed or
                   padded, over bf16 products at the model's own shapes timed before and after

Run     python -m bench.bench_dpo                        about 15 minutes on 2 cores
        python -m bench.bench_dpo --pairs-file PAIRS.jsonl.gz
        python -m bench.bench_dpo --device cuda --pairs 10884 --rounds 1
Writes  bench/results/dpo_<device>.json, bench/results/dpo_<device>_growth.png
"""

import argparse
import gzip
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.dpo_growth import draw_growth, measure_growth
from bench.dpo_ours import PARTS, training_params, write_token_tables
from bench.measure import REPO, circumstances, in_fresh_process, linear_shapes, matmul_limit, tokens_or_auto
from bench.random_base import smollm2_135m, write_random_base
from stages.lib.data.chat import apply_chat_template, to_implicit_prompt_preferences, tokenize_row, truncate
from stages.lib.model.loading import DTYPES, load_tokenizer, pick_precision
from stages.lib.run.artefacts import read_parquet, round_floats, write_json
from stages.lib.run.params import read_params
from stages.train_dpo import Params, batches_of

SEED, MAX_LENGTH = 42, 1024
#: bench/dpo_trl.py says what they change
TRL_SETTINGS = ("trl_default", "trl_no_checkpointing", "trl_precomputed", "trl_precomputed_checkpointing")


def parse(arguments: list[str]) -> argparse.Namespace:
    dials = read_params(REPO)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--base", type=Path, default=REPO / "models/base", help="a model folder as fetch_base leaves it"
    )
    parser.add_argument(
        "--pairs-file", type=Path, default=REPO / "data/pairs_embedded.jsonl", help="jsonl or jsonl.gz"
    )
    parser.add_argument("--pairs", type=int, default=24, help="pairs that count, after one batch to warm up")
    parser.add_argument("--batch-size", type=int, default=8, help="pairs per optimizer step")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each side, alternating")
    parser.add_argument(
        "--trl", nargs="*", default=TRL_SETTINGS, choices=TRL_SETTINGS, help="settings of TRL to run"
    )
    parser.add_argument(
        "--micro-batch-tokens",
        type=tokens_or_auto,
        default=dials["train_dpo"]["micro_batch_tokens"],
        help="ours: memory dial",
    )
    parser.add_argument(
        "--reference-micro-batch-tokens",
        type=tokens_or_auto,
        default=dials["reference_logps"]["micro_batch_tokens"],
        help="ours: memory dial of the reference pass",
    )
    parser.add_argument("--no-growth", dest="growth", action="store_false", help="leave out how the cost grows")
    parser.add_argument("--quick", action="store_true", help="one batch, one round: does everything run?")
    parser.add_argument("--output", type=Path, help="default: bench/results/dpo_<device>.json")
    options = parser.parse_args(arguments)
    if options.quick:
        options.pairs, options.rounds = options.batch_size, 1
    options.pairs -= options.pairs % options.batch_size
    return options


def read_pairs(path: Path, count: int) -> list[dict[str, str]]:
    """`count` pairs of a jsonl file (may be .gz), spread evenly over it; repeated if it has fewer."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else open(path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if count <= len(rows):
        picked = [rows[i * len(rows) // count] for i in range(count)]
    else:
        picked = [rows[i % len(rows)] for i in range(count)]
    return [{part: row[part] for part in PARTS} for row in picked]


def prepare(root: Path, base: Path, rows: list[dict[str, str]], params: Params) -> None:
    """What the sides read under `root`: the model, our token tables, the texts in the order of our batches."""
    if base.exists():
        (root / "models").mkdir()
        (root / "models/base").symlink_to(base.resolve(), target_is_directory=True)
    else:
        print(f"{base}: not there; taking SmolLM2-135M's architecture with random weights")
        write_random_base(root / "models/base", smollm2_135m(), (text for row in rows for text in row.values()))
    tokenizer = load_tokenizer(root / "models/base")
    tokens = []
    for row in rows:
        rendered = apply_chat_template(to_implicit_prompt_preferences(row), tokenizer)
        tokens.append(truncate(tokenize_row(rendered, tokenizer, None), None, None, MAX_LENGTH))
    write_token_tables(root, tokens, tokens[:1])
    order = [i for _, index in batches_of(len(rows), params, SEED) for i in index]
    write_json(root / "pairs.json", {"pairs": [rows[i] for i in order]})


def required_flops(root: Path, model: torch.nn.Module, counted: list[int]) -> dict[str, float]:
    """FLOPs that DPO on the counted pairs cannot do without, in training and in the reference pass."""
    columns = read_parquet(root / "data/tokenized/pairs_train.parquet")
    prompt, chosen, rejected = (sum(len(columns[f"{part}_input_ids"][i]) for i in counted) for part in PARTS)
    layers = sum(inputs * outputs * n for (inputs, outputs), n in linear_shapes(model.get_decoder()).items())
    output_layer = model.get_output_embeddings().weight.numel()
    forward = 2.0 * (layers * (2 * prompt + chosen + rejected) + output_layer * (chosen + rejected))
    return {"training": 3 * forward, "reference": forward}


def run_side(side: str, spec: dict[str, Any]) -> dict[str, Any]:
    """One run of one side; ours is two processes, as in the pipeline."""
    if side != "ours":
        return in_fresh_process("bench.dpo_trl", spec | {"setting": side})
    reference, training = (
        in_fresh_process("bench.dpo_ours", spec | {"stages": [stage]})
        for stage in ("reference_logps", "train_dpo")
    )
    if reference["precision"] != training["precision"]:
        raise AssertionError(f"reference {reference['precision']}, training {training['precision']}")
    highest = {name: max(reference[name], training[name]) for name in ("peak_memory_mb", "busy_elsewhere")}
    return reference | training | highest


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Runs all sides in turn; their figures and ratios."""
    device = torch.device(options.device)
    precision = pick_precision("auto", device)
    params = training_params(batch_size=options.batch_size, micro_batch_tokens=options.micro_batch_tokens)
    rows = read_pairs(options.pairs_file, options.pairs + options.batch_size)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in ("ours", *options.trl)}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        prepare(root, options.base, rows, params)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(root / "models/base"))
        counted = [i for _, index in batches_of(len(rows), params, SEED) for i in index][options.batch_size :]
        flops = required_flops(root, model, counted)
        shapes = linear_shapes(model)
        del model
        spec = {
            "root": folder,
            "device": options.device,
            "precision": precision,
            "seed": SEED,
            "num_pairs": len(rows),
            "batch_size": options.batch_size,
            "max_length": MAX_LENGTH,
            "reference_micro_batch_tokens": options.reference_micro_batch_tokens,
            "train_dpo": params.model_dump(),
        }
        limits = [matmul_limit(shapes, 2048, DTYPES[precision], device)]
        for number in range(options.rounds):
            for side, of_side in runs.items():
                of_side.append(run_side(side, spec))
                run = of_side[-1]
                print(
                    f"round {number + 1} {side:21}{options.pairs / seconds_of(run):7.3f} pairs/s "
                    f"{run['tokens'] / seconds_of(run):8.0f} tokens/s {run['peak_memory_mb']:8,.0f} MB, "
                    f"{run['precision']}, busy elsewhere {run['busy_elsewhere']:.0%}",
                    flush=True,
                )
        limits.append(matmul_limit(shapes, 2048, DTYPES[precision], device))
    require_same_work(runs, precision)
    result = ratios(
        {side: summary_of(of_side, options.pairs) for side, of_side in runs.items()}, flops, max(limits)
    )
    return result | {"precision": precision, "matmul_limit_gflops": [limit / 1e9 for limit in limits]}


def seconds_of(run: dict[str, Any]) -> float:
    """Training, and the reference where it ran outside of it."""
    return run["seconds"] + (run["reference_seconds"] or 0.0)


def require_same_work(runs: dict[str, list[dict[str, Any]]], precision: str) -> None:
    """Every run put the same tokens through the same dtypes and met the same losses.

    Raises:
        AssertionError: one did not.
    """
    products = str(DTYPES[precision]).removeprefix("torch.")
    expected = runs["ours"][0]
    for side, of_side in runs.items():
        for run in of_side:
            if run["precision"] != f"float32 weights, {products} products":
                raise AssertionError(f"{side}: {run['precision']} instead of {products} products")
            if run["tokens"] != expected["tokens"]:
                raise AssertionError(f"{side}: {run['tokens']} tokens, ours {expected['tokens']}")
            # bf16 moves a log-prob by up to 0.4 nats, beta 0.1 makes 0.04 of it
            if any(abs(a - b) > 0.05 for a, b in zip(run["losses"], expected["losses"], strict=True)):
                raise AssertionError(f"{side}: losses {run['losses']}, ours {expected['losses']}")


def summary_of(runs: list[dict[str, Any]], pairs: int) -> dict[str, Any]:
    """One side: medians over its rounds."""
    seconds = statistics.median(seconds_of(run) for run in runs)
    references = [run["reference_seconds"] for run in runs if run["reference_seconds"]]
    return {
        "pairs_per_second": pairs / seconds,
        "tokens_per_second": runs[0]["tokens"] / seconds,
        "pairs_per_second_of_rounds": [pairs / seconds_of(run) for run in runs],
        "training_pairs_per_second": pairs / statistics.median(run["seconds"] for run in runs),
        "reference_seconds": statistics.median(references) if references else None,
        "seconds": seconds,
        "peak_memory_mb": max(run["peak_memory_mb"] for run in runs),
        "precision": runs[0]["precision"],
        "losses": runs[0]["losses"],
        "busy_elsewhere": max(run["busy_elsewhere"] for run in runs),
    }


def ratios(sides: dict[str, dict[str, Any]], flops: dict[str, float], limit: float) -> dict[str, Any]:
    """Above 1 is faster, memory below 1 is leaner.

    Args:
        sides: `summary_of` 'ours' and of TRL's settings.
        flops: that the counted pairs need, in 'training' and in the 'reference' pass.
        limit: the machine's FLOP/s.
    """
    ours = sides["ours"]
    training_seconds = ours["seconds"] * ours["pairs_per_second"] / ours["training_pairs_per_second"]
    result: dict[str, Any] = {}
    trl = {side: figures["pairs_per_second"] for side, figures in sides.items() if side != "ours"}
    if trl:
        fastest = max(trl, key=trl.__getitem__)
        result["speedup"] = ours["pairs_per_second"] / trl[fastest]
        result["fastest_trl"] = fastest
    cached = [sides[side]["training_pairs_per_second"] for side in trl if side.startswith("trl_precomputed")]
    if cached:  # the reference counted on neither side: both keep it for the next run
        result["speedup_cached"] = ours["training_pairs_per_second"] / max(cached)
    if "trl_default" in trl:
        result["memory_ratio"] = ours["peak_memory_mb"] / sides["trl_default"]["peak_memory_mb"]
    result["limit_share"] = sum(flops.values()) / limit / ours["seconds"]
    result["limit_share_cached"] = flops["training"] / limit / training_seconds
    return result | {"sides": sides}


def main(arguments: list[str]) -> dict[str, Any]:
    options = parse(arguments)
    result = compare(options)
    headline = {name: value for name, value in result.items() if name != "sides"}
    settings = {name: getattr(options, name) for name in ("pairs", "batch_size", "micro_batch_tokens", "rounds")}
    settings |= {"pairs_file": options.pairs_file.name, "random_weights": not options.base.exists()}
    result |= {"settings": settings} | circumstances(torch.device(options.device))
    path = options.output or REPO / f"bench/results/dpo_{options.device}.json"
    if options.growth:
        result["growth"] = measure_growth(options.device, options.quick)
        draw_growth(result["growth"], path.with_name(f"{path.stem}_growth.png"))
    write_json(path, round_floats(result, 4))
    print(json.dumps(round_floats(headline, 3)))
    print(f"wrote {path}")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
