"""The stage on tiny models: log-probs by definition, what is reused, what is written, and that it repeats."""

import json
import shutil

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pydantic import ValidationError

import stages.analyze_logps as stage
from stages.analyze_logps import Params, main
from stages.lib.data.chat import render_completion, text_ids
from stages.lib.data.reference import fingerprint, write_reference_logps
from stages.lib.data.token_tables import token_ids
from stages.lib.model.logps import completion_logps, get_log_prob
from stages.lib.run.artefacts import write_parquet
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base
from tests.conftest import TINY
from tests.support import short_of_memory

BASE = Base(seed=3, precision="fp32")
PARAMS = Params(
    max_train_pairs=10, max_unseen_texts=4, micro_batch_tokens=2048, bootstrap_samples=50, confidence=0.9
)
SIZES = {"train": 14, "heldout": 6}
MET = [1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13, 14]  # of the training pairs, by DPO


@pytest.fixture(scope="module")
def prepared(tokenizer, embedded_pairs, tmp_path_factory):
    """A project root as the earlier stages leave it; DPO and PPO are the tiny base, disturbed."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    root = tmp_path_factory.mktemp("root")
    torch.manual_seed(0)
    config = LlamaConfig(**TINY)
    model = AutoModelForCausalLM.from_config(config).eval()
    for name in ("base", "dpo", "ppo"):
        model.save_pretrained(root / "models" / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    tokenizer.save_pretrained(root / "models/base")
    base = AutoModelForCausalLM.from_pretrained(root / "models/base").eval()

    logps, first = {}, 0
    for split, size in SIZES.items():
        rows = embedded_pairs[first : first + size]
        numbers = list(range(first + 1, first + size + 1))
        first += size
        ids = [token_ids({"row": 0} | row, tokenizer) for row in rows]
        keys = {"row": numbers, "prompt_id": [n + 100 for n in numbers]}
        tokens = {name: [each[name] for each in ids] for name in ids[0]}
        write_parquet(root / f"data/tokenized/pairs_{split}.parquet", keys | tokens)
        words = {name: [row[name] for row in rows] for name in ("prompt", "chosen", "rejected")}
        write_parquet(root / f"data/pairs/{split}.parquet", keys | words)
        logps[split] = dict(keys)
        for side in ("chosen", "rejected"):
            summed = completion_logps(base, tokens["prompt_input_ids"], tokens[f"{side}_input_ids"], 2048, "fp32")
            logps[split][f"{side}_logps"] = summed.tolist()
    write_parquet(root / "data/tokenized/pairs_negatives.parquet", {"row": [1], "kind": ["loop"]})  # not read here
    write_reference_logps(root, logps, fingerprint(root, "fp32"))
    write_parquet(root / "data/dpo_pairs.parquet", {"row": MET})

    unseen = [
        render_completion(
            [{"role": "user", "content": f"Question {i}?"}],
            [{"role": "assistant", "content": f"Plain answer number {i * i}."}],
            tokenizer,
            "unseen",
        )
        for i in range(5)
    ]
    columns = {
        "row": [1, 2, 3, 4, 5],
        "prompt_input_ids": [text_ids(prompt, tokenizer) for prompt, _ in unseen],
        "response_input_ids": [text_ids(response, tokenizer) for _, response in unseen],
    }
    write_parquet(root / "data/tokenized/unseen.parquet", columns)

    rng = np.random.default_rng(0)
    steps = {"step": [1, 2, 3], "rewards/margins": [0.1, 2.0, 3.0], "rewards/accuracies": [0.5, 0.9, 1.0]}
    tables = {
        "train_dpo/history.csv": steps,
        "train_dpo/heldout.csv": steps,
        "train_reward/heldout_scores.csv": {
            "row": list(range(15, 21)),
            "prompt_id": list(range(115, 121)),
            "chosen_score": rng.normal(1, 1, 6),
            "rejected_score": rng.normal(0, 1, 6),
        },
        "train_ppo/history.csv": {
            "episode": [16, 32],
            "objective/kl": [0.0, 0.3],
            "objective/raw_scores": [-1.0, 0.5],
        },
    }
    for path, table in tables.items():
        (root / "reports" / path).parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(table).to_csv(root / "reports" / path, index=False)
    return root


def reports(root):
    return {path.name: path.read_bytes() for path in (root / "reports/analyze_logps").iterdir()}


def test_the_stage_writes_what_it_promises_and_the_same_bytes_again(prepared):
    main(BASE, PARAMS, prepared)
    first = reports(prepared)
    pictures = {"densities", "ecdf", "displacement", "rankers", "margins"}
    curves = {"quantiles", "displacement", "rankers"}
    expected = {"logps.parquet", "metrics.json", "answer.md"}
    assert set(first) == expected | {f"{name}.png" for name in pictures} | {f"{name}.csv" for name in curves}
    assert all(first[f"{name}.png"].startswith(b"\x89PNG") for name in pictures)

    metrics = json.loads(first["metrics.json"])
    counts = {"train_pairs": 10, "heldout_pairs": 6, "unseen_texts": 4}
    assert {name: metrics[name] for name in counts} == counts
    for name in ("auc_heldout", "auc_unseen", "did", "auc_change", "displaced_train", "rewards/accuracies"):
        estimate = metrics["dpo"]
        assert estimate[f"{name}_low"] <= estimate[name] <= estimate[f"{name}_high"]
    assert "90 %" in first["answer.md"].decode()

    main(BASE, PARAMS, prepared)
    assert reports(prepared) == first


def test_out_of_memory_halves_the_dial_and_changes_no_result(prepared, monkeypatch, capsys):
    found = []
    for _ in range(2):
        main(BASE, PARAMS.replace(micro_batch_tokens=4000), prepared)
        found.append(pd.read_parquet(prepared / "reports/analyze_logps/logps.parquet"))
        short_of_memory.install(monkeypatch)
    pd.testing.assert_frame_equal(found[1], found[0], rtol=1e-4)
    assert "analyze_logps: memory ran out: goes on with micro-batches of" in capsys.readouterr().out


def test_log_probs_are_those_of_the_definition_for_every_model(prepared):
    from transformers import AutoModelForCausalLM

    main(BASE, PARAMS, prepared)
    logps = pq.read_table(prepared / "reports/analyze_logps/logps.parquet").to_pandas()
    assert len(logps) == 3 * (2 * 10 + 2 * 6 + 4)
    assert logps["prompt_id"].isna().equals(logps["group"] == "unseen")
    heldout = pq.read_table(prepared / "data/tokenized/pairs_heldout.parquet").to_pydict()
    for name in ("base", "dpo", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(prepared / "models" / name).eval()
        prompt, completion = heldout["prompt_input_ids"][2], heldout["rejected_input_ids"][2]
        ids = torch.tensor([prompt + completion])
        mask = torch.tensor([[0] * len(prompt) + [1] * len(completion)])
        with torch.no_grad():
            expected = get_log_prob(model(ids).logits, ids, mask).item()
        where = (logps["model"] == name) & (logps["group"] == "heldout_rejected") & (logps["row"] == 17)
        (found,) = logps[where].to_dict("records")
        assert found["logp"] == pytest.approx(expected, rel=1e-4)
        assert found["tokens"] == len(completion)
        assert found["logp_per_token"] == pytest.approx(expected / len(completion), rel=1e-4)


def test_base_is_run_on_the_unseen_texts_alone(prepared, monkeypatch):
    seen = []

    def spy(model, prompts, completions, **how):
        seen.append(len(prompts))
        return completion_logps(model, prompts, completions, **how)

    monkeypatch.setattr(stage, "completion_logps", spy)
    main(BASE, PARAMS, prepared)
    assert seen == [4, 36, 36]


def test_training_pairs_and_unseen_texts_are_drawn_by_seed(prepared):
    def rows(group, seed, count):
        texts = stage.collect_texts(prepared, MET, count, count, seed)
        return texts[texts["group"] == group]["row"].tolist()

    for group, all_of_them in (("train_chosen", MET), ("unseen", [1, 2, 3, 4, 5])):
        assert rows(group, 1, 3) == rows(group, 1, 3) != rows(group, 2, 3)
        assert rows(group, 1, None) == rows(group, 1, 99) == all_of_them


def test_training_pairs_are_those_that_dpo_was_trained_on(prepared, tmp_path):
    """A run that `max_steps` ends early met only some of them, and the others are no training data."""
    main(BASE, PARAMS.replace(max_train_pairs=None), prepared)
    logps = pd.read_parquet(prepared / "reports/analyze_logps/logps.parquet")
    assert sorted(logps.loc[logps["group"] == "train_chosen", "row"].unique()) == MET
    assert "Measured on 12 of the 12 pairs that DPO was trained on" in (
        prepared / "reports/analyze_logps/answer.md"
    ).read_text(encoding="utf-8")
    root = tmp_path / "root"
    shutil.copytree(prepared, root)
    write_parquet(root / "data/dpo_pairs.parquet", {"row": pa.array([], pa.int64())})
    with pytest.raises(UserError, match="DPO met no pair itself.*raise train_dpo.max_steps"):
        main(BASE, PARAMS, root)


def test_log_probs_of_another_base_are_refused(prepared):
    path = prepared / "models/base/config.json"
    before = path.read_text()
    path.write_text(before + " ")
    try:
        with pytest.raises(UserError, match="reference_logps"):
            main(BASE, PARAMS, prepared)
    finally:
        path.write_text(before)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_train_pairs", 0),
        ("max_unseen_texts", 0),
        ("micro_batch_tokens", 0),
        ("bootstrap_samples", 0),
        ("confidence", 1.0),
    ],
)
def test_bad_parameters_are_named(key, value):
    with pytest.raises(ValidationError, match=key):
        PARAMS.replace(**{key: value})
