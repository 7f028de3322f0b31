"""A params.yaml section as a dataclass: whatever is wrong is named."""

from typing import Literal, Self

import pytest
from pydantic import Field, ValidationError, model_validator
from ruamel.yaml import YAML

from stages.lib.run.errors import UserError
from stages.lib.run.params import Base, MicroBatchTokens, Section, load_param, load_params, read_params


class Params(Section):
    rate: float = Field(gt=0)
    steps: int
    limit: int | None = Field(ge=1, lt=9)
    kind: Literal["a", "b"]
    name: str = Field(min_length=1)
    flags: dict[str, bool]
    shares: list[float]
    tokens: MicroBatchTokens

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps > 100:
            raise ValueError(f"steps ({self.steps}) leave no time")
        return self


GOOD = "rate: 5.0e-7\n  steps: 3\n  limit: null\n  kind: a\n  name: x\n  flags: {x: true}\n  shares: [0.5]"
GOOD += "\n  tokens: auto"


def write(root, section):
    (root / "params.yaml").write_text(f"train:\n  {section}\n")
    return root


def test_a_good_section(tmp_path):
    assert load_params("train", Params, write(tmp_path, GOOD)) == Params(
        rate=5e-7, steps=3, limit=None, kind="a", name="x", flags={"x": True}, shares=[0.5], tokens="auto"
    )


def test_exponents_without_a_dot_are_numbers_as_in_dvc(tmp_path):
    assert load_params("train", Params, write(tmp_path, GOOD.replace("5.0e-7", "5e-7"))).rate == 5e-7


def test_a_whole_number_serves_as_a_float(tmp_path):
    rate = load_params("train", Params, write(tmp_path, GOOD.replace("5.0e-7", "1"))).rate
    assert rate == 1.0 and isinstance(rate, float)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("steps: 3", "stepz: 3", "'train.steps' is missing"),
        ("steps: 3", "steps: 3\n  stepz: 4", "'train.stepz' is unknown; known keys: rate, steps"),
        ("steps: 3", "steps: 3.5", "'train.steps' must be int, not 3.5"),
        ("steps: 3", "steps: true", "'train.steps' must be int, not True"),
        ("steps: 3", "steps: '3'", "'train.steps' must be int, not '3'"),
        ("steps: 3", "steps: null", "'train.steps' must be int, not None"),
        ("limit: null", "limit: none", "'train.limit' must be int of at least 1 and below 9 or null, not 'none'"),
        ("kind: a", "kind: c", "'train.kind' must be 'a' or 'b', not 'c'"),
        ("rate: 5.0e-7", "rate: .nan", "'train.rate' must be float"),
        ("rate: 5.0e-7", "rate: .inf", "'train.rate' must be float"),
        ("rate: 5.0e-7", "rate: 1" + "0" * 400, "'train.rate' must be float"),
        ("rate: 5.0e-7", "rate: 0.0", "'train.rate' must be float above 0, not 0.0"),
        ("rate: 5.0e-7", "rate: '5e-7'", "'train.rate' must be float above 0, not '5e-7'"),
        ("rate: 5.0e-7", "rate: true", "'train.rate' must be float above 0, not True"),
        ("limit: null", "limit: 9", "'train.limit' must be int of at least 1 and below 9 or null, not 9"),
        ("steps: 3", "steps: 101", "train: steps (101) leave no time"),
        ("steps: 3", "steps: 101\n  3: 4", "'train.3' is unknown; known keys: rate, steps"),
        ("name: x", "name: ''", "'train.name' must be str of at least 1 character(s), not ''"),
        ("name: x", 'name: "\\ud83d"', "'train.name' must be str of at least 1 character(s)"),
        ("[0.5]", "[0.5, x]", "'train.shares[1]' must be float, not 'x'"),
        ("[0.5]", "null", "'train.shares' must be list"),
        ("{x: true}", "{3: true}", "'train.flags' must have texts as keys, not 3"),
        ("{x: true}", "{x: 1}", "'train.flags.x' must be bool, not 1"),
        ("{x: true}", "[true]", "'train.flags' must be dict"),
        ("tokens: auto", "tokens: 0", "'train.tokens' must be int above 0 or 'auto', not 0"),
        ("tokens: auto", "tokens: all", "'train.tokens' must be int above 0 or 'auto', not 'all'"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(UserError, match=r"params\.yaml") as error:
        load_params("train", Params, write(tmp_path, GOOD.replace(old, new)))
    assert message in str(error.value)


def test_a_missing_section_is_named(tmp_path):
    with pytest.raises(UserError, match="section 'base' is missing"):
        load_params("base", Base, write(tmp_path, GOOD))


@pytest.mark.parametrize(
    ("text", "message"),
    [("a: [1", "not valid YAML"), ("- 1", "expected sections, found list"), ("", "found NoneType")],
)
def test_a_file_that_is_no_mapping(tmp_path, text, message):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_params(tmp_path)


def test_duplicate_keys_are_refused(tmp_path):
    with pytest.raises(UserError, match="duplicate key"):
        load_params("train", Params, write(tmp_path, GOOD + "\n  steps: 4"))


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="run stages from the root"):
        read_params(tmp_path)


def test_a_section_is_frozen_and_a_copy_of_it_is_checked(tmp_path):
    params = load_params("train", Params, write(tmp_path, GOOD))
    assert params.replace(steps=4).steps == 4 and params.steps == 3
    with pytest.raises(ValidationError, match="rate"):
        params.replace(rate=0.0)
    with pytest.raises(ValidationError, match="stepz"):
        params.replace(stepz=4)
    with pytest.raises(ValidationError, match="frozen"):
        params.steps = 4


def test_one_value_of_another_section(tmp_path):
    root = write(tmp_path, GOOD)
    assert load_param("train", "kind", Literal["a", "b"], root) == "a"
    assert load_param("train", "limit", int | None, root) is None
    with pytest.raises(UserError, match="'train.kind' must be 'c', not 'a'"):
        load_param("train", "kind", Literal["c"], root)
    with pytest.raises(UserError, match="'train.kinds' is missing"):
        load_param("train", "kinds", str, root)
    with pytest.raises(UserError, match="section 'tests' is missing"):
        load_param("tests", "kind", str, root)


def test_the_parser_that_dvc_takes_is_the_fast_one_and_reads_the_same(tmp_path):
    values = "[5.0e-7, 5e-7, yes, on, 012, 0o14, 1_000, ~, .5, '5', <|endoftext|>]"
    root = write(tmp_path, f"{GOOD}\n  values: {values}")
    fast = YAML(
        typ="safe"
    )  # as DVC makes it; in Python alone `dvc repro` with nothing to do takes half as long again
    assert fast.Parser.__name__ == "CParser"
    assert fast.load(root / "params.yaml") == read_params(root)
