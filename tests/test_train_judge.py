"""The judge on the tiny model: what it learns, chooses, writes and refuses."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from stages.lib.data.chat import apply_chat_template, to_implicit_prompt_preferences, tokenize_row
from stages.lib.model.answer_means import answer_means
from stages.lib.model.judge import load_judge
from stages.lib.model.loading import load_causal_lm
from stages.lib.run.artefacts import read_parquet, write_parquet
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, load_params
from stages.train_judge import Params, cross_validated, figures, main
from tests.conftest import REPO
from tests.support import short_of_memory
from tests.support.corrupted_tables import IDS, spoilt, write_reward_negatives

BASE = Base(seed=42, precision="fp32")
PARAMS = Params(layers=[0.5, 1.0], strengths=[0.01, 1.0], micro_batch_tokens=2000)


def pair_table(rows, tokenizer, first: int) -> dict:
    ids = [
        tokenize_row(apply_chat_template(to_implicit_prompt_preferences(row), tokenizer), tokenizer)
        for row in rows
    ]
    numbers = {"row": list(range(first, first + len(rows))), "prompt_id": list(range(first, first + len(rows)))}
    return numbers | {name: [row[name] for row in ids] for name in ids[0]}


def write(path, columns) -> None:
    import pyarrow as pa

    write_parquet(path, {n: pa.array(v, IDS) if n.endswith("ids") else v for n, v in columns.items()})


@pytest.fixture
def root(tiny_base, tokenizer, embedded_pairs, monkeypatch):
    """40 pairs of the judge's with corrupted copies, 8 held out with theirs."""
    monkeypatch.setenv("DEVICE", "cpu")
    folder = tiny_base / "data/tokenized"
    own = pair_table(embedded_pairs[:40], tokenizer, 0)
    write(folder / "judge_pairs.parquet", own)
    for name, kind in (("corrupted", "shuffle"), ("short", "short_chosen")):
        copies = own | {
            "kind": [kind] * 40,
            "rejected_input_ids": [spoilt(ids, False) for ids in own["chosen_input_ids"]],
        }
        write(folder / f"judge_{name}.parquet", copies)
    heldout = pair_table(embedded_pairs[40:48], tokenizer, 40)
    write(folder / "pairs_heldout.parquet", heldout)
    for split, table in (("train", own), ("heldout", heldout)):
        whole = {name: table[name] for name in ("row", "prompt_id")}
        for side in ("chosen", "rejected"):
            answers = zip(table["prompt_input_ids"], table[f"{side}_input_ids"], strict=True)
            whole[f"{side}_ids"] = [prompt + answer[:-1] for prompt, answer in answers]
        write(folder / f"reward_{split}.parquet", whole)
    write_reward_negatives(tiny_base)
    return tiny_base


def metrics_of(root) -> dict:
    return json.loads((root / "reports/train_judge/metrics.json").read_text())


def test_the_judge_that_is_written_gives_the_scores_that_are_reported(root):
    facts = main(BASE, PARAMS, root)
    judge = load_judge(root / "models/judge")
    pairs = read_parquet(root / "data/tokenized/pairs_heldout.parquet")
    scores = pd.read_csv(root / "reports/train_judge/heldout_scores.csv")
    model = load_causal_lm(root / "models/base")
    for side in ("chosen", "rejected"):
        texts = pairs["prompt_input_ids"], pairs[f"{side}_input_ids"]
        expected = judge.scores(answer_means(model, *texts, [judge.layer], 10_000, "fp32")[0])
        assert scores[f"{side}_score"].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    metrics = metrics_of(root)
    assert metrics["heldout"]["accuracy"] == pytest.approx((scores.chosen_score > scores.rejected_score).mean())
    assert metrics["heldout"]["pairs"] == 8 and metrics["pairs"] == 40 and metrics["corrupted"] == 80
    assert set(metrics["by_kind"]) == {"loop", "shuffle"} and metrics["kinds_never_met"] == ["loop"]
    assert not [path for path in (root / "models/judge").iterdir() if path.suffix not in (".json", ".safetensors")]
    assert facts["tokens"] > 0


def test_layer_and_strength_are_the_best_of_all_that_were_tried(root):
    main(BASE, PARAMS, root)
    trials = pd.read_csv(root / "reports/train_judge/cv.csv")
    assert sorted(set(trials["layer"])) == [1, 2] and len(trials) == 4
    best = trials.loc[trials["loss"].idxmin()]
    metrics = metrics_of(root)
    assert (metrics["layer"], metrics["strength"]) == (best["layer"], best["strength"])
    assert metrics["cv_accuracy"] > 0.6  # emoji and question marks are there to be seen


def test_the_same_run_gives_the_same_bytes(root):
    runs = []
    for _ in range(2):
        main(BASE, PARAMS, root)
        runs.append([path.read_bytes() for path in sorted((root / "models/judge").iterdir())])
    assert runs[0] == runs[1]


def test_out_of_memory_halves_the_dial_and_changes_no_result(root, monkeypatch, capsys):
    main(BASE, PARAMS, root)
    expected = pd.read_csv(root / "reports/train_judge/heldout_scores.csv")
    short_of_memory.install(monkeypatch)
    main(BASE, PARAMS, root)
    scores = pd.read_csv(root / "reports/train_judge/heldout_scores.csv")
    pd.testing.assert_frame_equal(scores, expected, atol=1e-3)
    assert "train_judge: memory ran out: goes on with micro-batches of" in capsys.readouterr().out


def test_no_margin_is_of_a_judge_that_saw_the_prompt():
    # two pairs of one prompt point in opposite directions: a judge that saw the other would rank it right
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(20, 50))
    differences = np.concatenate([noise, noise])
    groups = np.tile(np.arange(20), 2)
    margins = cross_validated(differences, np.ones(40), groups, 1.0)
    assert (margins > 0).mean() < 0.8  # of pure noise; seen, it would be 1


def test_every_kind_counts_alike():
    kinds = np.array(["pair"] * 9 + ["loop"])
    found = figures(np.array([1.0] * 9 + [-1.0]), kinds)
    assert found["accuracy"] == 0.5
    assert figures(np.array([1.0] * 9 + [0.0]), kinds)["accuracy"] == 0.75  # a tie counts half
    assert found["loss"] == pytest.approx((np.log1p(np.exp(-1)) + np.log1p(np.exp(1))) / 2)


def test_too_few_pairs_are_an_error_that_names_the_remedy(root):
    columns = read_parquet(root / "data/tokenized/judge_pairs.parquet")
    write(root / "data/tokenized/judge_pairs.parquet", {name: values[:5] for name, values in columns.items()})
    with pytest.raises(UserError, match="5 pairs over .*train_judge needs at least 10.*judge_fraction"):
        main(BASE, PARAMS, root)


def test_committed_params_are_valid():
    assert load_params("train_judge", Params, REPO).layers


def test_scores_are_linear_in_standardised_features():
    from stages.lib.model.judge import Judge

    judge = Judge(1, 1.0, torch.tensor([1.0, 0.0]), torch.tensor([2.0, 1.0]), torch.tensor([3.0, -1.0]))
    assert judge.scores(torch.tensor([[3.0, 5.0], [1.0, 0.0]])).tolist() == [-2.0, 0.0]  # 3 * 1 - 5; the mean


@pytest.mark.parametrize("change", [{"layers": [1.5]}, {"layers": []}, {"layers": [-0.1]}, {"strengths": [0.0]}])
def test_senseless_candidates_are_refused(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        PARAMS.replace(**change)
