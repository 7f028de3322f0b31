"""Compute the frozen base's log-prob of every chosen and rejected completion, once.

Reads   models/base, data/tokenized/pairs_{train,heldout,negatives}.parquet
Writes  data/reference_logps                   summed log-probs per row, and what they were computed from
        reports/reference_logps/metrics.json   counts and mean log-probs
        reports/reference_logps/run.json       seconds, tokens/s, memory, versions

Run     dvc repro reference_logps              (untracked: python -m stages.reference_logps)
"""

from pathlib import Path

from stages.lib.data.reference import FOLDER, NEGATIVES, SPLITS, fingerprint, write_reference_logps
from stages.lib.model.loading import freeze, load_causal_lm, pick_device, pick_precision
from stages.lib.model.logps import completion_logps
from stages.lib.model.memory import memory_dial
from stages.lib.run.artefacts import read_parquet, round_floats, write_json
from stages.lib.run.params import Base, MicroBatchTokens, Section
from stages.lib.run.stage import run_stage


class Params(Section):
    micro_batch_tokens: MicroBatchTokens  # memory dial: tokens per forward pass


def main(base: Base, params: Params, root: Path = Path(".")) -> dict:
    device = pick_device()
    precision = pick_precision(base.precision, device)
    model = freeze(load_causal_lm(root / "models/base", device))
    dial = memory_dial(params.micro_batch_tokens, 8192, model, "reference_logps")

    logps, metrics, tokens = {}, {}, 0
    for split in SPLITS:
        pairs = read_parquet(root / f"data/tokenized/pairs_{split}.parquet")
        # the chosen answers of corrupted copies are those of the training pairs
        known = (
            dict(zip(logps["train"]["row"], logps["train"]["chosen_logps"], strict=True))
            if split == NEGATIVES
            else {}
        )
        prompts = pairs["prompt_input_ids"] * (1 if known else 2)
        completions = ([] if known else pairs["chosen_input_ids"]) + pairs["rejected_input_ids"]
        name = f"reference {split}"
        both = dial.run(completion_logps, model, prompts, completions, precision=precision, progress=name).tolist()
        both = [known[row] for row in pairs["row"]] + both if known else both
        count = len(pairs["row"])
        logps[split] = {
            "row": pairs["row"],
            "prompt_id": pairs["prompt_id"],
            "chosen_logps": both[:count],
            "rejected_logps": both[count:],
        }
        metrics[split] = {
            "pairs": count,
            # no copy, where no chosen answer could be spoilt
            "logps/chosen": sum(both[:count]) / count if count else None,
            "logps/rejected": sum(both[count:]) / count if count else None,
        }
        tokens += sum(map(len, prompts)) + sum(map(len, completions))

    write_reference_logps(root, logps, fingerprint(root, precision))
    write_json(root / "reports/reference_logps/metrics.json", round_floats(metrics))
    print(f"wrote {FOLDER}: {sum(m['pairs'] for m in metrics.values())} pairs")
    return {"tokens": tokens, "device": device.type, "precision": precision}


if __name__ == "__main__":
    run_stage("reference_logps", main, Params)
