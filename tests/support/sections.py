"""The class behind each section of params.yaml."""

import importlib

from stages.lib.model.adapters import Lora
from stages.lib.run.params import Base, Section

SHARED: dict[str, type[Section]] = {"base": Base, "lora": Lora}


def class_of(section: str) -> type[Section]:
    """Of a section that stages share, or of the stage that it is named after."""
    return SHARED.get(section) or importlib.import_module(f"stages.{section}").Params
