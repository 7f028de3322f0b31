"""Cards rendered from fixture reports: metadata the Hub takes, numbers from the reports, hostile text held off."""

import dataclasses
import json
import re

import pandas as pd
import pytest
from markdown_it import MarkdownIt

from stages.lib.hub import cards
from stages.lib.hub.card_facts import CardError, Facts, read_answers, read_example, read_hashes, read_runs
from stages.lib.hub.cards import PICTURES, render_card, render_run
from stages.lib.report.files import ReportFiles
from stages.lib.run.artefacts import read_json, read_parquet, write_json, write_parquet
from stages.lib.run.errors import UserError
from stages.lib.run.params import read_params
from tests.conftest import REPO
from tests.report.test_untrusted_text import HOSTILE, Page
from tests.support.card_rules import card_errors, metadata_of
from tests.support.reported_project import FIRST_PROMPT, PPO_ANSWER, make_reports, run_record
from tests.support.without_intervals import CLAIMS, drop_intervals

KINDS = ("dpo", "reward", "ppo")
KNOWN = {"HuggingFaceTB/SmolLM2-135M-Instruct"}
SHA256 = "12" * 32
MARKDOWN = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])


@pytest.fixture
def root(tmp_path, embedded_pairs):
    make_reports(tmp_path, embedded_pairs[:12])
    return tmp_path


def facts_of(root, **changes) -> Facts:
    reports = ReportFiles(root)
    facts = Facts(
        owner="tester",
        name="course",
        license="apache-2.0",
        language="en",
        private={"dpo": True, "reward": True, "ppo": False},
        show_private_texts=False,
        adapters=dict.fromkeys(KINDS),
        seed=42,
        params=read_params(REPO),
        reports=reports,
        samples=read_answers(root, reports, 3),
        example=read_example(root, reports),
        hashes={"data/pairs": "0123.dir", "models/base": "4567.dir"},
    )
    return dataclasses.replace(facts, **changes)


def edit(root, stage: str, **values) -> None:
    path = root / f"reports/{stage}/metrics.json"
    write_json(path, read_json(path) | values)


def section(card: str, title: str) -> str:
    return card.split(f"## {title}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_takes_the_card(root, kind):
    card = render_card(kind, facts_of(root), SHA256)
    assert card_errors(card, KNOWN) == []
    data = metadata_of(card)
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["base_model_relation"] == "finetune"
    assert "datasets" not in data  # a local file is no data set on the Hub
    assert data["pipeline_tag"] == ("text-classification" if kind == "reward" else "text-generation")
    assert "nan" not in card.lower().split()


def test_the_widget_asks_in_the_prompts_own_messages_and_leaves_out_tools(root):
    path = root / "data/pairs/heldout.parquet"
    rows = read_parquet(path)
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "How are you?")]
    talk = [{"role": role, "content": content} for role, content in turns]
    call = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]},
    ]
    messages = [json.dumps(talk), json.dumps(call), *[None] * (len(rows["row"]) - 2)]
    write_parquet(path, rows | {"messages": messages, "tools": [None] * len(messages)})
    asked = [example["messages"] for example in metadata_of(render_card("dpo", facts_of(root), SHA256))["widget"]]
    assert asked == [[{"role": "user", "content": FIRST_PROMPT}], talk]


@pytest.mark.parametrize(
    ("backbone", "words"),
    [
        ("frozen", "The base model is frozen; only the linear layer is trained, without a bias, for 16 epochs"),
        ("lora", "is trained with low-rank adapters ([LoRA](https://arxiv.org/abs/2106.09685)) of rank 8 beside"),
        ("full", "is trained with all weights of the base, for 16 epochs"),
    ],
)
def test_the_reward_models_card_says_what_was_trained(root, backbone, words):
    params = read_params(REPO)
    params["lora"]["rank"] = 8
    params["train_reward"] |= {"backbone": backbone, "center_rewards_coefficient": 0.01}
    card = render_card("reward", facts_of(root, params=params), SHA256)
    method = section(card, "Training")
    assert words in method and "with weight 0.01, to keep scores about zero" in method
    assert ("(the layer) and 0.0001 (the rest)" in method) == (backbone != "frozen")
    assert ("on a frozen model" in section(card, "Limitations and intended use")) == (backbone == "frozen")
    assert ("rank: 8" in method) == (backbone == "lora")


def test_ppos_card_says_what_was_trained(root):
    params = read_params(REPO)
    params["lora"]["rank"] = 8
    method = section(render_card("ppo", facts_of(root, params=params), SHA256), "Training")
    assert (
        "low-rank adapters ([LoRA](https://arxiv.org/abs/2106.09685)) of rank 8 beside it were trained" in method
    )
    assert "adapters" not in section(render_card("ppo", facts_of(root), SHA256), "Training")


def test_the_model_index_holds_the_measured_numbers(root):
    results = {kind: metadata_of(render_card(kind, facts_of(root), SHA256))["model-index"][0] for kind in KINDS}
    assert [entry["name"] for entry in results.values()] == ["course-dpo", "course-reward-model", "course-ppo"]
    values = {
        kind: {metric["type"]: metric["value"] for metric in entry["results"][0]["metrics"]}
        for kind, entry in results.items()
    }
    assert values == {
        "dpo": {
            "accuracy": 0.9706,
            "reward-margin": 18.7,
            "win-rate": 0.61,
            "reward-model-score": 0.21,
            "reward-model-score-gain": 0.63,
            "kl": 7.3,
        },
        "reward": {"accuracy": 0.9412, "score-margin": 4.2},
        "ppo": {"win-rate": 0.55, "reward-model-score": 0.37, "reward-model-score-gain": 0.79, "kl": 1.9},
    }
    dataset = results["dpo"]["results"][0]["dataset"]
    assert dataset == {
        "type": "pairs_embedded.jsonl",
        "name": "pairs_embedded.jsonl, held-out prompts",
        "split": "heldout",
    }


def test_a_data_set_and_a_base_model_are_named_only_where_the_hub_has_them(root):
    edit(root, "fetch_pairs", source="HumanLLMs/Human-Like-DPO-Dataset", revision="c0ffee", license="llama3")
    edit(root, "fetch_base", hub_id=None, license=None)
    card = render_card("dpo", facts_of(root), SHA256)
    data = metadata_of(card)
    assert data["datasets"] == ["HumanLLMs/Human-Like-DPO-Dataset"]
    assert "base_model" not in data and "base_model_relation" not in data
    assert card_errors(card, KNOWN) == []
    assert "The preference pairs are under llama3." in card
    edit(root, "fetch_base", hub_id="/home/me/models/mine")
    assert "base_model" not in metadata_of(render_card("dpo", facts_of(root), SHA256))


def test_the_embedded_pairs_are_under_this_projects_licence_and_a_file_of_ones_own_under_none_stated(root):
    card = render_card("reward", facts_of(root), SHA256)
    assert "| licence of the data | mit |" in card and "The preference pairs are under mit." in card
    edit(root, "fetch_pairs", sha256="cd" * 32)
    card = render_card("reward", facts_of(root), SHA256)
    assert "licence of the data" not in card and "The preference pairs are under" not in card


@pytest.mark.parametrize(
    ("spoilt", "complaint"),
    [
        (("license: apache-2.0", "license: apache"), "license: 'apache'"),
        (("language: en", "language: english"), "language: 'english'"),
        (
            ("base_model: HuggingFaceTB/SmolLM2-135M-Instruct", "base_model: models/dpo"),
            "does not exist on the Hub",
        ),
        (("value: 18.7", "value: .nan"), "is no JSON number"),
        (("library_name: transformers", "library_name: transformers\nlibrary_name: x"), "duplicated mapping key"),
        (("    dataset:\n      type: pairs_embedded.jsonl\n", "    dataset:\n"), "dataset.type is missing"),
    ],
)
def test_the_rules_catch_what_passes_offline_and_fails_online(root, spoilt, complaint):
    card = render_card("dpo", facts_of(root), SHA256)
    assert spoilt[0] in card
    assert any(complaint in error for error in card_errors(card.replace(*spoilt), KNOWN))


def test_the_licences_offered_are_on_the_hubs_list():
    from tests.support.card_rules import LICENSES

    assert cards.LICENSES == LICENSES - {"other"}


def texts_shown(root, card: str, pairs: list[dict]) -> set[str]:
    """The prompts and answers of the data that stand on a card, however escaped."""
    shown = re.sub(r"\\W|\s", "", card)
    return {
        text
        for pair in pairs
        for text in pair.values()
        if re.sub(r"\W|\s", "", text)[:40] in re.sub(r"\W", "", shown)
    }


OWN_DATA = {
    "a file of one's own": ({"sha256": "cd" * 32}, False),
    "the embedded pairs": ({}, True),
    "a set on the Hub": ({"sha256": "cd" * 32, "revision": "c0ffee", "public": True}, True),
    "a private or gated one": ({"sha256": "cd" * 32, "revision": "c0ffee", "public": False}, False),
    "one that nobody could ask for": ({"sha256": "cd" * 32, "revision": "c0ffee", "public": None}, False),
}


@pytest.mark.parametrize("data", OWN_DATA)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_of_private_data_go_into_a_public_card_only_by_choice(root, embedded_pairs, kind, data):
    changes, everyone_may_read = OWN_DATA[data]
    edit(root, "fetch_pairs", **changes)
    heldout = [{name: pair[name] for name in ("prompt", "chosen", "rejected")} for pair in embedded_pairs[:12]]
    public, private = dict.fromkeys(KINDS, False), dict.fromkeys(KINDS, True)
    for settings, expected in (
        ({"private": public}, everyone_may_read),
        ({"private": private}, True),
        ({"private": public, "show_private_texts": True}, True),
    ):
        card = render_card(kind, facts_of(root, **settings), SHA256)
        assert bool(texts_shown(root, card, heldout)) == expected
        assert card_errors(card, KNOWN) == []
        assert kind == "reward" or "morning routine" in section(card, "Before and after")
        assert ("not public" in card) == (not expected and kind != "reward")
        assert kind != "reward" or ("example.json" in card) == expected


def test_the_dpo_card_quotes_what_was_measured(root):
    card = render_card("dpo", facts_of(root), SHA256)
    lead, results = card.split("## Use")[0], section(card, "Results")
    assert "after 19 steps of Direct Preference Optimization" in lead and "on 150 of 300 preference pairs" in lead
    assert "in 97 % [92, 100]" in lead
    assert "the best (question marks) is right for 100 % [95, 100]" in lead
    rows = [line for line in results.splitlines() if line.startswith("|")]
    assert rows[2].startswith("| Preferred to the base’s by the judge |")  # the scorecard comes first
    honest = rows.index("| question marks | 100 % [95, 100] |")  # then the rankers, the baseline before the model
    assert rows[honest + 1] == "| **DPO's implicit reward** | 97 % [92, 100] |"
    assert "| loss | 0.693 | 0.123 |" in rows
    assert "pairs those 12 over 12 prompts, that no training saw" in results
    assert "**DPO.** It does." in results
    assert "β = 0.1" in section(card, "Training")
    (learning_rate,) = re.findall(r"^  learning_rate: (\S+)$", section(card, "Training"), re.MULTILINE)
    assert float(learning_rate) == read_params(REPO)["train_dpo"]["learning_rate"] and "." in learning_rate
    assert f"SHA-256 {SHA256}" in section(card, "Provenance")
    assert "| data/pairs | MD5 0123.dir (dvc.lock) |" in section(card, "Provenance")
    for picture in PICTURES["dpo"]:
        assert f"](pictures/{picture.file})" in results


def test_the_reward_card_quotes_what_was_measured(root):
    facts = facts_of(root)
    card = render_card("reward", facts, SHA256)
    assert "It orders 94 % [89, 99] of 12 pairs" in card.split("## Use")[0]
    assert "| rank correlation of score and length | +0.58 [+0.53, +0.63] |" in section(card, "Results")
    assert f"It prints about {facts.example['chosen_score']:.2f} for the chosen" in section(card, "Use")
    assert "152 steps in all" in section(card, "Training")


def test_the_reward_card_says_which_corruptions_it_does_not_see_through(root):
    results = section(render_card("reward", facts_of(root), SHA256), "Results").replace("\N{NO-BREAK SPACE}", " ")
    assert "| a few words looped to the end | 34 | 97 % [85, 99] | 100 % [90, 100] |" in results
    spliced = "the second half from another prompt’s answer"
    assert f"| {spliced} | 34 | 18 % [8, 34]* | 82 % [66, 92] |" in results
    assert f"The reward model prefers these to the better answer: {spliced} (18 % [8, 34])." in results
    assert "The judge does not clearly prefer the better answer to these: a good answer to another" in results


def test_the_ppo_card_quotes_what_was_measured(root):
    card = render_card("ppo", facts_of(root), SHA256)
    assert "is 0.37, the base's −0.42: a change of +0.79 [+0.73, +0.85]." in card.split("## Use")[0]
    assert "| KL to the base (nats per answer) | 0.0 [0.0, 0.0] | **7.3 [" in section(card, "Results")
    (ended,) = [line for line in section(card, "Results").splitlines() if line.startswith("| Ended by itself |")]
    assert "**47" in ended and "[40, 54]**" in ended  # clearly more than the base's 34 %
    assert PPO_ANSWER in section(card, "Before and after")
    assert "12 updates of 8 prompts each, 8 answers to a prompt, of at most 128 tokens" in section(
        card, "Training"
    )


def test_no_clear_difference_is_said_to_be_none(root):
    path = root / "reports/score_responses/scorecard.csv"
    table = pd.read_csv(path)
    row = (table["model"] == "ppo") & (table["measure"] == "score")
    table.loc[row, ["change", "change_low", "change_high"]] = [0.1, -0.2, 0.4]
    table.to_csv(path, index=False)
    card = render_card("ppo", facts_of(root), SHA256)
    assert "+0.10 [−0.20, +0.40], which is no clear difference" in card.split("## Use")[0]


def test_the_verdict_comes_first(root):
    better = "**Verdict: better**: the judge prefers its answers to the base's in 61 % [55, 67]; KL 7.3."
    assert body_of(render_card("dpo", facts_of(root), SHA256))[1] == better
    reasons = ["greedy answers loop (rep-4 0.61, the base's 0.19)", "6.30 emoji an answer"]
    verdicts = {model: {"word": "broken", "reasons": reasons} for model in ("dpo", "ppo")}
    write_json(root / "reports/score_responses/verdicts.json", verdicts)
    for kind in ("dpo", "ppo"):
        first = body_of(render_card(kind, facts_of(root), SHA256))[1]
        assert first == f"**This model is broken**: {reasons[0]}; {reasons[1]}."


def body_of(card: str) -> list[str]:
    """The paragraphs below the YAML block, the heading first."""
    return card.split("---\n", 2)[2].strip().split("\n\n")


@pytest.mark.parametrize(
    ("ranker", "verdict"),
    [
        ({"emoji": 0.98, "emoji_low": 0.9, "emoji_high": 1.0}, "learnt a style and nothing else"),
        ({"emoji": 0.95, "emoji_low": 0.9, "emoji_high": 0.98}, "learnt a style and little else"),
        ({"emoji": 0.95, "emoji_low": None, "emoji_high": None}, "learnt more than a style is not known"),
        ({"emoji": 0.60, "emoji_low": 0.5, "emoji_high": 0.7}, "learnt more than one surface feature"),
    ],
)
def test_the_shortcut_finding_follows_the_numbers(root, ranker, verdict):
    edit(root, "analyze_logps", rankers=ranker)
    assert verdict in section(render_card("dpo", facts_of(root), SHA256), "Limitations and intended use")


def test_other_trainings_are_described_as_what_they_are(root):
    params = read_params(REPO)
    params["train_dpo"] |= {"loss": "ipo", "label_smoothing": 0.0, "sft_coef": 0.5, "epochs": 3}
    params["train_ppo"] |= {"policy": "dpo", "look_every": 0, "num_ppo_epochs": 1}
    edit(root, "train_ppo", stopped_early="KL of 60 nats")
    dpo = render_card("dpo", facts_of(root, params=params), SHA256)
    assert "after 19 steps of Identity Preference Optimization ([IPO](https://arxiv.org/abs/2310.12036))" in dpo
    assert "1 / (2β) )²" in dpo and "with weight 0.5" in dpo
    ppo = render_card("ppo", facts_of(root, params=params), SHA256)
    assert "It starts from the DPO model" in ppo and "before, after DPO" in ppo
    assert "1 pass over" in ppo and "was kept" not in ppo
    assert "Training stopped early: KL of 60 nats." in ppo
    params["train_dpo"] |= {"loss": "sigmoid", "label_smoothing": 0.1}
    assert "A share of 0.1 of the preferences is assumed to be flipped" in render_card(
        "dpo", facts_of(root, params=params), SHA256
    )


QUOTED = [
    ("dpo", "train_dpo", ("steps",)),
    ("dpo", "train_dpo", ("heldout", "loss")),
    ("dpo", "fetch_pairs", ("train_pairs",)),
    ("dpo", "fetch_base", ("parameters",)),
    ("dpo", "analyze_logps", ("dpo", "rewards/accuracies")),
    ("dpo", "analyze_logps", ("rankers",)),
    ("reward", "train_reward", ("heldout", "margin")),
    ("reward", "analyze_logps", ("reward_model", "length_correlation")),
    ("ppo", "train_ppo", ("updates",)),
    ("ppo", "score_responses", ("prompts",)),
]


ESTIMATES = [("dpo", "rewards/accuracies"), ("reward_model", "length_correlation")]
ABSENT = [(*quoted, "missing") for quoted in QUOTED]
# an estimate is never null: its ends may be, as test_an_interval_without_ends shows
ABSENT += [(*quoted, "null") for quoted in QUOTED if quoted[-1] not in ESTIMATES]


@pytest.mark.parametrize(("kind", "stage", "keys", "how"), ABSENT)
def test_a_number_that_is_not_there_is_an_error_that_names_it(root, kind, stage, keys, how):
    path = root / f"reports/{stage}/metrics.json"
    metrics = read_json(path)
    parent = metrics
    for key in keys[:-1]:
        parent = parent[key]
    if how == "missing":
        del parent[keys[-1]]
    else:
        parent[keys[-1]] = None
    write_json(path, metrics)
    with pytest.raises(UserError, match=re.escape(f"reports/{stage}/metrics.json")) as caught:
        render_card(kind, facts_of(root), SHA256)
    assert keys[-1] in str(caught.value)


def test_an_interval_without_ends_is_printed_as_a_number(root):
    analysis = read_json(root / "reports/analyze_logps/metrics.json")
    analysis["dpo"] |= {"rewards/accuracies_low": None, "rewards/accuracies_high": None}
    write_json(root / "reports/analyze_logps/metrics.json", analysis)
    assert "| **DPO's implicit reward** | 97 % |" in render_card("dpo", facts_of(root), SHA256)


def test_a_setting_that_params_lack_is_an_error(root):
    params = read_params(REPO)
    del params["train_ppo"]["cliprange"]
    with pytest.raises(CardError, match="cliprange"):
        render_card("ppo", facts_of(root, params=params), SHA256)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "text", HOSTILE + ["---\nlicense: other\n---\n", "a: b\n- c", "{{ 7 * 7 }} {% raw %}", "'\"\\"]
)
def test_hostile_text_stays_text_on_the_card(root, kind, text):
    path = root / "reports/sample_responses/samples.json"
    samples = json.loads(path.read_text())
    plain = render_card(kind, facts_of(root), SHA256)
    samples[0]["prompt"] = text
    samples[1]["answers"] = {model: {"greedy": text, "sampled": text} for model in ("base", "dpo", "ppo")}
    path.write_text(json.dumps(samples))
    edit(root, "fetch_pairs", source=text)
    example = facts_of(root).example | {"prompt": text, "chosen": text, "rejected": text}
    card = render_card(kind, facts_of(root, example=example), SHA256)
    assert card_errors(card, KNOWN) == []
    data = metadata_of(card)
    if kind != "reward":
        assert data["widget"][0]["messages"][0]["content"] == text
        assert data["widget"][1]["output"]["text"] == text
    structure = [[tag for tag in Page(MARKDOWN.render(body(c))).tags if tag != "br"] for c in (plain, card)]
    assert structure[0] == structure[1]
    assert "".join(text.split()) in "".join(Page(MARKDOWN.render(body(card))).text.split())


def body(card: str) -> str:
    return re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)


def test_a_long_answer_is_shortened_and_says_so(root):
    path = root / "reports/sample_responses/samples.json"
    samples = json.loads(path.read_text())
    samples[0]["answers"]["dpo"]["greedy"] = "word " * 1000
    path.write_text(json.dumps(samples))
    assert "word …</td>" in render_card("dpo", facts_of(root), SHA256)


@pytest.mark.parametrize("kind", KINDS)
def test_the_usage_snippet_is_python_that_names_the_repository(root, kind):
    card = render_card(kind, facts_of(root), SHA256)
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    compile(code, "card", "exec")
    assert f'name = "tester/course-{cards.SUFFIXES[kind]}"' in code
    assert ("run `hf auth login` first" in card) == (kind != "ppo")  # that one is public


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_reports_give_the_same_card(root, kind):
    assert render_card(kind, facts_of(root), SHA256) == render_card(kind, facts_of(root), SHA256)


def test_the_example_is_of_median_margin_among_those_ranked_right(root, embedded_pairs):
    table = "row,prompt_id,chosen_score,rejected_score\n1,0,5.0,0.0\n4,1,1.0,0.0\n7,2,2.0,0.0\n10,3,-1.0,0.0\n"
    (root / "reports/train_reward/heldout_scores.csv").write_text(table)
    example = read_example(root, ReportFiles(root))
    assert (example["chosen_score"], example["rejected_score"]) == (2.0, 0.0)
    assert example["prompt"] == embedded_pairs[2]["prompt"]
    (root / "reports/train_reward/heldout_scores.csv").write_text(table.replace("7,2,2.0", "8,2,2.0"))
    with pytest.raises(CardError, match="row 8 is not in data/pairs/heldout.parquet"):
        read_example(root, ReportFiles(root))


def test_answers_that_lack_a_model_are_an_error(root):
    path = root / "reports/sample_responses/samples.json"
    samples = json.loads(path.read_text())
    assert read_answers(root, ReportFiles(root), 2)[0].prompt == FIRST_PROMPT
    del samples[0]["answers"]["ppo"]
    path.write_text(json.dumps(samples))
    with pytest.raises(CardError, match="'ppo' is missing; run `dvc repro -f sample_responses`"):
        read_answers(root, ReportFiles(root), 2)


def test_hashes_are_those_of_dvc_lock(root):
    assert read_hashes(root) == {}
    (root / "dvc.lock").write_text(
        "schema: '2.0'\nstages:\n"
        "  train_dpo:\n    outs:\n    - path: models/dpo\n      md5: bb.dir\n"
        "    - path: reports/x.json\n      md5: cc\n"
        "  fetch_pairs:\n    outs:\n    - path: data/pairs\n      md5: aa.dir\n"
        "  publish_hub:\n    outs:\n    - path: models/hub\n      md5: dd.dir\n"
    )
    assert read_hashes(root) == {"data/pairs": "aa.dir", "models/dpo": "bb.dir"}


def test_run_md_holds_what_differs_from_run_to_run(root):
    runs = read_runs(ReportFiles(root), ("fetch_base", "train_dpo", "reference_logps"))
    assert list(runs) == ["fetch_base", "train_dpo"]
    text = render_run(runs)
    assert "| train_dpo | 412.3 | 655 | 3,120 | cpu | bf16 |" in text
    assert f"| train_dpo | Some CPU &#64; 2.1GHz, 2 cores | {run_record('train_dpo')['git_revision']} |" in text
    assert "| train_dpo | python 3.11.7, torch 2.13.0 |" in text.replace("&#46;", ".")
    assert "No stage left a run.json" in render_run({})


@pytest.mark.parametrize("kind", KINDS)
def test_without_intervals_no_finding_is_worded(root, kind):
    drop_intervals(root)
    card = render_card(kind, facts_of(root), SHA256)
    card = card.split("\n\n", 3)[3]  # without metadata, title and the verdict, which is another stage's
    assert not [claim for claim in CLAIMS if claim in card]
    table = section(card, "Results").split("Brackets hold")[1].split(" bold ")[0]
    assert "[" not in table and (kind == "reward" or "**" not in table)
