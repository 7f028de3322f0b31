"""One optimizer step of every stage with adapters on a model of SmolLM2-1.7B's size and random weights.

The stages run one after another as in the pipeline, each in a process of its own, on a folder that is deleted at the
end. DPO and PPO make a step each, of pairs and answers as long as the embedded ones; what comes out means nothing.

seconds and peak_memory_mb   of every stage, as its run.json has them

Run     python -m bench.one_step                about 40 minutes on 2 cores, 30 GB of disk
Writes  bench/results/one_step.json
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from ruamel.yaml import YAML

from bench.measure import REPO, circumstances
from bench.random_base import SMOLLM2_1_7B, smollm2_135m, write_random_base
from stages.lib.run.artefacts import round_floats, write_json
from stages.lib.run.params import read_params

CHANGES: dict[str, dict[str, Any]] = {
    "base": {"precision": "auto"},
    "lora": {"rank": 16},
    "fetch_base": {"path": "random"},
    "fetch_pairs": {"eval_prompts": False},
    "tokenize_pairs": {"max_length": 1024, "max_prompt_length": 256},
    "train_dpo": {"max_steps": 1, "look_prompts": 2, "response_length": 128},
    "train_ppo": {"episodes": 8, "look_prompts": 2, "response_length": 128, "warmup_updates": 0},
    "sample_responses": {"max_new_tokens": 32, "best_of_n_prompts": 1},
    "analyze_logps": {"max_train_pairs": 4, "max_unseen_texts": 4},
}


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=json.loads, default=SMOLLM2_1_7B, help="of the model, as JSON")
    parser.add_argument(
        "--folder", type=Path, help="where the models are written, and deleted; default: a new one"
    )
    parser.add_argument("--output", type=Path, default=REPO / "bench/results/one_step.json")
    return parser.parse_args(arguments)


def smoke_changes() -> dict[str, dict[str, Any]]:
    """The smoke recipe's values by section: few and short texts."""
    words = shlex.split((REPO / "recipes/smoke.txt").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    for word in words[1::2]:
        name, value = word.split("=", 1)
        section, key = name.split(".")
        found.setdefault(section, {})[key] = YAML(typ="safe").load(value)
    return found


def write_project(root: Path, sizes: dict[str, int]) -> None:
    """The project's data, parameters of one step, and the model."""
    (root / "data").mkdir()
    for file in (REPO / "data").glob("*_embedded.jsonl"):
        (root / "data" / file.name).symlink_to(file)
    params = read_params(REPO)
    for changes in (smoke_changes(), CHANGES):
        for section, values in changes.items():
            params[section] |= values
    with open(root / "params.yaml", "w", encoding="utf-8") as file:
        YAML(typ="safe").dump(params, file)
    texts = (root / "data/pairs_embedded.jsonl").read_text(encoding="utf-8").splitlines()
    write_random_base(root / "random", smollm2_135m(**sizes), texts, dtype=torch.bfloat16)


def run_stages(root: Path) -> dict[str, dict[str, float]]:
    """Seconds and peak memory of every stage that keeps a record, in the pipeline's order."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "CHECKPOINT_MINUTES": "600"}
    found = {}
    for stage in YAML(typ="safe").load(REPO / "dvc.yaml")["stages"]:
        subprocess.run([sys.executable, "-m", f"stages.{stage}"], cwd=root, env=environment, check=True)
        record = root / f"reports/{stage}/run.json"
        if record.exists():
            run = json.loads(record.read_text(encoding="utf-8"))
            found[stage] = {name: run[name] for name in ("seconds", "peak_memory_mb")}
    return found


def main(arguments: list[str]) -> dict[str, Any]:
    options = parse(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        write_project(Path(folder), options.sizes)
        stages = run_stages(Path(folder))
        parameters = json.loads((Path(folder) / "reports/fetch_base/metrics.json").read_text())["parameters"]
    highest = max(stages, key=lambda stage: stages[stage]["peak_memory_mb"])
    result = {"parameters": parameters, "highest": highest, **stages[highest], "stages": stages}
    result |= {"changes": CHANGES} | circumstances(torch.device("cpu"))
    write_json(options.output, round_floats(result))
    print(f"wrote {options.output}: {highest} peaked at {stages[highest]['peak_memory_mb']:,.0f} MB")
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
