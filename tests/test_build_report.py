"""The report page: self-contained, escaped, complete, and clear about what is missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from pydantic import ValidationError

from stages.build_report import Params, main
from stages.lib.analysis.names import CORRUPTION_LABELS
from stages.lib.analysis.stats import Interval
from stages.lib.analysis.wording import NO_FINDING
from stages.lib.data.corruptions import CORRUPTIONS
from stages.lib.report.files import EMBEDDED_PAIRS
from stages.lib.report.page import Estimate, Forest, Scale, paragraphs, sections_of, spell_seconds
from stages.lib.report.sections import STAGES
from stages.lib.run.artefacts import sha256_of_file, write_json
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base
from tests.support.example_reports import REPO, write_example_reports
from tests.support.without_intervals import CLAIMS, drop_intervals

BASE = Base(seed=42, precision="auto")
HOSTILE = (
    '<script>alert("x")</script><img src=x onerror=alert(1)> {{ 7 * 7 }} {% raw %} </pre> &amp; \u202egnp.exe'
)


class Tags(HTMLParser):
    """Collects the start tags and the text of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def build(root: Path, rows: int = 5) -> Tags:
    main(BASE, Params(title="A & B", gallery_rows=rows), root)
    return Tags((root / "reports/index.html").read_text(encoding="utf-8"))


@pytest.fixture
def root(tmp_path) -> Path:
    return write_example_reports(tmp_path)


def test_page_loads_nothing_from_anywhere(root):
    page = build(root)
    html = (root / "reports/index.html").read_text(encoding="utf-8")
    for tag, attributes in page.tags:
        assert tag not in ("script", "iframe", "link", "object", "embed", "form", "base"), tag
        assert not [name for name in attributes if name.startswith("on")], attributes
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "data:").startswith(("data:image/", "data:", "#")), attributes
    assert "url(" not in html and "@import" not in html
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script" not in policy
    assert len(html) < 3_000_000


def test_every_chart_and_picture_is_inlined_with_words(root):
    images = [attributes for tag, attributes in build(root).tags if tag == "img"]
    assert sum(image["src"].startswith("data:image/svg+xml;base64,") for image in images) == 9
    assert sum(image["src"].startswith("data:image/png;base64,") for image in images) == 7
    assert all(len(image["alt"]) > 20 for image in images)


def test_the_verdict_comes_first_and_the_answers_before_their_log_probs(root):
    text = build(root).text
    order = ["million parameters", "DPO: broken.", "PPO: no difference found."]
    order += ["The judge is a logistic regression", "fitted on 67 pairs of its own and 1,137 with corrupted"]
    order += ["one to another prompt in 62\N{NO-BREAK SPACE}% of cases"]
    order += ["What the answers are worth", "Preferred to the base’s", "routine like, number 0"]
    order += ["Score gained by PPO", "Does the final model find", "Which of two answers", "DPO: loss"]
    order += ["Base model", "Tokens/s", "Git revision"]
    places = [text.index(words) for words in order]
    assert places == sorted(places)


def test_numbers_stand_beside_their_intervals_and_baselines(root):
    text = build(root).text
    assert "+0.004 [\N{MINUS SIGN}0.011, +0.019]" in text  # the difference of differences
    assert "0.97 [0.94, 1.00]" in text  # implicit reward
    assert "apostrophes" in text and "0.99 [0.98, 1.00]" in text  # a baseline that beats it
    assert "+0.10 [\N{MINUS SIGN}0.10, +0.30]" in text  # gain in score
    assert "302 pairs over 302 prompts" in text and "4 (duplicate)" in text
    assert "67 pairs over 61 prompts: it is fitted on them" in text  # with the two others, all that was kept
    assert "36 min 08 s" in text  # fifteen stages: 15 + 20.5 * 105 = 2,167.5 s
    assert "beta: 0.1" in text and "# implicit-reward temperature" in text


def test_without_intervals_no_finding_is_worded(root):
    drop_intervals(root)
    (root / "reports/analyze_logps/answer.md").write_text("**DPO.** No finding.")
    none_found = {"word": NO_FINDING, "reasons": ["the judge prefers its answers in 100 % [2, 100]"]}
    write_json(root / "reports/score_responses/verdicts.json", {"dpo": none_found, "ppo": none_found})
    page = build(root)
    assert not [claim for claim in CLAIMS if claim in page.text.split("All parameters")[0]]
    assert page.text.count(NO_FINDING) == 5  # two verdicts, memorised by DPO and by PPO, the score gained
    html = (root / "reports/index.html").read_text(encoding="utf-8")
    assert "<strong>" not in html.split('id="scorecard"')[1].split("</table>")[0]


def test_what_reward_model_and_judge_do_not_see_through_is_said_by_kind(root):
    text = build(root).text.replace("\N{NO-BREAK SPACE}", " ")
    table = " ".join(text.split("What reward model and judge see through")[1].split())
    assert "a few words looped to the end3497 % [85, 99]100 % [90, 100]*" in table  # Wilson's, of 33 of 34
    assert "a good answer to another prompt3453 % [37, 69]*62 % [45, 76]" in table
    assert (
        "The reward model does not clearly prefer the better answer to these: a good answer to another prompt "
        "(53 % [37, 69]). The judge does not clearly prefer the better answer to these: a good answer to another "
        "prompt (62 % [45, 76])." in table
    )
    path = root / "reports/train_reward/metrics.json"
    metrics = json.loads(path.read_text())
    write_json(path, metrics | {"by_kind": {"loop": 0.970588, "other_prompt": 0.176471}})
    text = build(root).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "prefers these to the better answer: a good answer to another prompt (18 % [8, 34])." in text
    write_json(path, metrics | {"by_kind": {"loop": 0.970588}})
    text = build(root).text
    assert "The reward model clearly prefers the better answer to every kind. The judge clearly" in text
    write_json(path, metrics | {"by_kind": {}})  # of answers that cannot be spoilt
    assert "see through" not in build(root).text


def test_pairs_that_share_a_prompt_widen_the_interval_by_kind(root):
    path = root / "reports/fetch_pairs/metrics.json"
    write_json(path, json.loads(path.read_text()) | {"heldout_prompts": 17})
    assert "97\N{NO-BREAK SPACE}% [77, 100]" in build(root).text  # Wilson: 0.970588 of 17 trials


def test_every_corruption_has_a_name_in_words():
    assert set(CORRUPTION_LABELS) == {*CORRUPTIONS, "short_both"}


def test_the_judge_is_among_the_setup_and_the_embedded_pairs_have_a_licence(root):
    text = build(root).text.replace("\N{NO-BREAK SPACE}", " ")
    assert "Judgelogistic regression (C 0.003) on the base’s mean hidden state after layer 21" in text
    assert "right in 97 % of the held-out pairs" in text
    assert "pairs_embedded.jsonl, licence not stated" in text  # another file of that name
    path = root / "reports/fetch_pairs/metrics.json"
    write_json(path, json.loads(path.read_text()) | {"sha256": EMBEDDED_PAIRS})
    assert "pairs_embedded.jsonl, licence mit" in build(root).text
    assert EMBEDDED_PAIRS == sha256_of_file(REPO / "data/pairs_embedded.jsonl")


def test_a_second_judge_stands_beside_the_first_where_one_was_asked(root):
    assert "second judge" not in build(root).text.split("All parameters")[0]
    found = {"counted_prompts": 250, "unparsed_replies": 1234}
    for name, mean in (("win_rate", 0.58), ("win_rate_lc", 0.56), ("consistent", 0.8), ("prefers_first", 0.61)):
        found |= {name: mean, f"{name}_low": mean - 0.05, f"{name}_high": mean + 0.05}
    metrics = {"on": True, "model": f"judge {HOSTILE}", "dpo": found, "ppo": found | {"win_rate": 0.47}}
    path = root / "reports/judge_responses/metrics.json"
    path.write_text(json.dumps(metrics))
    page = build(root)
    words = ["What the answers are worth", "A second judge", "Preferred to the base’s by the judge"]
    words += [f"Preferred to the base’s by judge {HOSTILE}", "58\N{NO-BREAK SPACE}% [53, 63]"]
    words += ["56\N{NO-BREAK SPACE}% [51, 61]", "80\N{NO-BREAK SPACE}% [75, 85]", "61\N{NO-BREAK SPACE}% [56, 66]"]
    words += ["250", "1,234", "routine like, number 0"]
    place = 0
    for word in words:
        place = page.text.index(word, place)
    assert "script" not in {tag for tag, _ in page.tags}
    del metrics["ppo"]["consistent"]
    path.write_text(json.dumps(metrics))
    with pytest.raises(UserError, match="no 'ppo > consistent'; run `dvc repro -f judge_responses`"):
        build(root)


@pytest.mark.parametrize("where", ["prompt", "greedy", "sampled"])
def test_hostile_samples_are_shown_as_text(root, where):
    path = root / "reports/sample_responses/samples.json"
    samples = json.loads(path.read_text(encoding="utf-8"))
    if where == "prompt":
        samples[0]["prompt"] = HOSTILE
    else:
        samples[0]["answers"]["ppo"][where] = HOSTILE
    path.write_text(json.dumps(samples), encoding="utf-8")
    page = build(root)
    assert HOSTILE in page.text  # every character of it, read back by an HTML parser
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags
    assert all(attributes.get("src", "data:").startswith("data:") for _, attributes in page.tags)


def test_half_a_surrogate_pair_does_not_stop_the_report(root):
    path = root / "reports/sample_responses/samples.json"
    path.write_text(path.read_text(encoding="utf-8").replace("I wake up", r"I \ud83d wake up"), encoding="utf-8")
    assert "wake up" in build(root).text


def test_hostile_answer_data_names_and_title_are_escaped(root):
    (root / "reports/analyze_logps/answer.md").write_text(f"**Bold** <b onclick=x> {HOSTILE}\n\nSecond `code`")
    metrics = json.loads((root / "reports/fetch_pairs/metrics.json").read_text())
    metrics["source"] = metrics["unseen"]["source"] = "<script>pairs</script>.jsonl"
    (root / "reports/fetch_pairs/metrics.json").write_text(json.dumps(metrics))
    main(BASE, Params(title="<script>title</script>", gallery_rows=1), root)
    page = Tags((root / "reports/index.html").read_text(encoding="utf-8"))
    assert "script" not in {tag for tag, _ in page.tags}
    assert ("strong", {}) in page.tags and ("code", {}) in page.tags
    assert not any("onclick" in attributes for _, attributes in page.tags)


def test_without_run_json_the_costs_are_absent_and_said_to_be(tmp_path):
    text = build(write_example_reports(tmp_path, runs=False)).text
    assert text.count("not recorded") >= len(STAGES)
    assert "the stages ran elsewhere" in text


def test_one_missing_run_json_is_named(root):
    (root / "reports/train_ppo/run.json").unlink()
    assert "Not recorded: train_ppo." in build(root).text


def test_gallery_rows_limit_the_samples(root):
    text = build(root, rows=2).text
    assert "number 1?" in text and "number 2?" not in text


def test_the_same_reports_give_the_same_bytes(root):
    build(root)
    first = (root / "reports/index.html").read_bytes()
    build(root)
    assert (root / "reports/index.html").read_bytes() == first


NOT_SHOWN = (
    "corrupt_answers",
    "inspect_pairs",
    "reference_logps",
    "publish_hub",
)  # but for what they cost


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in NOT_SHOWN])
def test_a_missing_metrics_file_names_the_stage_to_run(root, stage):
    read = {"sample_responses": "samples.json", "score_responses": "scorecard.csv"}
    (root / f"reports/{stage}/{read.get(stage, 'metrics.json')}").unlink()
    with pytest.raises(UserError, match=rf"reports/{stage}/.*not found; run `dvc repro {stage}`"):
        build(root)


def test_a_missing_key_is_named_and_the_old_page_stays(root):
    build(root)
    before = (root / "reports/index.html").read_bytes()
    path = root / "reports/analyze_logps/metrics.json"
    metrics = json.loads(path.read_text())
    del metrics["dpo"]["did_high"]
    path.write_text(json.dumps(metrics))
    with pytest.raises(UserError, match="no 'dpo > did_high'; run `dvc repro -f analyze_logps`"):
        build(root)
    assert (root / "reports/index.html").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train_dpo/history.csv", "step,epoch\n1,1\n", "no column 'loss'"),
        ("train_dpo/heldout.csv", "", "train_dpo/heldout.csv: .*dvc repro -f train_dpo"),
        ("sample_responses/samples.json", '[{"prompt": "x", "answers": {}}]', "sample 1: 'base' is missing"),
        (
            "score_responses/scorecard.csv",
            "model,decoding,measure,mean,low,high,change,change_low,change_high\n",
            "no win_rate",
        ),
        ("train_dpo/metrics.json", "{", "not JSON"),
    ],
)
def test_damaged_reports_are_named(root, name, content, message):
    (root / "reports" / name).write_text(content)
    with pytest.raises(UserError, match=message):
        build(root)


def test_a_missing_picture_is_named(root):
    (root / "reports/analyze_logps/ecdf.png").unlink()
    with pytest.raises(
        UserError, match="reports/analyze_logps/ecdf.png: not found; run `dvc repro analyze_logps`"
    ):
        build(root)


def test_training_without_evaluations_is_drawn_without_them(root):
    (root / "reports/train_ppo/evaluations.csv").write_text("\n")  # train_ppo.eval_every: 0
    assert sum(tag == "img" for tag, _ in build(root).tags) == 16


def test_changes_clear_of_zero_are_bold(root):
    path = root / "reports/score_responses/scorecard.csv"
    table = pd.read_csv(path)
    changed = (table["model"] == "dpo") & (table["measure"] == "emoji") & (table["decoding"] == "sampled")
    table.loc[changed, ["mean", "change_low", "change_high"]] = [0.61, 0.05, 0.3]
    table.to_csv(path, index=False)
    build(root)
    html = (root / "reports/index.html").read_text(encoding="utf-8")
    assert html.count("<strong>0.61 [0.30, 0.70]</strong>") == 1
    assert len(re.findall(r"<strong>[\d.]+ \[", html)) == 1


def test_estimates_without_an_interval_are_shown_bare(root):
    """A single held-out prompt allows no interval: low and high are null, in CSV files empty."""
    for stage in ("analyze_logps", "train_ppo"):
        path = root / f"reports/{stage}/metrics.json"
        path.write_text(re.sub(r'(_low|_high)": [-\d.e]+', r'\1": null', path.read_text()))
    (root / "reports/analyze_logps/answer.md").write_text("**DPO.** no difference found")
    path = root / "reports/score_responses/scorecard.csv"
    pd.read_csv(path).assign(low=None, high=None, change_low=None, change_high=None).to_csv(path, index=False)
    text = build(root).text
    assert "no difference found" in text
    assert not re.search(r"[\d%] \[", text.split("All parameters")[0].split("Score gained")[1])


@pytest.mark.parametrize("title", ["", "  "])
def test_empty_title_is_refused(title):
    with pytest.raises(ValidationError, match="title"):
        Params(title=title, gallery_rows=1)
    with pytest.raises(ValidationError, match="gallery_rows"):
        Params(title="x", gallery_rows=0)


def test_spelling_of_seconds():
    assert [spell_seconds(s) for s in (4.21, 59.96, 185, 3599.6, 3720)] == [
        "4.2 s",
        "1 min 00 s",
        "3 min 05 s",
        "1 h 00 min",
        "1 h 02 min",
    ]


def test_scale_places_shows_and_ticks():
    scale = Scale(-1.0, 3.0, reference=0)
    assert [scale.place(x) for x in (-1, 0, 3, 9)] == [0, 25, 100, 100]
    assert scale.show(Interval(0.5, 0.25, 1.0)) == "0.50 [0.25, 1.00]"
    assert scale.show(Interval(0.5, None, None)) == "0.50"
    assert scale.ticks == [-1, 0, 1, 2, 3]


def test_fitted_forest_holds_every_interval_and_the_reference():
    scale = Forest.fitted("t", "i", [Estimate("a", Interval(2.0, 1.0, 3.0))], reference=0).scale
    assert scale.low < 0 and scale.high > 3
    same = Forest.fitted("t", "i", [Estimate("a", Interval(0.0, 0.0, 0.0))], reference=0).scale
    assert same.low < same.high  # no division by zero


def test_paragraphs_keep_bold_and_code_and_escape_the_rest():
    html = paragraphs("# Heading\n\n**Yes** <i>5 < 6</i>\n\n`a & b`")
    assert html == "<p><strong>Yes</strong> &lt;i&gt;5 &lt; 6&lt;/i&gt;</p>\n<p><code>a &amp; b</code></p>\n"


def test_sections_of_params_keep_comments_and_leave_the_others_out():
    text = "# head\nbase:\n  seed: 1  # of all\n\npublish_hub:\n  name: x\n\ntrain_dpo:\n  beta: 1.0\n"
    assert sections_of(text, ["base", "train_dpo"]) == "base:\n  seed: 1  # of all\n\ntrain_dpo:\n  beta: 1.0"
