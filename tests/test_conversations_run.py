"""Forty pairs of several turns, with system messages and a tool call, from file to cards and report."""

import html
import json

import pytest

from stages.fetch_base import from_description
from stages.lib.model.loading import save_model
from stages.lib.report.untrusted_text import escape_markdown
from stages.lib.run.artefacts import read_json, read_rows
from tests.conftest import CHATML, REPO, copy_of_project, dvc

THINGS = ("kettle", "ladder", "lantern", "sundial", "umbrella", "compass", "teapot", "globe")
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"thing": "globe"}}}
WITH_CALLS = CHATML.replace(
    "message['content'] +", "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +"
)


def said(role, content, **more):
    return {"role": role, "content": content, **more}


def conversation(number: int) -> dict:
    """A pair of one of five kinds, by number."""
    thing = THINGS[number % len(THINGS)]
    question = said("user", f"How do I look after {thing} number {number}?")
    before = [said("user", f"I collect things like a {thing}."), said("assistant", "How nice! Which one?")]
    guard = [said("system", f"Answer like a museum guard of room {number}.")]
    call = [question, said("assistant", "", tool_calls=[CALL]), said("tool", f"wipe {number} dry")]
    turns = [[question], [*before, question], [*guard, question], [*guard, *before, question], call][number % 5]
    return {
        "prompt": turns,
        "chosen": [
            said("assistant", f"Oh, wipe it dry, keep it cool, and check it once a month! Is {number} old?")
        ],
        "rejected": [said("assistant", f"Item {number} requires no maintenance whatsoever.")],
    }


@pytest.mark.slow
def test_conversations_of_every_kind_reach_cards_and_report(tmp_path):
    root = copy_of_project(tmp_path)
    base = from_description(REPO / "data/base_smoke.json")
    base.tokenizer.chat_template = WITH_CALLS
    save_model(base.model, base.tokenizer, root / "data/talking_base")
    (root / "data/talks").mkdir()
    heldout = range(35, 40)  # one of each kind
    for name, numbers in (("train-0", range(20)), ("train-1", range(20, 35)), ("test-0", heldout)):
        lines = "".join(json.dumps(conversation(number)) + "\n" for number in numbers)
        (root / f"data/talks/{name}.jsonl").write_text(lines)
    changes = [
        "fetch_base.path=data/talking_base", "fetch_pairs.path=data/talks", "fetch_pairs.files=train-*",
        "fetch_pairs.heldout_files=test-*", "fetch_pairs.eval_prompts=false", "tokenize_pairs.max_prompt_length=200",
        "tokenize_pairs.max_length=256", "sample_responses.gallery_prompts=5", "build_report.gallery_rows=6",
    ]  # fmt: skip
    changed = {change.split("=")[0] for change in changes}
    recipe = [line.split()[1] for line in (root / "recipes/smoke.txt").read_text().splitlines()]
    changes += [change for change in recipe if change.split("=")[0] not in changed]
    dvc(root, "exp", "run", *(part for change in changes for part in ("-S", change)))

    fetched = read_json(root / "reports/fetch_pairs/metrics.json")
    assert fetched["read"] == fetched["kept"] == 40 and fetched["heldout_pairs"] == 5
    assert fetched["turns"] == {"1": 8, "2": 8, "3": 16, "4": 8}
    prompts = [row["prompt"] for row in read_rows(root / "data/pairs/heldout.parquet")]
    assert sum("System: Answer like a museum guard" in prompt for prompt in prompts) == 2
    assert sum('"name": "look_up"' in prompt and "Tool: wipe 39 dry" in prompt for prompt in prompts) == 1
    page = (root / "reports/index.html").read_text(encoding="utf-8")
    gallery = (root / "reports/sample_responses/samples.md").read_text(encoding="utf-8")
    cards = {path.parent.name: path.read_text(encoding="utf-8") for path in root.glob("models/hub/*/README.md")}
    assert len(cards) == 3
    for prompt in prompts:  # whole, wherever prompts are shown
        assert prompt in html.unescape(page) and escape_markdown(prompt) in gallery
    shown = {name: sum(escape_markdown(prompt) in card for prompt in prompts) for name, card in cards.items()}
    public = shown.pop("llm-course-hw2-ppo")  # and these files are nobody else's to read
    assert public == 0 and "not public, and not shown" in cards["llm-course-hw2-ppo"]
    assert len(shown) == 2 and all(shown.values())
    look = html.unescape((root / "reports/inspect_pairs/data.html").read_text(encoding="utf-8"))
    assert "3 messages in 16" in look
