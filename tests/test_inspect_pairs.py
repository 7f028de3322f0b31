"""The look before training: what was read and dropped, limits, scripts, and pairs as the models see them."""

import json
import re
from html.parser import HTMLParser

import pytest

from stages import corrupt_answers, fetch_pairs, tokenize_pairs
from stages.inspect_pairs import Params, main
from stages.lib.report.data_page import Segment, segments, unread
from stages.lib.run.artefacts import read_json, read_parquet, sha256_of_file
from stages.lib.run.params import Base, load_params
from tests.conftest import REPO

BASE = Base(seed=42, precision="fp32")
LIMITS = tokenize_pairs.Params(max_prompt_length=24, max_completion_length=None, max_length=150)
HOSTILE = "<script>alert(1)</script> {{ 7 * 7 }}"


class Tags(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text, self.marked = [("", {})], "", []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.text += " " if tag in ("td", "dt", "dd") else ""

    def handle_data(self, data):
        self.text += data
        if self.tags[-1][0] == "mark" and data:
            self.marked.append(data)
            self.tags.append(("", {}))


pytestmark = pytest.mark.usefixtures("few_pairs_do_for_the_judge")


@pytest.fixture
def root(tiny_base):
    rows = [
        {"prompt": f"Question {i // 2}?", "chosen": f"Yes {i}, and you? {HOSTILE}", "rejected": f"No {i}."}
        for i in range(40)
    ]
    rows += [rows[0], {"prompt": "Broken?", "chosen": "", "rejected": "a"}]
    rows.append({"prompt": "Long?", "chosen": "word " * 200 + "?", "rejected": "Привет"})
    files = {"pairs": rows, "unseen": [{"prompt": "u", "response": "t"}], "more": [{"prompt": "m"}]}
    for name, items in files.items():
        (tiny_base / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    text = (REPO / "params.yaml").read_text(encoding="utf-8")
    (tiny_base / "params.yaml").write_text(text.replace("on_bad_row: error", "on_bad_row: drop"))
    params = load_params("fetch_pairs", fetch_pairs.Params, tiny_base).replace(
        path="pairs.jsonl", unseen_path="unseen.jsonl", eval_prompts_path="more.jsonl"
    )
    fetch_pairs.main(BASE, params, tiny_base)
    kinds = corrupt_answers.Params(train_kinds=["loop"], dpo_kinds=["loop"], judge_kinds=["loop"])
    corrupt_answers.main(BASE, kinds, tiny_base)
    tokenize_pairs.main(BASE, LIMITS, tiny_base)
    return tiny_base


def look(root, rows=5) -> Tags:
    main(BASE, Params(rows=rows), root)
    return Tags((root / "reports/inspect_pairs/data.html").read_text(encoding="utf-8"))


def test_the_page_says_what_is_in_the_data(root, capsys):
    page = look(root)
    text = " ".join(page.text.split())
    assert "41 preference pairs of pairs.jsonl" in text
    assert "Rows read 43 Dropped: empty 1 Dropped: the same as an earlier row 1 Pairs left 41" in text
    assert "21; 20 have several pairs, one of them 2" in text
    assert "Not read nothing: every column is used" in text
    assert "1 message in 41 pairs" in text and "Latin 41" in text
    assert "Counting question marks alone ranks 100 %" in text and "a matter of style" in text
    assert "look: Counting question marks" in capsys.readouterr().out
    assert "max_completion_length is null: only max_length cuts them." in text
    metrics = read_json(root / "reports/inspect_pairs/metrics.json")
    assert metrics["pairs"] == metrics["looked_at"] == 41 and metrics["rankers"]["question_marks"] == 1.0
    assert metrics["repeated"] == {"prompts": 21, "with_several_pairs": 20, "most_pairs": 2}


def test_lengths_and_cuts_of_the_pairs_leave_other_texts_out(root):
    more = [{"prompt": "So long a prompt? " * 20 + str(i)} for i in range(400)]
    more.append({"prompt": "Special <|im_end|>?"})
    (root / "more.jsonl").write_text("".join(json.dumps(item) + "\n" for item in more))
    params = load_params("fetch_pairs", fetch_pairs.Params, root).replace(
        path="pairs.jsonl", unseen_path="unseen.jsonl", eval_prompts_path="more.jsonl"
    )
    fetch_pairs.main(BASE, params, root)
    limits = {"max_prompt_length": 90, "max_completion_length": 150, "max_length": 260}
    tokenize_pairs.main(BASE, tokenize_pairs.Params(**limits), root)
    text = (root / "params.yaml").read_text(encoding="utf-8")
    for name, limit in limits.items():
        text = re.sub(rf"(?m)^  {name}: \S+", f"  {name}: {limit}", text)
    (root / "params.yaml").write_text(text)
    page = " ".join(look(root).text.split())
    prompts = [
        len(ids)
        for name in ("pairs_train", "pairs_heldout", "judge_pairs")
        for ids in read_parquet(root / f"data/tokenized/{name}.parquet")["prompt_input_ids"]
    ]
    assert max(prompts) < 90  # all that are cut are evaluation prompts
    mean = sum(prompts) / len(prompts)
    assert f"Tokens, prompt {mean:.0f} on average, {max(prompts)} at most, after the cut" in page
    assert "Then left out, unseen texts and evaluation prompts included: holds a special token" in page
    assert "Texts cut to max_prompt_length, unseen texts and evaluation prompts included 400" in page
    assert "texts are cut to a limit" not in page


def test_pairs_are_shown_whole_as_the_models_see_them(root):
    page = look(root, rows=60)
    assert page.text.count("Row ") == 41
    assert HOSTILE in page.text and "script" not in {tag for tag, _ in page.tags}
    assert set(page.marked) >= {"<|im_start|>", "<|im_end|>"}
    assert [mark for mark in page.marked if mark.endswith("tokens cut")]  # the long answer, and every prompt
    assert "Question 3?" in page.text


def test_it_opens_without_a_network_and_is_the_same_each_time(root):
    page = look(root)
    policy = next(a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "script" not in policy
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(sources) == 3 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"url\(|@import|https?://", (root / "reports/inspect_pairs/data.html").read_text())
    first = sha256_of_file(root / "reports/inspect_pairs/data.html")
    look(root)
    assert sha256_of_file(root / "reports/inspect_pairs/data.html") == first


def test_what_is_left_unread_is_said():
    assert unread({"columns": {}, "message_keys": {}}) == "nothing: every column is used"
    found = unread({"columns": {"topic": 1200, "id": 3}, "message_keys": {"weight": 2}})
    assert found == "columns: topic (1,200 rows), id (3 rows); keys inside messages: weight (2 rows)"


def test_segments_mark_special_tokens_and_cuts():
    def decode(ids):
        return "".join(map(str, ids))

    assert segments([0, 5, 6, 0], [0, 5, 6, 0], {0}, decode) == [
        Segment("0", "special"), Segment("56", "text"), Segment("0", "special"),
    ]  # fmt: skip
    assert segments([5], [5, 6, 7], {0}, decode) == [Segment("5", "text"), Segment("2 tokens cut", "cut")]
    assert segments([7], [5, 6, 7], {0}, decode) == [Segment("2 tokens cut", "cut"), Segment("7", "text")]
