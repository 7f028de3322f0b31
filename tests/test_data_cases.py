"""Small inputs from the field (tests/data/cases), each of which stands for its kind, through the real stages."""

import json
import shutil

import pytest

from stages import corrupt_answers, fetch_pairs, tokenize_pairs
from stages.lib.run.artefacts import read_json, read_rows
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, load_params
from tests.conftest import REPO

CASES = REPO / "tests/data/cases"
BASE = Base(seed=42, precision="fp32")
SPLITS = ("train", "heldout", "judge")
KETTLE = "How should I look after my kettle?"
GOOD = "Wipe your kettle dry after use and keep it somewhere cool. Once a month, check it for wear."
BAD = "A kettle requires no maintenance whatsoever, ever."
COLLECT = [
    {"role": "user", "content": "I collect old things."},
    {"role": "assistant", "content": "How nice. What kind?"},
]
GUARD = [{"role": "system", "content": "Answer like a museum guard."}]
OURS = {"prompt": "question"}
ARGILLA = {"prompt": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}


pytestmark = pytest.mark.usefixtures("few_pairs_do_for_the_judge")


@pytest.fixture
def root(tiny_base):
    (tiny_base / "data").mkdir()
    for name in ("unseen_embedded.jsonl", "prompts_embedded.jsonl"):
        shutil.copy(REPO / "data" / name, tiny_base / "data")
    return tiny_base


def run(root, case, limits=(256, 1024), **changes):
    """fetch_pairs, corrupt_answers and tokenize_pairs over a case; the kettle's row and its decoded ids."""
    params = load_params("fetch_pairs", fetch_pairs.Params, REPO).replace(path=str(CASES / case), **changes)
    text = (REPO / "params.yaml").read_text(encoding="utf-8")
    (root / "params.yaml").write_text(text.replace("on_bad_row: error", f"on_bad_row: {params.on_bad_row}"))
    fetch_pairs.main(BASE, params, root)
    corrupt_answers.main(BASE, load_params("corrupt_answers", corrupt_answers.Params, REPO), root)
    values = {"max_prompt_length": limits[0], "max_completion_length": None, "max_length": limits[1]}
    tokenize_pairs.main(BASE, tokenize_pairs.Params(**values), root)
    rows = [row for split in SPLITS for row in read_rows(root / f"data/pairs/{split}.parquet")]
    return rows, read_json(root / "reports/fetch_pairs/metrics.json")


def rendered(root, tokenizer):
    """prompt, chosen and rejected of the kettle's row, as the models see them."""
    names = ("pairs_train", "pairs_heldout", "judge_pairs")
    rows = [row for name in names for row in read_rows(root / f"data/tokenized/{name}.parquet")]
    texts = [
        [tokenizer.decode(row[f"{part}_input_ids"]) for part in ("prompt", "chosen", "rejected")] for row in rows
    ]
    return next(row for row in texts if "kettle" in row[0])


@pytest.mark.parametrize(
    ("case", "messages", "changes"),
    [
        ("01_multi_turn_prompt.jsonl", COLLECT, {}),
        ("01b_multi_turn_implicit.jsonl", COLLECT, {}),
        ("02_dialogue_text.jsonl", [], {}),
        ("03b_prompt_repeated.jsonl", [], {}),
        ("03c_prompt_text_answers_messages.jsonl", [], {}),
        ("04_system_message.jsonl", GUARD, {}),
        ("04b_system_column.jsonl", GUARD, {}),
        ("05_other_names.jsonl", [], {"columns": OURS}),
        ("05b_argilla_names.jsonl", [], {"columns": ARGILLA}),
        ("07_lists_as_text.csv", [], {}),
        ("08b_excel_semicolon.csv", [], {}),
        ("11b_plain.jsonl.zst", [], {}),
        ("12_shards", [], {}),
        ("13_wrapped.json", [], {}),
    ],
)
def test_read_as_what_it_is(root, tokenizer, case, messages, changes):
    rows, metrics = run(root, case, **changes)
    assert metrics["read"] == metrics["kept"] == 12 and metrics["dropped"] == {}
    row = next(row for row in rows if "kettle" in row["prompt"])
    whole = [*messages, {"role": "user", "content": KETTLE}]
    assert ("messages" in row) == bool(messages)
    assert json.loads(row.get("messages", json.dumps(whole))) == whole
    chosen, rejected = (GOOD, BAD)
    if case.startswith("08b"):
        chosen, rejected = f'First, dry it.\n\nThen say "thanks".\n{GOOD}', f'"No", they said,\n{BAD}'
    assert (row["chosen"], row["rejected"]) == (chosen, rejected)
    prompt = tokenizer.apply_chat_template(whole, tokenize=False, add_generation_prompt=True)
    assert rendered(root, tokenizer) == [prompt, f"{chosen}<|im_end|>\n", f"{rejected}<|im_end|>\n"]
    if case == "12_shards":
        things = [read["prompt"].split()[-1] for read in sorted(rows, key=lambda read: read["row"])]
        assert things[:5] == ["kettle?", "ladder?", "lantern?", "sundial?", "umbrella?"]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("02b_text_implicit_prompt.jsonl", "column 'prompt' is missing .*'Human:'"),
        ("05_other_names.jsonl", r"columns: {prompt: question} .found: 'system', 'question'"),
        (
            "05b_argilla_names.jsonl",
            r"columns: {prompt: instruction, chosen: chosen_response, rejected: rejected_resp",
        ),
    ],
)
def test_refused_as_a_whole(root, case, words):
    for on_bad_row in ("error", "drop"):
        with pytest.raises(UserError, match=words) as caught:
            run(root, case, on_bad_row=on_bad_row)
        assert "mend the row" not in str(caught.value)


def test_tool_messages_are_read_where_the_template_renders_them(root, tokenizer):
    with pytest.raises(
        UserError,
        match=r"^\S*/06_tool_messages.jsonl:\d+: the chat .* call of message 2; .* first \d+ rows of .*: choose a",
    ):
        run(root, "06_tool_messages.jsonl")
    with_calls = tokenizer.chat_template.replace(
        "message['content'] +",
        "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +",
    )
    (root / "models/base/chat_template.jinja").write_text(with_calls)
    run(root, "06_tool_messages.jsonl")
    prompt = rendered(root, tokenizer)[0]
    assert (
        '"name": "look_up"' in prompt
        and '{"thing": 1}' in prompt
        and "<|im_start|>tool\nwipe dry<|im_end|>" in prompt
    )


def test_pairs_that_differ_only_after_the_cut(root):
    with pytest.raises(
        UserError, match=r"14_differ_late.jsonl:\d+: 'chosen' and 'rejected' are equal once cut.*: raise"
    ):
        run(root, "14_differ_late.jsonl", (64, 160))
    with pytest.raises(UserError, match="no row of .* is left"):
        run(root, "14_differ_late.jsonl", (64, 160), on_bad_row="drop")
    assert run(root, "14_differ_late.jsonl")[1]["kept"] == 12  # whole, they differ


def test_a_base_with_too_few_positions_is_refused_before_training(root):
    shutil.copy(CASES / "base/gpt2_short_config.json", root / "models/base/config.json")
    with pytest.raises(UserError, match="max_length is 160, and the base has 96 positions"):
        run(root, "13_wrapped.json", (64, 160))
