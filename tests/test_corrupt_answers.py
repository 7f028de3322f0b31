"""corrupt_answers: which copies are made of which answers, counted, and apart from everything else."""

import pytest
from pydantic import ValidationError

from stages.corrupt_answers import Params, main
from stages.lib.run.artefacts import read_json, read_rows, sha256_of_file, write_parquet
from stages.lib.run.params import Base, load_params
from tests.conftest import REPO

BASE = Base(seed=42, precision="fp32")
TABLES = ("train", "heldout", "judge", "negatives", "judge_short")


def kinds(train, dpo, judge):
    return Params(train_kinds=train, dpo_kinds=dpo, judge_kinds=judge)


PARAMS = kinds(["loop", "cut", "other_prompt"], ["loop", "reversed"], ["emoji", "cut"])


def pairs_in(root, train, heldout, judge):
    number = 0
    for split, texts in (("train", train), ("heldout", heldout), ("judge", judge)):
        rows = []
        for prompt_id, chosen, rejected in texts:
            number += 1
            rows.append((number, prompt_id, f"Prompt {prompt_id}?", chosen, rejected))
        names = ("row", "prompt_id", "prompt", "chosen", "rejected")
        write_parquet(root / f"data/pairs/{split}.parquet", dict(zip(names, zip(*rows, strict=True), strict=True)))
    return root


def embedded(root, embedded_pairs, train=12):
    texts = [(i, row["chosen"], row["rejected"]) for i, row in enumerate(embedded_pairs)]
    return pairs_in(root, texts[:train], texts[12:16], texts[16:22])


def tables_of(root):
    tables = {name: read_rows(root / f"data/corrupted/{name}.parquet") for name in TABLES}
    return tables, read_json(root / "reports/corrupt_answers/metrics.json")


def test_every_split_gets_its_kinds(tmp_path, embedded_pairs):
    main(BASE, PARAMS, embedded(tmp_path, embedded_pairs))
    tables, metrics = tables_of(tmp_path)
    assert list(tables["train"][0]) == ["row", "prompt_id", "kind", "prompt", "chosen", "rejected"]
    assert [row["kind"] for row in tables["train"]] == ["loop", "cut", "other_prompt"] * 12 + ["short_both"] * 12
    heldout_kinds = [row["kind"] for row in tables["heldout"]]
    assert heldout_kinds == ["loop", "cut", "other_prompt", "emoji"] * 4 + ["short_both"] * 4
    assert [row["kind"] for row in tables["judge"]] == ["emoji", "cut"] * 6
    assert [row["row"] for row in tables["negatives"]] == list(range(1, 13))
    assert {row["kind"] for row in tables["negatives"]} == {"loop", "reversed"}
    for table in tables.values():
        assert all(row["rejected"].split() != row["chosen"].split() for row in table)
    assert metrics["train"]["cut"] == {"made": 12, "left_out": 0}
    assert metrics["judge_short"]["short_chosen"] == {"made": 6, "left_out": 0}


def test_the_judges_short_answers_are_whole_and_on_both_sides(tmp_path, embedded_pairs):
    main(BASE, PARAMS, embedded(tmp_path, embedded_pairs))
    originals = {row["row"]: row for row in read_rows(tmp_path / "data/pairs/judge.parquet")}
    for row in tables_of(tmp_path)[0]["judge_short"]:
        original = originals[row["row"]]
        for side, kinds in (("chosen", {"short_rejected"}), ("rejected", {"short_chosen"})):
            if side == "rejected" and not row["kind"].startswith("short"):
                continue  # a corrupted copy of the short chosen answer
            if row["kind"] in kinds:
                assert row[side] == original[side]
            else:
                assert original[side].startswith(row[side]) and len(row[side]) < len(original[side])
                assert row[side][-1] in '.!?"' or not row[side][-1].isalnum()


def test_the_reward_model_learns_that_a_short_good_answer_beats_a_short_bad_one(tmp_path, embedded_pairs):
    main(BASE, PARAMS, embedded(tmp_path, embedded_pairs))
    originals = {row["row"]: row for row in read_rows(tmp_path / "data/pairs/train.parquet")}
    short = [row for row in tables_of(tmp_path)[0]["train"] if row["kind"] == "short_both"]
    assert len(short) == len(originals)
    for row in short:
        for side in ("chosen", "rejected"):
            whole = originals[row["row"]][side]
            assert whole.startswith(row[side]) and len(row[side]) < len(whole)


def test_other_answers_are_other_prompts_and_of_the_same_split(tmp_path):
    train = [(0, "Red one. And more.", "x"), (0, "Red two.", "x"), (1, "Blue one.", "x"), (2, "Green.", "x")]
    pairs_in(tmp_path, train, [(3, "Held one.", "x"), (4, "Held two.", "x")], [(5, "Judge.", "x")])
    main(BASE, PARAMS, tmp_path)
    tables, metrics = tables_of(tmp_path)
    color = {0: "Red", 1: "Blue", 2: "Green"}
    others = [row for row in tables["train"] if row["kind"] == "other_prompt"]
    assert len(others) == 4
    for row in others:
        assert row["rejected"].split()[0].strip(".") in set(color.values()) - {color[row["prompt_id"]]}
    assert [row["rejected"] for row in tables["heldout"] if row["kind"] == "other_prompt"] == [
        "Held two.",
        "Held one.",
    ]
    # one sentence has no order, and one word no beginning that is not its end
    assert metrics["judge_short"]["short_both"] == {"made": 0, "left_out": 1}


def test_what_cannot_be_spoilt_is_left_out_and_counted(tmp_path):
    params = kinds(["shuffle", "reversed"], ["reversed"], ["other_prompt"])
    pairs_in(tmp_path, [(0, "!", "a"), (1, "?", "b")], [(2, "One. Two.", "c")], [(3, "d", "e")])
    main(BASE, params, tmp_path)
    tables, metrics = tables_of(tmp_path)
    assert [len(tables[name]) for name in TABLES] == [0, 1, 0, 0, 0]  # "Two. One. One." or "Two. Two. One."
    assert metrics["train"] == {kind: {"made": 0, "left_out": 2} for kind in ("shuffle", "reversed", "short_both")}
    assert metrics["negatives"] == {"reversed": {"made": 0, "left_out": 2}}
    assert metrics["judge"] == {"other_prompt": {"made": 0, "left_out": 1}}  # there is no other prompt


def test_same_seed_same_bytes_and_a_row_does_not_depend_on_the_others(tmp_path, embedded_pairs):
    digests, loops = [], []
    for name, seed, count in (("a", 1, 12), ("b", 1, 12), ("c", 2, 12), ("d", 1, 5)):
        root = embedded(tmp_path / name, embedded_pairs, count)
        main(Base(seed=seed, precision="fp32"), PARAMS, root)
        digests.append([sha256_of_file(root / f"data/corrupted/{table}.parquet") for table in TABLES])
        loops.append([row["rejected"] for row in tables_of(root)[0]["train"] if row["kind"] == "loop"][:5])
    assert digests[0] == digests[1] and not set(digests[0]) & set(digests[2])
    assert loops[0] == loops[3] != loops[2]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ((["loop", "lop"], ["loop"], ["loop"]), "train_kinds: 'lop' is unknown; known kinds: loop, emoji"),
        ((["loop"], [], ["loop"]), "dpo_kinds must name at least one kind"),
        ((["loop"], ["loop"], ["cut", "cut"]), "judge_kinds must name at least one kind"),
    ],
)
def test_bad_kinds_are_named(names, words):
    with pytest.raises(ValidationError, match=words):
        kinds(*names)


def test_the_committed_judge_knows_kinds_that_the_reward_model_never_met():
    params = load_params("corrupt_answers", Params, REPO)
    assert set(params.judge_kinds) - set(params.train_kinds) and set(params.train_kinds) & set(params.judge_kinds)
