import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stages.lib.run.artefacts import read_json, read_parquet, sha256_of_file, write_json, write_parquet
from stages.lib.run.errors import UserError
from stages.lib.run.params import Base
from stages.tokenize_pairs import Params, main

BASE = Base(seed=42, precision="fp32")
PARAMS = Params(max_prompt_length=256, max_completion_length=None, max_length=1024)
TABLES = ("pairs", "reward", "prompts")


pytestmark = pytest.mark.usefixtures("few_pairs_do_for_the_judge")


def pairs_in(
    root, train, heldout=(("held", "out", "side"),), judge=(("judged", "good", "bad"),), unseen=(("new", "text"),),
    more=("more",), on_bad_row="error",
):  # fmt: skip
    """data/pairs and data/corrupted as the stages before leave them: rows from 1, one prompt_id per prompt.

    The corrupted copies of every answer: of the kind "cut" a word, of the kind "late" the answer and 200 words.
    """
    (root / "params.yaml").write_text(
        f"fetch_pairs: {{on_bad_row: {on_bad_row}}}\n"
        "train_dpo: {response_length: 12}\ntrain_ppo: {response_length: 16}\n"
        "sample_responses: {max_new_tokens: 12, first_max_new_tokens: 24}\n"
    )
    row, ids = 0, {}
    for name, rows in (("train", train), ("heldout", heldout), ("judge", judge)):
        columns = {key: [] for key in ("row", "prompt_id", "prompt", "chosen", "rejected")}
        copies = {key: [] for key in (*columns, "kind")}
        for prompt, chosen, rejected in rows:
            row += 1
            values = (row, ids.setdefault(prompt, len(ids)), prompt, chosen, rejected)
            for key, value in zip(columns, values, strict=True):
                columns[key].append(value)
            for kind, copy in (("cut", "cut"), ("late", chosen + " late" * 200)):
                for key, value in zip(copies, (*values[:-1], copy, kind), strict=True):
                    copies[key].append(value)
        write_parquet(root / f"data/pairs/{name}.parquet", columns)
        write_parquet(root / f"data/corrupted/{name}.parquet", copies)
        twin = {"train": "negatives", "judge": "judge_short"}.get(name)
        if twin:
            write_parquet(root / f"data/corrupted/{twin}.parquet", copies)
    prompts, responses = zip(*unseen, strict=True)
    columns = {"row": list(range(1, len(prompts) + 1)), "prompt": list(prompts), "response": list(responses)}
    write_parquet(root / "data/pairs/unseen.parquet", columns)
    names = {"pairs": "pairs.jsonl", "unseen": "unseen.jsonl", "eval_prompts": "more.jsonl"}
    write_json(
        root / "data/pairs/places.json",
        {source: {"name": name, "separator": ":", "parts": []} for source, name in names.items()},
    )
    columns = {"row": list(range(1, len(more) + 1)), "prompt": list(more)}
    write_parquet(root / "data/pairs/eval_prompts.parquet", columns)
    return root


def read_all(root):
    names = [f"{table}_{split}" for table in (*TABLES, "reward_negatives") for split in ("train", "heldout")]
    names += ["unseen", "pairs_negatives", "judge_pairs", "judge_corrupted", "judge_short", "prompts_judge"]
    names += ["prompts_eval"]
    tables = {name: read_parquet(root / f"data/tokenized/{name}.parquet") for name in names}
    return tables, read_json(root / "reports/tokenize_pairs/metrics.json")


def test_the_tables_decode_to_the_texts(tiny_base, tokenizer):
    train = [("Hi?", "Hey 🙂!", "Good day."), ("Hi?", "Yo", "Greetings."), ("Why?", "Because 12345!", "Unknown.")]
    main(BASE, PARAMS, pairs_in(tiny_base, train))
    tables, metrics = read_all(tiny_base)
    pairs, reward, prompts = (tables[f"{table}_train"] for table in TABLES)
    for i, (prompt, chosen, rejected) in enumerate(train):
        user = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(pairs["prompt_input_ids"][i]).endswith(user)
        assert tokenizer.decode(pairs["chosen_input_ids"][i]) == f"{chosen}<|im_end|>\n"
        assert tokenizer.decode(reward["rejected_ids"][i]).endswith(f"{user}{rejected}<|im_end|>")
        assert reward["chosen_ids"][i][: len(pairs["prompt_input_ids"][i])] == pairs["prompt_input_ids"][i]
    assert pairs["row"] == reward["row"] == [1, 2, 3] and pairs["prompt_id"] == [0, 0, 1]
    assert prompts["prompt_id"] == [0, 1] and prompts["prompt"] == ["Hi?", "Why?"]
    assert prompts["input_ids"] == [pairs["prompt_input_ids"][0], pairs["prompt_input_ids"][2]]
    assert tokenizer.decode(tables["unseen"]["response_input_ids"][0]) == "text<|im_end|>\n"
    assert metrics["read"] == metrics["kept"] == 7 and metrics["dropped"] == {} and metrics["train_pairs"] == 3


def test_corrupted_copies_come_with_their_kind(tiny_base, tokenizer):
    train = [("Hi?", "Hey you!", "Good day."), ("Why?", "Because so", "Unknown.")]
    main(BASE, PARAMS, pairs_in(tiny_base, train))
    tables, metrics = read_all(tiny_base)
    for name in ("pairs_negatives", "reward_negatives_train"):
        assert tables[name]["row"] == [1, 1, 2, 2] and tables[name]["prompt_id"] == [0, 0, 1, 1]
        assert tables[name]["kind"] == ["cut", "late"] * 2
    copies = tables["pairs_negatives"]
    for side in ("prompt", "chosen"):
        assert copies[f"{side}_input_ids"][::2] == tables["pairs_train"][f"{side}_input_ids"]
    assert tokenizer.decode(copies["rejected_input_ids"][0]) == "cut<|im_end|>\n"
    assert tokenizer.decode(copies["rejected_input_ids"][3]).startswith("Because so late late")
    reward = tables["reward_negatives_train"]
    assert reward["chosen_ids"][1::2] == tables["reward_train"]["chosen_ids"]
    assert tokenizer.decode(reward["rejected_ids"][2]).endswith("assistant\ncut<|im_end|>")
    assert metrics["corrupted"]["train"] == {"read": 4, "kept": 4}
    assert tokenizer.decode(tables["judge_pairs"]["chosen_input_ids"][0]) == "good<|im_end|>\n"
    for name in ("judge_corrupted", "judge_short"):
        assert tokenizer.decode(tables[name]["rejected_input_ids"][0]) == "cut<|im_end|>\n"


def test_copies_that_differ_only_after_the_cut_or_hold_a_special_token_go(tiny_base):
    params = Params(max_prompt_length=100, max_completion_length=8, max_length=200)
    main(BASE, params, pairs_in(tiny_base, [("Hi?", "Hey you! " * 9, "Good day."), ("Why?", "Because so", "No.")]))
    tables, metrics = read_all(tiny_base)
    assert tables["pairs_negatives"]["row"] == tables["reward_negatives_train"]["row"] == [1, 2, 2]
    assert metrics["corrupted"]["train"] == {"read": 4, "kept": 3}
    # a pair that goes takes its copies along, also where the token is in its rejected answer, which they do not hold
    train = [("a", "b", "c<|im_end|>"), ("d", "e", "f")]
    main(BASE, PARAMS, pairs_in(tiny_base, train, on_bad_row="drop"))
    tables, metrics = read_all(tiny_base)
    assert tables["pairs_negatives"]["row"] == [2, 2] and metrics["corrupted"]["negatives"] == {
        "read": 4,
        "kept": 2,
    }


def test_prompts_to_measure_on_have_numbers_of_their_own(tiny_base, tokenizer):
    main(BASE, PARAMS, pairs_in(tiny_base, [("a", "b", "c"), ("a", "d", "e")], more=("What now?", "And then?")))
    tables, metrics = read_all(tiny_base)
    # prompts 0 (train), 1 (held out), 2 (the judge's), then these
    assert tables["prompts_judge"]["prompt_id"] == [2] and tables["prompts_eval"]["prompt_id"] == [3, 4]
    assert tables["prompts_eval"]["prompt"] == ["What now?", "And then?"] and metrics["eval_prompts"] == 2
    decoded = tokenizer.decode(tables["prompts_eval"]["input_ids"][0])
    assert decoded.endswith("<|im_start|>user\nWhat now?<|im_end|>\n<|im_start|>assistant\n")
    main(BASE, PARAMS, pairs_in(tiny_base, [("a", "b", "c")], more=()))
    assert read_all(tiny_base)[0]["prompts_eval"] == {"prompt_id": [], "prompt": [], "input_ids": []}


def test_limits_hold_and_the_generation_header_survives(tiny_base, tokenizer, embedded_pairs):
    params = Params(max_prompt_length=24, max_completion_length=40, max_length=56)
    train = [(row["prompt"], row["chosen"], row["rejected"]) for row in embedded_pairs[:20]]
    main(BASE, params, pairs_in(tiny_base, train))
    tables, metrics = read_all(tiny_base)
    pairs, reward = tables["pairs_train"], tables["reward_train"]
    for i in range(20):
        prompt = pairs["prompt_input_ids"][i]
        assert len(prompt) == 24 and tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
        for side in ("chosen", "rejected"):
            assert len(pairs[f"{side}_input_ids"][i]) == 32  # 56 - 24, below 40
            whole = reward[f"{side}_ids"][i]
            assert len(whole) == 56 and whole[-1] == tokenizer.eos_token_id
            assert whole[24:-1] == pairs[f"{side}_input_ids"][i][:-1]
    assert all(len(ids) == 24 for ids in tables["prompts_train"]["input_ids"])
    # 20 pairs, one held out, one of the judge's, an unseen text, a prompt; short completions of the last three fit
    assert metrics["cut"] == {"max_prompt_length": 24, "max_completion_length": 40, "max_length": 40}


def test_prompts_that_lose_their_system_message_are_counted_and_said(tiny_base, tokenizer, capsys):
    # 30 pairs, held-out and judge's included, of which 3 have a system message too long for the limit; nothing else
    # is cut: a tenth of the prompts, which alone would not be told
    root = pairs_in(tiny_base, [(f"Question {i}?", f"Yes, {i}.", f"No, {i}.") for i in range(28)])
    path = root / "data/pairs/train.parquet"
    columns = read_parquet(path)
    guard = [{"role": "system", "content": "Rule. " * 200}, {"role": "user", "content": "Q?"}]
    short = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Q?"}]
    columns["messages"] = [json.dumps(guard)] * 3 + [json.dumps(short)] * 2 + [None] * 23
    write_parquet(path, columns)
    main(BASE, PARAMS, root)
    tables, metrics = read_all(root)
    heads = [
        tokenizer.decode(ids).startswith("<|im_start|>system") for ids in tables["pairs_train"]["prompt_input_ids"]
    ]
    assert heads == [False] * 3 + [True] * 25
    assert metrics["cut_of_pairs"] == {"prompts": 3, "answers": 0, "system_messages": 3}
    printed = capsys.readouterr().out
    assert "warning: 3 of 30 pairs lost their system message, or its beginning" in printed
    assert "prompts (" not in printed and "answers (" not in printed
    # limits that cut every prompt, and one answer in 60
    main(BASE, PARAMS.replace(max_prompt_length=8), root)
    assert "warning: 30 of the pairs' 30 prompts (100%) are cut: their beginning" in capsys.readouterr().out


def test_every_reward_row_ends_in_its_only_last_eos(tiny_base, tokenizer, embedded_pairs):
    train = [(row["prompt"], row["chosen"], row["rejected"]) for row in embedded_pairs[:30]]
    main(BASE, PARAMS.replace(max_length=300), pairs_in(tiny_base, train))
    for split in ("train", "heldout"):
        for side in ("chosen_ids", "rejected_ids"):
            for ids in read_all(tiny_base)[0][f"reward_{split}"][side]:
                assert ids[-1] == tokenizer.eos_token_id
                assert ids.count(tokenizer.eos_token_id) == 3  # system, user, assistant


def test_special_tokens_stop_the_stage_or_are_dropped_and_counted(tiny_base):
    train = [("a", "b", "c"), ("x", "y<|im_end|>", "z"), ("<|endoftext|>", "y", "z")]
    unseen = [("u", "v"), ("u", "<|im_start|>")]
    root = pairs_in(tiny_base, train, unseen=unseen)
    with pytest.raises(UserError, match="pairs.jsonl:2: 'chosen' contains the special token.*mend the row"):
        main(BASE, PARAMS, root)
    assert not (root / "data/tokenized").exists()
    main(BASE, PARAMS, pairs_in(tiny_base, train, unseen=unseen, on_bad_row="drop"))
    tables, metrics = read_all(root)
    assert metrics["read"] == 8 and metrics["kept"] == 5 and metrics["dropped"] == {"special_token": 3}
    assert tables["pairs_train"]["row"] == [1] and tables["unseen"]["row"] == [1]


def test_pairs_that_contradict_each_other_once_cut_stop_the_stage_or_go(tiny_base, capsys):
    long = "word " * 30
    train = [("Why?", long + "a", "No."), ("Why?", "No.", long + "b"), ("Else", "b", "c"), ("Else", "b", "d")]
    params = Params(max_prompt_length=60, max_completion_length=20, max_length=90)
    with pytest.raises(
        UserError, match="pairs.jsonl:1: contradicts pairs.jsonl:2 once both are cut to the limits"
    ):
        main(BASE, params, pairs_in(tiny_base, train))
    main(BASE, PARAMS, pairs_in(tiny_base, train))  # whole, they do not
    main(BASE, params, pairs_in(tiny_base, train, on_bad_row="drop"))
    tables, metrics = read_all(tiny_base)
    assert tables["pairs_train"]["row"] == [3, 4] and metrics["dropped"] == {"contradiction_after_cut": 2}
    assert metrics["read"] == metrics["kept"] + 2
    assert "dropped 2 rows (contradiction_after_cut), the first: pairs.jsonl:1" in capsys.readouterr().out


def test_of_pairs_that_are_the_same_once_cut_the_held_out_one_stays(tiny_base):
    long = "word " * 30
    train = [("Why?", long + "a", "No."), ("Why?", long + "b", "No."), ("Else", "b", "c")]
    root = pairs_in(tiny_base, train, heldout=[("because " * 70 + "Why?", long + "c", "No.")])
    main(BASE, Params(max_prompt_length=60, max_completion_length=20, max_length=90), root)
    tables, metrics = read_all(tiny_base)
    assert tables["pairs_train"]["row"] == [1, 3] and tables["pairs_heldout"]["row"] == [4]
    assert metrics["dropped"] == {"repeated_after_cut": 1}
    limits = Params(
        max_prompt_length=8, max_completion_length=20, max_length=90
    )  # of the prompts, only the last word
    main(BASE, limits, root)
    tables, metrics = read_all(tiny_base)
    assert tables["pairs_train"]["row"] == [3] and tables["pairs_heldout"]["row"] == [4]
    assert metrics["dropped"] == {"repeated_after_cut": 2}


def test_a_fault_of_nearly_every_row_is_told_from_a_rows(tiny_base, tokenizer):
    rendered = [(f"<|im_start|>user\n{i}<|im_end|>", "b", "c") for i in range(19)] + [("plain", "b", "c")]
    words = (
        r"pairs.jsonl:1: 'prompt' contains .* the same in 19 of the first 20 rows of .*train.parquet: the texts"
    )
    with pytest.raises(UserError, match=words) as caught:
        main(BASE, PARAMS, pairs_in(tiny_base, rendered))
    assert "mend the row" not in str(caught.value)
    late = [(f"p{i}", "word " * 40 + "a", "word " * 40 + "b") for i in range(5)]
    with pytest.raises(
        UserError, match=r"equal once cut .* in 5 of the first 5 rows .*: raise tokenize_pairs.max"
    ):
        main(
            BASE, Params(max_prompt_length=60, max_completion_length=20, max_length=90), pairs_in(tiny_base, late)
        )


def test_same_input_same_bytes(tiny_base):
    digests = []
    for _ in range(2):
        main(BASE, PARAMS, pairs_in(tiny_base, [("a", "b", "c")]))
        digests.append([sha256_of_file(path) for path in sorted((tiny_base / "data/tokenized").iterdir())])
    assert len(digests[0]) == 15 and digests[0] == digests[1]


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_length": 256}, "max_length .256. must be above max_prompt_length .256."),
        ({"max_prompt_length": 0}, "max_prompt_length"),
        ({"max_completion_length": 0}, "max_completion_length"),
    ],
)
def test_limits_out_of_range(limits, words):
    with pytest.raises(ValidationError, match=words):
        PARAMS.replace(**limits)


def test_a_prompt_limit_that_cuts_into_the_generation_header(tiny_base):
    with pytest.raises(UserError, match="max_prompt_length must hold"):
        main(BASE, PARAMS.replace(max_prompt_length=2, max_length=100), pairs_in(tiny_base, [("a", "b", "c")]))


pieces = st.sampled_from(["<|im_end|>", "<|im_start|>", "\n", "\u202e", "\u2028", "\x8d", "👩‍👩‍👧", "1234", " "])
characters = st.characters(codec="utf-8", exclude_categories=["Cc"])
texts = st.lists(pieces | st.text(characters, max_size=5), max_size=5).map("".join)
# what fetch_pairs lets pass, special tokens included
passed = st.tuples(*(texts.map(lambda text, end=end: text + end) for end in "pcr"))


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(train=st.lists(passed, min_size=1, max_size=6), bad=st.sampled_from(["error", "drop"]))
def test_any_texts_are_tokenized_or_refused_and_the_counts_add_up(tiny_base, tokenizer, train, bad):
    root = pairs_in(tiny_base, train, on_bad_row=bad)
    try:
        main(BASE, PARAMS, root)
    except UserError as error:
        assert "pairs.jsonl:" in str(error) or "train.parquet" in str(error)
        assert "contradicts" in str(error) or any("<|" in text for row in train for text in row)
        return
    tables, metrics = read_all(root)
    assert metrics["read"] == len(train) + 4 == metrics["kept"] + sum(metrics["dropped"].values())
    pairs = tables["pairs_train"]
    for i, row in enumerate(pairs["row"]):
        _, chosen, rejected = train[row - 1]
        assert tokenizer.decode(pairs["chosen_input_ids"][i]) == f"{chosen}<|im_end|>\n"
        assert tokenizer.decode(pairs["rejected_input_ids"][i]) == f"{rejected}<|im_end|>\n"


def test_a_million_characters_are_cut_to_length(tiny_base):
    main(BASE, PARAMS, pairs_in(tiny_base, [("long", "ab c" * 250_000, "short")]))
    tables, metrics = read_all(tiny_base)
    lengths = [len(tables["pairs_train"][f"{side}_input_ids"][0]) for side in ("prompt", "chosen")]
    assert sum(lengths) == 1024 and metrics["cut"]["max_length"] == 1


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (1023, "tokenize_pairs.max_length is 1024, and the base has 1023 positions"),
        (279, "max_prompt_length and sample_responses.first_max_new_tokens are 256 and 24, .* has 279 positions"),
        (271, "max_prompt_length and train_ppo.response_length are 256 and 16, and the base has 271 positions"),
    ],
)
def test_a_base_with_fewer_positions_than_a_text_may_have_is_refused(tiny_base, tiny_model, positions, message):
    root = pairs_in(tiny_base, [("Hi?", "Hey!", "Good day.")])
    params = PARAMS.replace(max_length=1024 if positions > 1000 else 257)
    tiny_model.config.max_position_embeddings = positions
    tiny_model.config.save_pretrained(root / "models/base")
    with pytest.raises(UserError, match=message):
        main(BASE, params, root)
    assert not (root / "data/tokenized").exists()
    tiny_model.config.max_position_embeddings = max(positions, 280) + 1
    tiny_model.config.save_pretrained(root / "models/base")
    main(BASE, params, root)
