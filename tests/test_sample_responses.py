"""The stage on tiny models: what it writes, that it repeats, and that its numbers are those of its texts."""

import csv
import json

import pytest
import torch
from pydantic import ValidationError

from stages.lib.analysis.text_features import count_emoji
from stages.lib.model.logps import get_log_prob
from stages.lib.run.artefacts import write_parquet
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base
from stages.sample_responses import FIRST_PROMPT, Params, main

BASE = Base(seed=7, precision="fp32")
PARAMS = Params(num_prompts=4, max_new_tokens=20, gallery_max_new_tokens=6, temperature=0.7, top_p=0.95)
PROMPTS = [
    "Why | is\nthe sky blue?",
    "Tea or coffee?",
    "<b>Hi</b>",
    "How do I knit?",
    "What is new?",
    FIRST_PROMPT,
]


@pytest.fixture
def root(tiny_base, tiny_model, tokenizer):
    for name in ("dpo", "ppo"):
        with torch.no_grad():
            for parameter in tiny_model.parameters():
                parameter.mul_(1.5)
        tiny_model.save_pretrained(tiny_base / "models" / name)
        tokenizer.save_pretrained(tiny_base / "models" / name)
    ids = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
        for prompt in PROMPTS
    ]
    columns = {"prompt_id": list(range(len(PROMPTS))), "prompt": PROMPTS, "input_ids": ids}
    write_parquet(tiny_base / "data/tokenized/prompts_heldout.parquet", columns)
    return tiny_base


def reports(root):
    folder = root / "reports/sample_responses"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_prompt_is_answered_by_every_model_the_fixed_one_first(root):
    facts = main(BASE, PARAMS, root)
    written = reports(root)
    assert set(written) == {"samples.json", "samples.md", "measures.csv", "metrics.json"}
    samples = json.loads(written["samples.json"])
    assert [sample["prompt"] for sample in samples].count(FIRST_PROMPT) == 1
    assert samples[0]["prompt"] == FIRST_PROMPT and samples[0]["prompt_id"] is None
    assert len(samples) == 1 + PARAMS.num_prompts
    for sample in samples:
        for part in ("answers", "ended"):
            assert list(sample[part]) == ["base", "dpo", "ppo"]
            assert all(list(each) == ["greedy", "sampled"] for each in sample[part].values())
    assert facts["tokens"] <= 6 * (20 + 4 * 6)
    assert written["samples.md"].decode().count("\n## ") == 5

    rows = list(csv.DictReader(written["measures.csv"].decode().splitlines()))
    assert len(rows) == 3 * 2 * 8
    greedy = [sample["answers"]["dpo"]["greedy"] for sample in samples[1:]]
    (emoji,) = [
        row for row in rows if (row["model"], row["decoding"], row["measure"]) == ("dpo", "greedy", "emoji")
    ]
    assert float(emoji["mean"]) == sum(map(count_emoji, greedy)) / 4


def test_the_same_seed_gives_the_same_files(root):
    main(BASE, PARAMS, root)
    first = reports(root)
    main(BASE, PARAMS, root)
    assert reports(root) == first
    main(Base(seed=8, precision="fp32"), PARAMS, root)
    assert reports(root)["samples.json"] != first["samples.json"]


def test_log_prob_under_base_is_that_of_the_definition(root, tiny_model, tokenizer, monkeypatch):
    import stages.sample_responses as stage

    seen = {}

    def spy(model, prompts, completions, *args):
        seen["prompts"], seen["completions"] = prompts, completions
        seen["logps"] = real(model, prompts, completions, *args)
        return seen["logps"]

    real = stage.completion_logps
    monkeypatch.setattr(stage, "completion_logps", spy)
    main(BASE, PARAMS, root)
    base = type(tiny_model).from_pretrained(root / "models/base").eval()
    for i in (0, 7, 29):
        prompt, answer = seen["prompts"][i], seen["completions"][i]
        ids = torch.tensor([prompt + answer])
        mask = torch.tensor([[0] * len(prompt) + [1] * len(answer)])
        with torch.no_grad():
            expected = get_log_prob(base(ids).logits, ids, mask)
        assert seen["logps"][i].item() == pytest.approx(expected.item(), rel=1e-4)


def test_fewer_held_out_prompts_than_asked_for_are_all_taken(root):
    main(BASE, PARAMS.replace(num_prompts=50, max_new_tokens=4, gallery_max_new_tokens=3), root)
    assert len(json.loads(reports(root)["samples.json"])) == len(PROMPTS)


def test_no_held_out_prompt_is_an_error(root):
    columns = {"prompt_id": [1], "prompt": [FIRST_PROMPT], "input_ids": [[1, 2]]}
    write_parquet(root / "data/tokenized/prompts_heldout.parquet", columns)
    with pytest.raises(UserError, match="holdout_fraction"):
        main(BASE, PARAMS, root)


@pytest.mark.parametrize(
    ("key", "value"), [("num_prompts", 0), ("max_new_tokens", 0), ("temperature", 0.0), ("top_p", 1.5)]
)
def test_bad_parameters_are_named(key, value):
    with pytest.raises(ValidationError, match=key):
        PARAMS.replace(**{key: value})
