"""Fit the judge: a preference model on pairs that no training sees, with a read-out of its own.

Reads   models/base, data/tokenized/judge_{pairs,corrupted,short}.parquet      what it is fitted on
        data/tokenized/pairs_heldout.parquet, reward_negatives_heldout.parquet  what it is tried on
Writes  models/judge                              weights, layer and strength
        reports/train_judge/cv.csv                cross-validated accuracy and loss of every layer and strength
        reports/train_judge/heldout_scores.csv    both scores of every held-out pair
        reports/train_judge/metrics.json          the choice, held-out accuracy, accuracy by kind of corruption
        reports/train_judge/run.json              seconds, tokens/s, memory, versions

Run     dvc repro train_judge                     (untracked: python -m stages.train_judge)

Logistic regression (Bradley and Terry's model) on the mean hidden state of a middle layer over the answer's tokens.
Layer and strength are chosen by cross-validation over the judge's own prompts. Corrupted copies are among its pairs,
for without them it takes the marks of the preferred style for quality, and short whole answers, so that it does not
take length for it either.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from sklearn.model_selection import GroupKFold
from torch import Tensor

from stages.lib.data.sizes import too_few_for_the_judge
from stages.lib.model.answer_means import answer_means
from stages.lib.model.judge import Judge, fit_judge, save_judge
from stages.lib.model.loading import freeze, load_causal_lm, pick_device, pick_precision
from stages.lib.model.memory import memory_dial
from stages.lib.model.ranked_right import ranked_right, shares_by_kind, told_by_kind
from stages.lib.run.artefacts import read_parquet, round_floats, write_history, write_json
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, MicroBatchTokens, Section
from stages.lib.run.stage import run_stage

REPORTS = Path("reports/train_judge")
PAIR = "pair"  # the kind of a pair that is not corrupted
PAIR_WEIGHT = 2.0  # of the pairs themselves; a corrupted copy weighs 1
FOLDS = 5


class Params(Section):
    layers: list[Annotated[float, Field(gt=0, le=1)]] = Field(min_length=1)  # candidates, as shares of the depth
    strengths: list[Annotated[float, Field(gt=0)]] = Field(min_length=1)  # candidate inverse penalties, C
    micro_batch_tokens: MicroBatchTokens  # memory dial: tokens per forward pass


class Pairs:
    """Better and worse answers to prompts: rows, prompt ids, kinds, and indices into one list of texts."""

    def __init__(self, texts: "Texts", columns: dict[str, list]):
        self.rows, self.prompt_ids = columns["row"], np.array(columns["prompt_id"])
        self.kinds = np.array(columns.get("kind") or [PAIR] * len(self.rows))
        prompts = columns["prompt_input_ids"]
        self.better = texts.places(prompts, columns["chosen_input_ids"])
        self.worse = texts.places(prompts, columns["rejected_input_ids"])

    def differences(self, features: Tensor) -> np.ndarray:
        """(N, H) of the better less those of the worse."""
        return (features[self.better] - features[self.worse]).double().numpy()


class Texts:
    """Every answer once, however many pairs it is in."""

    def __init__(self) -> None:
        self.found: dict[tuple[tuple[int, ...], tuple[int, ...]], int] = {}

    def places(self, prompts: list[list[int]], answers: list[list[int]]) -> list[int]:
        keys = ((tuple(prompt), tuple(answer)) for prompt, answer in zip(prompts, answers, strict=True))
        return [self.found.setdefault(key, len(self.found)) for key in keys]

    def lists(self) -> tuple[list[list[int]], list[list[int]]]:
        return [list(prompt) for prompt, _ in self.found], [list(answer) for _, answer in self.found]


def main(base: Base, params: Params, root: Path = Path(".")) -> dict[str, Any]:
    device = pick_device()
    precision = pick_precision(base.precision, device)

    # 1. every text's mean hidden states, at all candidate layers in one pass
    texts = Texts()
    own = [Pairs(texts, columns) for columns in read_own(root)]
    heldout, corrupted = (Pairs(texts, columns) for columns in read_heldout(root))
    model = freeze(load_causal_lm(root / "models/base", device))
    layers = sorted({max(1, round(share * model.config.num_hidden_layers)) for share in params.layers})
    dial = memory_dial(params.micro_batch_tokens, 8192, model, "train_judge")
    prompts, answers = texts.lists()
    features = dial.run(
        answer_means, model, prompts, answers, layers, precision=precision, progress="judge features"
    )

    # 2. layer and strength, by cross-validation over the judge's own prompts
    kinds = np.concatenate([pairs.kinds for pairs in own])
    prompt_ids = np.concatenate([pairs.prompt_ids for pairs in own])
    weights = np.where(kinds == PAIR, PAIR_WEIGHT, 1.0)
    trials = []
    for layer, of_layer in zip(layers, features, strict=True):
        mean, scale = standardisation(of_layer, own)
        differences = np.concatenate([pairs.differences(of_layer) for pairs in own]) / scale
        for strength in params.strengths:
            margins = cross_validated(differences, weights, prompt_ids, strength)
            trials.append({"layer": layer, "strength": strength} | figures(margins, kinds))
    best = min(trials, key=lambda trial: trial["loss"])

    # 3. the judge on all of its pairs
    of_layer = features[layers.index(best["layer"])]
    mean, scale = standardisation(of_layer, own)
    differences = np.concatenate([pairs.differences(of_layer) for pairs in own]) / scale
    weight = fit_judge(differences, best["strength"], weights)
    tensors = (torch.tensor(each, dtype=torch.float32) for each in (mean, scale, weight))
    judge = Judge(best["layer"], best["strength"], *tensors)
    scores = judge.scores(of_layer).double().numpy()

    # 4. held-out pairs, and corrupted copies of their chosen answers
    won = ranked_right(scores[heldout.better], scores[heldout.worse])
    metrics = {
        "pairs": int((kinds == PAIR).sum()),
        "corrupted": int((kinds != PAIR).sum()),
        "layer": best["layer"],
        "strength": best["strength"],
        "cv_accuracy": best["accuracy"],
        "cv_loss": best["loss"],
        "heldout": {"pairs": len(won), "accuracy": float(won.mean())},
        "by_kind": shares_by_kind(scores[corrupted.better], scores[corrupted.worse], corrupted.kinds.tolist()),
        "kinds_never_met": [str(kind) for kind in unique(corrupted.kinds) if kind not in kinds],
    }
    rows = zip(heldout.rows, heldout.prompt_ids, scores[heldout.better], scores[heldout.worse], strict=True)
    names = ("row", "prompt_id", "chosen_score", "rejected_score")
    save_judge(judge, root / "models/judge")
    write_history(root / REPORTS / "cv.csv", round_floats(trials))
    table = [dict(zip(names, (int(row), int(i), float(c), float(r)), strict=True)) for row, i, c, r in rows]
    write_history(root / REPORTS / "heldout_scores.csv", round_floats(table, 8))
    write_json(root / REPORTS / "metrics.json", round_floats(metrics))
    print(f"wrote models/judge: layer {best['layer']}, held-out accuracy {metrics['heldout']['accuracy']:.3f}")
    for line in told_by_kind("judge", metrics["by_kind"]):
        print(line)
    tokens = sum(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    return {"tokens": tokens, "device": device.type, "precision": precision}


def read_own(root: Path) -> Iterator[dict[str, list]]:
    """
    Raises:
        UserError: too few pairs to fit anything on.
    """
    for name in ("pairs", "corrupted", "short"):
        columns = read_parquet(root / f"data/tokenized/judge_{name}.parquet")
        if name == "pairs" and (problem := too_few_for_the_judge(columns["prompt_id"])):
            raise UserError(problem)
        yield columns


def read_heldout(root: Path) -> tuple[dict[str, list], dict[str, list]]:
    """The held-out pairs, and the corrupted copies of their chosen answers, cut at the prompt."""
    pairs = read_parquet(root / "data/tokenized/pairs_heldout.parquet")
    prompts = dict(zip(pairs["row"], pairs["prompt_input_ids"], strict=True))
    copies = read_parquet(root / "data/tokenized/reward_negatives_heldout.parquet")
    copies["prompt_input_ids"] = [prompts[row] for row in copies["row"]]
    for side in ("chosen", "rejected"):
        starts = map(len, copies["prompt_input_ids"])
        copies[f"{side}_input_ids"] = [ids[n:] for ids, n in zip(copies[f"{side}_ids"], starts, strict=True)]
    return pairs, copies


def standardisation(features: Tensor, own: list[Pairs]) -> tuple[np.ndarray, np.ndarray]:
    """(H,) mean and standard deviation over the answers of the judge's own, uncorrupted pairs."""
    answers = features[own[0].better + own[0].worse].double().numpy()
    return answers.mean(0), answers.std(0) + 1e-6


def cross_validated(
    differences: np.ndarray, weights: np.ndarray, groups: np.ndarray, strength: float
) -> np.ndarray:
    """(N,) margins of each pair under a judge that was fitted without its prompt."""
    margins = np.empty(len(differences))
    folds = GroupKFold(min(FOLDS, len(set(groups.tolist()))))
    for train, test in folds.split(differences, groups=groups):
        margins[test] = differences[test] @ fit_judge(differences[train], strength, weights[train])
    return margins


def figures(margins: np.ndarray, kinds: np.ndarray) -> dict[str, float]:
    """Accuracy and loss, each the mean over kinds, so that no kind counts for its number."""
    losses = np.logaddexp(0, -margins)
    right = ranked_right(margins, 0)
    by_kind = [(float(right[kinds == k].mean()), float(losses[kinds == k].mean())) for k in unique(kinds)]
    accuracy, loss = np.mean(by_kind, axis=0).tolist()
    return {"accuracy": accuracy, "loss": loss}


def unique(kinds: np.ndarray) -> list[str]:
    return list(dict.fromkeys(kinds.tolist()))


if __name__ == "__main__":
    run_stage("train_judge", main, Params)
