"""A params.yaml section as a frozen dataclass: a missing, misspelt or ill-typed key fails by name."""

import dataclasses
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from ruamel.yaml import YAML, YAMLError

from stages.lib.run.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Base:
    """What every stage shares."""

    seed: int
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


def load_params(section: str, cls: type[T], root: Path = Path(".")) -> T:
    """One section of params.yaml as `cls`, whose fields are its keys and whose annotations their types.

    Raises:
        UserError: the section or a key is missing, unknown, of the wrong type or refused by `cls`.
    """
    values = read_params(root).get(section)
    if not isinstance(values, dict):
        raise UserError(f"params.yaml: section '{section}' is missing; see the committed params.yaml")
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    if missing := [name for name in names if name not in values]:
        raise UserError(f"params.yaml: '{section}.{missing[0]}' is missing; see the committed params.yaml")
    if unknown := [key for key in values if key not in names]:
        raise UserError(f"params.yaml: '{section}.{unknown[0]}' is unknown; known keys: {', '.join(names)}")
    typed = {name: _as_type(values[name], hints[name], f"{section}.{name}") for name in names}
    try:
        return cls(**typed)
    except UserError as error:
        raise UserError(f"params.yaml: {section}: {error}") from None


def require(condition: bool, message: str) -> None:
    """For `__post_init__` of a Params class: `require(self.beta > 0, "beta must be positive")`."""
    if not condition:
        raise UserError(message)


def _as_type(value: Any, hint: Any, key: str) -> Any:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for option in options:
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if typing.get_origin(option) is dict and isinstance(value, dict):
            value_type = typing.get_args(option)[1]
            return {str(name): _as_type(item, value_type, f"{key}.{name}") for name, item in value.items()}
        if typing.get_origin(option) is list and isinstance(value, list):
            (item_type,) = typing.get_args(option)
            return [_as_type(item, item_type, f"{key}[{i}]") for i, item in enumerate(value)]
        if option is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:  # no inf, no nan
            return float(value)  # YAML reads 1 as an int
        if option in (int, bool, str) and type(value) is option:
            return value
        if option is type(None) and value is None:
            return None
    expected = " or ".join(_spell(option) for option in options)
    raise UserError(f"params.yaml: '{key}' must be {expected}, not {value!r}")


def _spell(option: Any) -> str:
    if option is type(None):
        return "null"
    if typing.get_origin(option) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(option))
    return getattr(option, "__name__", str(option))
