import json
import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from ruamel.yaml import YAML

from stages.fetch_pairs import Params, main
from stages.lib.data.pairs import normalise_prompt
from stages.lib.run.artefacts import read_json, read_parquet, sha256_of_file
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, load_params
from tests.conftest import REPO

BASE = Base(seed=42, precision="fp32")
SPLITS = ("train", "heldout", "judge")


def settings_of(**changes):
    values = dict(
        path="pairs.jsonl", unseen_path="unseen.jsonl", eval_prompts_path="more.jsonl", on_bad_row="error",
        max_pairs=None, holdout_fraction=0.1, judge_fraction=0.2,
    )  # fmt: skip
    return load_params("fetch_pairs", Params, REPO).replace(**(values | changes))


def pair(prompt, chosen="c", rejected="r"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def root_with(folder, rows, unseen=({"prompt": "Unseen", "response": "Text"},), more=({"prompt": "More"},)):
    for name, items in (("pairs.jsonl", rows), ("unseen.jsonl", unseen), ("more.jsonl", more)):
        (folder / name).write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def outputs(root):
    tables = {
        name: read_parquet(root / f"data/pairs/{name}.parquet") for name in (*SPLITS, "unseen", "eval_prompts")
    }
    return tables, read_json(root / "reports/fetch_pairs/metrics.json")


def test_the_embedded_data_by_the_committed_parameters(tmp_path):
    params = load_params("fetch_pairs", Params, REPO)
    (tmp_path / "data").mkdir()
    for path in (params.path, params.unseen_path, params.eval_prompts_path):
        (tmp_path / path).write_bytes((REPO / path).read_bytes())
    main(BASE, params, tmp_path)
    tables, metrics = outputs(tmp_path)
    assert metrics["read"] == metrics["kept"] == sum(metrics[f"{split}_pairs"] for split in SPLITS) == 336
    assert metrics["heldout_pairs"] == 34 and metrics["judge_pairs"] == 67 and metrics["eval_prompts"] == 222
    assert metrics["unseen_texts"] == 160 and metrics["dropped"] == {}
    assert metrics["sha256"] == sha256_of_file(tmp_path / params.path)
    assert list(tables["train"]) == ["row", "prompt_id", "prompt", "chosen", "rejected"]
    lines = (tmp_path / params.path).read_text(encoding="utf-8").split("\n")
    for split in SPLITS:
        for row, chosen in zip(tables[split]["row"], tables[split]["chosen"], strict=True):
            assert json.loads(lines[row - 1])["chosen"] == chosen


def test_no_prompt_is_on_two_sides(tmp_path):
    # 30 prompts, each in three spellings
    rows = [pair(f"Question {i}{end}", f"c{i}{end}") for end in ("?", " ", "!!") for i in range(30)]
    rows += [pair(f"QUESTION  {i}", f"C{i}") for i in range(30)]
    main(BASE, settings_of(), root_with(tmp_path, rows))
    tables, metrics = outputs(tmp_path)
    sides = [{normalise_prompt(prompt) for prompt in tables[split]["prompt"]} for split in SPLITS]
    assert len(set.union(*sides)) == sum(map(len, sides)) == 30  # no prompt on two sides
    ids = [set(tables[split]["prompt_id"]) for split in SPLITS]
    assert len(set.union(*ids)) == sum(map(len, ids)) == 30
    assert metrics["judge_prompts"] == 6 and metrics["judge_pairs"] == 24 and metrics["train_prompts"] == 21
    assert metrics["heldout_prompts"] == 3 and metrics["heldout_pairs"] == 12
    assert metrics["repeated_prompts"] == 90


def test_counts_of_a_dirty_file_worked_by_hand(tmp_path):
    rows = [pair(f"p{i}") for i in range(10)]
    rows += [pair("p0"), pair("p1"), pair("p2", "other"), pair(""), pair(None), {"prompt": "x"}, pair("x", "r"), 3]
    unseen = [
        {"prompt": "P3!", "response": "t"},
        {"prompt": "new", "response": "t"},
        {"prompt": "new", "response": "t"},
    ]
    main(BASE, settings_of(on_bad_row="drop", max_pairs=8), root_with(tmp_path, rows, unseen))
    metrics = outputs(tmp_path)[1]
    assert metrics["read"] == 18 and metrics["kept"] == 8
    assert metrics["dropped"] == {
        "empty": 1, "null": 1, "missing_column": 1, "chosen_is_rejected": 1, "not_an_object": 1,
        "duplicate": 2, "over_max_pairs": 3,
    }  # fmt: skip
    unseen_dropped = metrics["unseen"]["dropped"]
    assert metrics["unseen"]["read"] == 3 == metrics["unseen_texts"] + sum(unseen_dropped.values())
    assert unseen_dropped["duplicate"] == 1


@pytest.mark.parametrize(
    "row",
    [
        {"input": {"messages": [{"role": "user", "content": "P?"}], "tools": [], "parallel_tool_calls": True},
         "preferred_output": [{"role": "assistant", "content": "c"}],
         "non_preferred_output": [{"role": "assistant", "content": "r"}]},
        {"question": "P?", "chosen_response": "c", "rejected_response": "r", "system_prompt": ""},
        {"conversations": [{"from": "human", "value": "P?"}], "chosen": {"from": "gpt", "value": "c"},
         "rejected": {"from": "gpt", "value": "r"}},
        {"Prompt": '{"role": "user", "content": "P?"}', "Chosen": "c", "Rejected": "r"},
    ],
)  # fmt: skip
def test_who_follows_the_advice_on_column_names_gets_the_pairs(tmp_path, row):
    rows = [json.loads(json.dumps(row).replace("P?", f"p{i}")) for i in range(9)]
    root = root_with(tmp_path, rows)
    with pytest.raises(UserError, match=r"set in params.yaml, fetch_pairs: columns: {.*} \(found") as caught:
        main(BASE, settings_of(), root)
    line = re.search(r"columns: ({.*?}) \(found", str(caught.value))[1]
    main(BASE, settings_of(columns=YAML(typ="safe").load(line)), root)
    tables, metrics = outputs(root)
    read = {tuple(tables[split][name][i] for name in ("prompt", "chosen", "rejected"))
            for split in SPLITS for i in range(len(tables[split]["row"]))}  # fmt: skip
    assert metrics["kept"] == 9 and read == {(f"p{i}", "c", "r") for i in range(9)}
    unread = {"prompt.parallel_tool_calls": 9} if "input" in row else {}
    assert metrics["unread"] == {"columns": {}, "message_keys": unread}


def test_an_unseen_text_whose_prompt_is_trained_on_is_left_out(tmp_path):
    unseen = [{"prompt": "P3!", "response": "t"}, {"prompt": "new", "response": "t"}]
    main(BASE, settings_of(), root_with(tmp_path, [pair(f"p{i}") for i in range(9)], unseen))
    tables, metrics = outputs(tmp_path)
    assert tables["unseen"]["prompt"] == ["new"] and metrics["unseen"]["dropped"] == {"prompt_of_a_pair": 1}


def test_the_heldout_split_does_not_depend_on_the_judges(tmp_path):
    heldout, judges = [], []
    for name, fraction in (("a", 0.1), ("b", 0.3), ("c", 0.6)):
        (tmp_path / name).mkdir()
        rows = [pair(f"p{i}") for i in range(60)]
        main(BASE, settings_of(judge_fraction=fraction), root_with(tmp_path / name, rows))
        heldout.append(sha256_of_file(tmp_path / name / "data/pairs/heldout.parquet"))
        judges.append(set(outputs(tmp_path / name)[0]["judge"]["row"]))
    assert len(set(heldout)) == 1
    assert list(map(len, judges)) == [6, 18, 36] and judges[0] < judges[1] < judges[2]


def test_files_to_hold_out_are_held_out_whole(tmp_path):
    root = root_with(tmp_path, [])
    (root / "pairs").mkdir()
    for name, numbers in (("train-0", range(20)), ("train-1", range(20, 30)), ("test-0", range(27, 34))):
        lines = "".join(json.dumps(pair(f"p{i}", f"c {name} {i}")) + "\n" for i in numbers)
        (root / f"pairs/{name}.jsonl").write_text(lines)
    with pytest.raises(UserError, match=r"several splits \(test, train\); .*'\*train\*', and heldout_files"):
        main(BASE, settings_of(path="pairs"), root)
    main(BASE, settings_of(path="pairs", heldout_files="test-*"), root)
    tables, metrics = outputs(root)
    assert tables["heldout"]["prompt"] == [f"p{i}" for i in range(27, 34)]
    assert metrics["read"] == 37 and metrics["kept"] == 34
    assert metrics["dropped"] == {"prompt_of_heldout_split": 3}  # p27 to p29, also in train-1
    assert metrics["judge_prompts"] == 7 and metrics["train_prompts"] == 20  # a fifth of 34
    with pytest.raises(ValidationError, match="heldout_files is of a folder of files"):
        settings_of(hub_id="a/b", heldout_files="test-*")
    with pytest.raises(ValidationError, match="of a folder of files, set heldout_files"):
        settings_of(heldout_split="test")


def test_prompts_to_measure_on_are_of_no_pair_and_counted(tmp_path):
    more = [
        {"prompt": "P3!"},
        {"prompt": "new", "topic": "x"},
        {"prompt": "NEW?"},
        {"prompt": ""},
        {"prompt": "b"},
    ]
    root = root_with(tmp_path, [pair(f"p{i}") for i in range(9)], more=more)
    main(BASE, settings_of(on_bad_row="drop"), root)
    tables, metrics = outputs(tmp_path)
    assert tables["eval_prompts"] == {"row": [2, 5], "prompt": ["new", "b"]} and metrics["eval_prompts"] == 2
    assert metrics["eval"]["read"] == 5 and metrics["eval"]["sha256"] == sha256_of_file(tmp_path / "more.jsonl")
    assert metrics["eval"]["dropped"] == {"empty": 1, "repeated_prompt": 1, "prompt_of_a_pair": 1}
    main(BASE, settings_of(eval_prompts=False, eval_prompts_path="not there"), root)
    tables, metrics = outputs(tmp_path)
    assert tables["eval_prompts"] == {"row": [], "prompt": []} and metrics["eval"] == {}


def test_same_seed_same_bytes_other_seed_other_split(tmp_path):
    rows = [pair(f"p{i}") for i in range(60)]
    digests = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        main(Base(seed=seed, precision="fp32"), settings_of(max_pairs=40), root_with(tmp_path / name, rows))
        digests.append(sha256_of_file(tmp_path / name / "data/pairs/heldout.parquet"))
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "pairs.jsonl: has no rows"),
        ([pair("a"), pair("A?", "d")], "nothing is left after the split"),
        (
            [pair("a"), pair("b"), pair("B!", "d")],
            "2 distinct prompts: nothing is left to train on after the split",
        ),
        ([pair("a"), {"question": "b"}], r"pairs.jsonl:2: column 'prompt' is missing \(found: 'question'\)"),
        ([pair("a"), pair("b", "x", "x")], "pairs.jsonl:2: 'chosen' and 'rejected' are the same"),
    ],
)
def test_bad_data_is_refused_and_earlier_artefacts_stay(tmp_path, rows, words):
    main(BASE, settings_of(), root_with(tmp_path, [pair(f"p{i}") for i in range(9)]))
    before = {path: sha256_of_file(path) for path in (tmp_path / "data/pairs").iterdir()}
    with pytest.raises(UserError, match=words):
        main(BASE, settings_of(), root_with(tmp_path, rows))
    assert before == {path: sha256_of_file(path) for path in (tmp_path / "data/pairs").iterdir()}


def test_a_bad_unseen_file_is_refused_before_anything_is_written(tmp_path):
    root = root_with(tmp_path, [pair(f"p{i}") for i in range(9)], [{"prompt": "u"}])
    with pytest.raises(UserError, match="unseen.jsonl: column 'response' is missing"):
        main(BASE, settings_of(), root)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"max_pairs": 1}, {"holdout_fraction": 0.0}, {"holdout_fraction": 1.0}, {"judge_fraction": 0.0},
        {"holdout_fraction": 0.5, "judge_fraction": 0.5},
    ],
)  # fmt: skip
def test_parameters_out_of_range(change):
    with pytest.raises(ValidationError, match=next(iter(change))):
        settings_of(**change)


texts = st.text(st.characters(codec=None), max_size=6) | st.sampled_from(["a", "b", "A?", "", "\x00", "\ud800"])
values = texts | st.none() | st.integers() | st.lists(texts, max_size=2)
lines = st.one_of(
    st.fixed_dictionaries({name: values for name in ("prompt", "chosen", "rejected")}).map(json.dumps),
    st.fixed_dictionaries({name: texts for name in ("prompt", "chosen", "rejected")}).map(json.dumps),
    st.text(max_size=20),
    st.sampled_from(['{"prompt": "a", "prompt": "b"}', "{", "null", "[]", "{}", "NaN", '{"prompt": Infinity}']),
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    content=st.lists(lines, max_size=12),
    bad=st.sampled_from(["error", "drop"]),
    limit=st.none() | st.integers(2, 9),
)
def test_any_lines_are_split_or_refused_and_the_counts_add_up(tmp_path, content, bad, limit):
    root = root_with(tmp_path, [])
    (root / "pairs.jsonl").write_bytes("\n".join(content).encode("utf-8", "surrogatepass"))
    (root / "unseen.jsonl").write_text('{"prompt": "something else altogether", "response": "t"}')
    try:
        main(BASE, settings_of(on_bad_row=bad, max_pairs=limit), root)
    except UserError as error:
        assert "pairs.jsonl" in str(error) or "split" in str(error)
        return
    tables, metrics = outputs(root)
    assert metrics["read"] == metrics["kept"] + sum(metrics["dropped"].values())
    assert metrics["kept"] == sum(len(tables[split]["row"]) for split in SPLITS)
    assert all(metrics[f"{split}_pairs"] > 0 for split in SPLITS)
    ids = [set(tables[split]["prompt_id"]) for split in SPLITS]
    assert len(set.union(*ids)) == sum(map(len, ids))
