"""The Hub's documented rules for a model card's metadata, checked without the Hub.

Only the server validates cards, so a card that parses here can still be refused there. This is a second
reading of the rules, independent of the code that writes the cards; the loopback hub refuses by it too.

Sources: huggingface/hub-docs, `modelcard.md` (the specification), `docs/hub/model-cards.md` and
`docs/hub/repositories-licenses.md`.
"""

import math
import re
from typing import Any

import yaml

LICENSES = set(
    """apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc
    cc0-1.0 cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0
    cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0
    cdla-sharing-1.0 cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1
    eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c
    ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa
    unlicense zlib pddl lgpl-lr deepfloyd-if-license fair-noncommercial-research-license llama2 llama3 llama3.1
    llama3.2 llama3.3 llama4 gemma unknown other""".split()
)
ISO_639_1 = set(
    """aa ab ae af ak am an ar as av ay az ba be bg bh bi bm bn bo br bs ca ce ch co cr cs cu cv cy da de dv dz
    ee el en eo es et eu fa ff fi fj fo fr fy ga gd gl gn gu gv ha he hi ho hr ht hu hy hz ia id ie ig ii ik io
    is it iu ja jv ka kg ki kj kk kl km kn ko kr ks ku kv kw ky la lb lg li ln lo lt lu lv mg mh mi mk ml mn mr
    ms mt my na nb nd ne ng nl nn no nr nv ny oc oj om or os pa pi pl ps pt qu rm rn ro ru rw sa sc sd se sg si
    sk sl sm sn so sq sr ss st su sv sw ta te tg th ti tk tl tn to tr ts tt tw ty ug uk ur uz ve vi vo wa wo xh
    yi yo za zh zu""".split()
)
PIPELINE_TAGS = {"text-generation", "text-classification"}  # those that apply to these models
LIBRARIES = {"transformers", "peft"}
RELATIONS = {"finetune", "quantized", "adapter", "merge"}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
BLOCK = re.compile(r"\A---\n([\s\S]*?)\n---(\n|\Z)")  # repocard.REGEX_YAML_BLOCK, for cards with Unix line ends


class _UniqueKeys(yaml.SafeLoader):
    """Like the Hub's parser, refuses a key that stands twice."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(keys) != len(set(keys)):
            raise yaml.YAMLError(f"duplicated mapping key in {keys}")
        return super().construct_mapping(node, deep)


def metadata_of(card: str) -> dict[str, Any]:
    """The card's YAML block; raises ValueError where there is none, or no mapping in it."""
    block = BLOCK.match(card)
    if block is None:
        raise ValueError("the card does not start with a YAML block")
    try:
        data = yaml.load(block.group(1), Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"the YAML block does not parse: {error}") from error
    if not isinstance(data, dict):
        raise ValueError("the YAML block is not a mapping")
    return data


def card_errors(card: str, known_models: set[str] | None = None) -> list[str]:
    """What the Hub would refuse or ignore; an empty list for a good card.

    Args:
        known_models: the ids that exist; a base model outside them is an error. None: any well-formed id passes.
    """
    try:
        data = metadata_of(card)
    except ValueError as error:
        return [str(error)]
    errors = []

    def check(condition: bool, message: str) -> None:
        if not condition:
            errors.append(message)

    check(data.get("license") in LICENSES, f"license: {data.get('license')!r} is not on the Hub's list")
    if data.get("license") == "other":
        check("license_name" in data, "license: other needs license_name")
    for code in _as_list(data.get("language")):
        good = isinstance(code, str) and (code in ISO_639_1 or re.fullmatch("[a-z]{3}", code))
        check(bool(good), f"language: {code!r} is no ISO 639 code")
    check(data.get("library_name") in LIBRARIES, f"library_name: {data.get('library_name')!r}")
    check(data.get("pipeline_tag") in PIPELINE_TAGS, f"pipeline_tag: {data.get('pipeline_tag')!r}")
    for name in _as_list(data.get("base_model")):
        check(isinstance(name, str) and bool(HUB_ID.fullmatch(name)), f"base_model: {name!r} is no Hub id")
        if known_models is not None:
            check(name in known_models, f"base_model: {name!r} does not exist on the Hub")
    relation = data.get("base_model_relation")
    check(relation is None or relation in RELATIONS, f"base_model_relation: {relation!r}")
    check(relation is None or "base_model" in data, "base_model_relation without base_model")
    for name in _as_list(data.get("datasets")):
        check(isinstance(name, str) and bool(HUB_ID.fullmatch(name)), f"datasets: {name!r} is no Hub id")
    tags = _as_list(data.get("tags"))
    check(all(isinstance(tag, str) and 0 < len(tag) <= 96 for tag in tags), f"tags: {tags}")
    for example in _as_list(data.get("widget")):
        check(isinstance(example, dict) and bool({"text", "messages"} & example.keys()), f"widget: {example}")
    _check_model_index(data.get("model-index"), check)
    _check_numbers(data, "", check)
    return errors


def _check_model_index(index: Any, check: Any) -> None:
    if index is None:
        return
    if not isinstance(index, list):
        check(False, "model-index must be a list")
        return
    for model in index:
        check(isinstance(model.get("name"), str) and bool(model["name"]), "model-index: name is missing")
        check(bool(model.get("results")), "model-index: results are missing")
        for result in model.get("results") or []:
            check(isinstance(result.get("task", {}).get("type"), str), "model-index: task.type is missing")
            for key in ("type", "name"):
                found = result.get("dataset", {}).get(key)
                check(isinstance(found, str) and bool(found), f"model-index: dataset.{key} is missing")
            check(bool(result.get("metrics")), "model-index: metrics are missing")
            for metric in result.get("metrics") or []:
                check(isinstance(metric.get("type"), str), "model-index: metric.type is missing")
                value = metric.get("value")
                check(type(value) in (int, float), f"model-index: the value {value!r} is no number")
            if source := result.get("source"):
                url = source.get("url")
                check(isinstance(url, str) and url.startswith("https://"), f"model-index: source.url {url!r}")


def _check_numbers(value: Any, path: str, check: Any) -> None:
    if isinstance(value, float):
        check(math.isfinite(value), f"{path[1:]}: {value} is no JSON number")
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_numbers(item, f"{path}.{key}", check)
    elif isinstance(value, list):
        for item in value:
            _check_numbers(item, path, check)


def _as_list(value: Any) -> list:
    return [] if value is None else value if isinstance(value, list) else [value]
