"""A params.yaml section as a frozen pydantic model: a missing, misspelt or unfit key fails by name."""

import types
import typing
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model
from ruamel.yaml import YAML, YAMLError

from stages.lib.run.errors import UserError


class Section(BaseModel):
    """Base of every stage's Params: fields are the section's keys, annotations their types, bounds beside them.

        class Params(Section):
            beta: float = Field(gt=0)  # implicit-reward temperature
            limit: int | None = Field(ge=1)

            @model_validator(mode="after")
            def _check(self) -> Self:  # what concerns several keys: a ValueError that names them
                ...

    No value is converted but a whole number to a float; text is no number, True no integer, and nan and infinity
    are refused. Built by hand, an unfit value raises pydantic's ValidationError; `load_params` words it for users.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def replace(self, **changes: Any) -> Self:
        """A checked copy with other values."""
        return type(self)(**self.model_dump() | changes)


S = TypeVar("S", bound=Section)
MicroBatchTokens = Annotated[int, Field(gt=0)] | Literal["auto"]  # tokens per pass; auto: what the device allows
OnBadRow = Literal["error", "drop"]  # stop at a row that cannot be used; or leave it out, counted by reason


class Base(Section):
    """What every stage shares."""

    seed: int = Field(ge=0, lt=2**32)  # NumPy takes no other
    precision: Literal["auto", "bf16", "fp16", "fp32"]


def read_params(root: Path = Path(".")) -> dict[str, Any]:
    """All of params.yaml, parsed as DVC parses it (ruamel, YAML 1.2), so that script and lock file agree.

    Raises:
        UserError: the file is missing, is not YAML or is not a mapping.
    """
    path = root / "params.yaml"
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not found; run stages from the root of the project") from None
    except (YAMLError, ValueError, RecursionError) as error:  # not UTF-8, month 13, 5,000 digits, 1,000 brackets
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected sections, found {type(values).__name__}")
    return values


def load_params(section: str, cls: type[S], root: Path = Path(".")) -> S:
    """One section of params.yaml as `cls`; a field that is itself a Section is the section of that name.

    Raises:
        UserError: the section or a key is missing, unknown, of the wrong type, out of bounds or refused by `cls`.
    """
    values = _section(section, root)
    for name, field in cls.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            require(
                name not in values, f"params.yaml: '{section}.{name}' is unknown: '{name}' is a section of its own"
            )
            values = values | {name: load_params(name, field.annotation, root)}
    return _checked(section, cls, values)


def load_param(section: str, key: str, kind: Any, root: Path = Path(".")) -> Any:
    """One value of another stage's section, as that stage types it: `kind` is an annotation such as `int | None`.

    Raises:
        UserError: the section or the key is missing, or the value is of the wrong type.
    """
    field: dict[str, Any] = {key: (kind, ...)}
    one = create_model(section, __base__=Section, **field)
    values = {name: value for name, value in _section(section, root).items() if name == key}
    return getattr(_checked(section, one, values), key)


def _section(section: str, root: Path) -> dict[str, Any]:
    values = read_params(root).get(section)
    if not isinstance(values, dict):
        raise UserError(f"params.yaml: section '{section}' is missing; see the committed params.yaml")
    return values


def _checked(section: str, cls: type[S], values: dict[str, Any]) -> S:
    try:
        return cls.model_validate(values)
    except ValidationError as error:
        words = " ".join(_in_words(section, cls, error).split())  # a key of the data may have line breaks
        raise UserError(f"params.yaml: {words}") from None


def require(condition: bool, message: str) -> None:
    """Raises UserError(message) unless `condition` holds."""
    if not condition:
        raise UserError(message)


def _in_words(section: str, cls: type[Section], error: ValidationError) -> str:
    """The first of pydantic's complaints, missing keys before unknown ones, in one line."""
    order = {"missing": 0, "extra_forbidden": 1, "invalid_key": 1}
    first = min(error.errors(include_url=False), key=lambda problem: order.get(problem["type"], 2))
    place = first["loc"]
    key = section + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    if first["type"] == "missing":
        return f"'{key}' is missing; see the committed params.yaml"
    if first["type"] in ("extra_forbidden", "invalid_key"):
        return f"'{section}.{place[0]}' is unknown; known keys: {', '.join(cls.model_fields)}"
    if not place:  # of a validator over several keys
        return f"{section}: {first.get('ctx', {})['error']}"
    field = cls.model_fields[str(place[0])]
    hint = field.annotation
    if typing.get_origin(hint) is typing.Union:  # pydantic goes on with the name of a choice
        return f"'{section}.{place[0]}' must be {_spell(hint)}, not {first['input']!r}"
    if place[-1] == "[key]":  # pydantic's way of pointing at a dict's own key
        return f"'{section}.{place[0]}' must have texts as keys, not {first['input']!r}"
    for _ in place[1:]:  # into a dict or a list
        hint = typing.get_args(hint)[-1]
    bounds = _spell_bounds(field.metadata) if len(place) == 1 else ""
    quote = ""
    if first["type"] == "string_type" and not isinstance(
        first["input"], str
    ):  # YAML or the shell took it for more
        quote = f""" (write it in quotes; on the command line in two kinds: -S '{key}="..."')"""
    return f"'{key}' must be {_spell(hint, bounds)}, not {first['input']!r}{quote}"


def _spell(hint: Any, bounds: str = "") -> str:
    """'int of at least 1 or null'."""
    if hint is type(None):
        return "null"
    if typing.get_origin(hint) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(hint))
    if typing.get_origin(hint) is Annotated:
        kind, *fields = typing.get_args(hint)
        return _spell(kind, _spell_bounds([bound for each in fields for bound in each.metadata]))
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return " or ".join(_spell(option, bounds) for option in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint)) + bounds


def _spell_bounds(metadata: list[Any]) -> str:
    """' above 0 and below 1'."""
    words = {Gt: "above", Ge: "of at least", Lt: "below", Le: "of at most"}
    found = []
    for bound in metadata:
        if isinstance(bound, MinLen):
            found.append(f"of at least {bound.min_length} character(s)")
        elif type(bound) in words:
            found.append(f"{words[type(bound)]} {getattr(bound, type(bound).__name__.lower())}")
    return " " + " and ".join(found) if found else ""
