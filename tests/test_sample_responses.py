"""The stage on tiny models: what it writes, that it repeats, and log-probs that are those of the definition."""

import json
import shutil

import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from stages.lib.model.logps import get_log_prob
from stages.lib.run.artefacts import read_parquet, write_parquet
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base
from stages.sample_responses import FIRST_PROMPT, Params, main
from tests.support import short_of_memory

BASE = Base(seed=7, precision="fp32")
PARAMS = Params(
    max_new_tokens=6, temperature=0.7, opponents=3, best_of_n_prompts=2, gallery_prompts=4, first_max_new_tokens=20
)
PROMPTS = {
    "heldout": [
        "Why | is\nthe sky blue?",
        "Tea or coffee?",
        "<b>Hi</b>",
        "How do I knit?",
        "What is new?",
        FIRST_PROMPT,
    ],
    "eval": ["Do you sing?", "Do you dance?"],
    "judge": ["Who are you?", "Where is it?", "When is it?"],
}
LOOKED_AT = [8, 10]  # of the judge's prompts 8, 9, 10


@pytest.fixture
def root(tiny_base, tiny_model, tokenizer):
    for name in ("dpo", "ppo"):
        with torch.no_grad():
            for parameter in tiny_model.parameters():
                parameter.mul_(1.5)
        tiny_model.save_pretrained(tiny_base / "models" / name)
        tokenizer.save_pretrained(tiny_base / "models" / name)
        write_parquet(tiny_base / f"data/courses/{name}.parquet", {"prompt_id": LOOKED_AT * 2})
    first = 0
    for split, prompts in PROMPTS.items():
        ids = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
            for prompt in prompts
        ]
        columns = {"prompt_id": list(range(first, first + len(prompts))), "prompt": prompts, "input_ids": ids}
        write_parquet(tiny_base / f"data/tokenized/prompts_{split}.parquet", columns)
        first += len(prompts)
    return tiny_base


def written(root):
    names = ("data/answers.parquet", "data/base_answers.parquet")
    names += tuple(f"reports/sample_responses/{name}" for name in ("samples.json", "samples.md", "metrics.json"))
    return {name: (root / name).read_bytes() for name in names}


def test_who_answers_what(root):
    main(BASE, PARAMS, root)
    answers = pd.DataFrame(read_parquet(root / "data/answers.parquet"))
    assert not answers.duplicated(["model", "decoding", "prompt_id"]).any()
    asked = answers.groupby(["model", "decoding", "split"])["prompt_id"].agg(list).to_dict()
    expected = {}
    for model in ("base", "dpo", "ppo"):
        expected |= {(model, decoding, "heldout"): [0, 1, 2, 3, 4, 5] for decoding in ("greedy", "sampled")}
        expected[model, "sampled", "eval"] = [6, 7]
    assert asked == expected
    assert (answers["response_ids"].map(len) <= 6).all()
    several = pd.DataFrame(read_parquet(root / "data/base_answers.parquet"))
    asked = several.groupby(["use", "prompt_id"])["candidate"].agg(list)
    assert asked["best of n"].tolist() == [list(range(17))] * 2
    measured = list(range(8))  # whose answer is itself the first of three
    assert asked["opponent"].to_dict() == {prompt_id: [0, 1] for prompt_id in [*measured, *LOOKED_AT]}
    few = several[several["candidate"] < 2]["response_ids"].map(tuple)
    assert few.nunique() == len(few)  # each has random numbers of its own


def test_models_that_are_alike_answer_alike(root):
    """The same random numbers for all, whatever else the base is asked."""
    for name in ("dpo", "ppo"):
        shutil.copytree(root / "models/base", root / "models" / name, dirs_exist_ok=True)
    main(BASE, PARAMS, root)
    answers = pd.DataFrame(read_parquet(root / "data/answers.parquet"))
    texts = [answers[answers["model"] == name]["text"].tolist() for name in ("base", "dpo", "ppo")]
    assert texts[0] == texts[1] == texts[2] and len(set(texts[0])) > 5
    for sample in json.loads((root / "reports/sample_responses/samples.json").read_text()):
        assert sample["answers"]["base"] == sample["answers"]["dpo"] == sample["answers"]["ppo"]


def test_the_gallery_shows_the_measured_answers_and_the_first_prompt_in_full(root):
    main(BASE, PARAMS, root)
    samples = json.loads((root / "reports/sample_responses/samples.json").read_text())
    assert [sample["prompt"] for sample in samples].count(FIRST_PROMPT) == 1
    assert samples[0]["prompt"] == FIRST_PROMPT and samples[0]["prompt_id"] is None
    assert len(samples) == 1 + PARAMS.gallery_prompts
    answers = pd.DataFrame(read_parquet(root / "data/answers.parquet"))
    texts = answers.set_index(["model", "decoding", "prompt_id"])["text"]
    for sample in samples[1:]:
        for part in ("answers", "ended"):
            assert list(sample[part]) == ["base", "dpo", "ppo"]
        for model, both in sample["answers"].items():
            assert both == {how: texts[model, how, sample["prompt_id"]] for how in ("greedy", "sampled")}
    shown = (root / "reports/sample_responses/samples.md").read_text()
    assert shown.count("\n## ") == 5


def test_the_same_seed_gives_the_same_files(root):
    main(BASE, PARAMS, root)
    first = written(root)
    main(BASE, PARAMS, root)
    assert written(root) == first
    main(Base(seed=8, precision="fp32"), PARAMS, root)
    assert written(root)["data/answers.parquet"] != first["data/answers.parquet"]


def test_out_of_memory_halves_what_is_read_and_changes_no_result(root, monkeypatch, capsys):
    found = []
    for _ in range(2):
        main(BASE, PARAMS, root)
        found.append(pd.DataFrame(read_parquet(root / "data/answers.parquet")))
        short_of_memory.install(monkeypatch)
    pd.testing.assert_frame_equal(found[1], found[0], rtol=1e-4)
    assert "sample_responses: memory ran out: goes on with micro-batches of" in capsys.readouterr().out


def test_log_probs_are_those_of_the_definition_at_the_sampling_temperature(root, tiny_model):
    main(BASE, PARAMS, root)
    answers = pd.DataFrame(read_parquet(root / "data/answers.parquet"))
    prompts = {}
    for split in PROMPTS:
        columns = read_parquet(root / f"data/tokenized/prompts_{split}.parquet")
        prompts |= dict(zip(columns["prompt_id"], columns["input_ids"], strict=True))
    models = {
        name: type(tiny_model).from_pretrained(root / "models" / name).eval() for name in ("base", "dpo", "ppo")
    }
    assert answers.loc[answers["model"] == "base", ["logp", "entropy"]].isna().all(axis=None)
    for row in answers[answers["model"] != "base"].iloc[::5].itertuples():
        prompt, answer = prompts[row.prompt_id], row.response_ids
        ids = torch.tensor([prompt + answer])
        mask = torch.tensor([[0] * len(prompt) + [1] * len(answer)])
        with torch.no_grad():
            logits = models[row.model](ids).logits / 0.7
        assert row.logp == pytest.approx(get_log_prob(logits, ids, mask).item(), rel=1e-4)
        log_probs = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean().item()
        assert row.entropy == pytest.approx(entropy, rel=1e-4)


def test_fewer_held_out_prompts_than_asked_for_are_all_taken(root):
    main(BASE, PARAMS.replace(gallery_prompts=50, best_of_n_prompts=50), root)
    assert len(json.loads((root / "reports/sample_responses/samples.json").read_text())) == len(PROMPTS["heldout"])
    of_base = read_parquet(root / "data/base_answers.parquet")["use"]
    assert of_base.count("best of n") == 17 * len(PROMPTS["heldout"])


def test_no_held_out_prompt_is_an_error(root):
    write_parquet(
        root / "data/tokenized/prompts_heldout.parquet", {"prompt_id": [], "prompt": [], "input_ids": []}
    )
    with pytest.raises(UserError, match="holdout_fraction"):
        main(BASE, PARAMS, root)


def test_a_course_on_other_prompts_is_an_error(root):
    write_parquet(root / "data/courses/ppo.parquet", {"prompt_id": [8, 77]})
    with pytest.raises(UserError, match="prompt 77 is not in data/tokenized/prompts_judge.parquet"):
        main(BASE, PARAMS, root)


@pytest.mark.parametrize(("key", "value"), [("gallery_prompts", 0), ("max_new_tokens", 0), ("temperature", 0.0)])
def test_bad_parameters_are_named(key, value):
    with pytest.raises(ValidationError, match=key):
        PARAMS.replace(**{key: value})
