"""A chat model from a GGUF file or a folder, as an ordinary fp32 model and a tokenizer that fits it."""

import dataclasses
import datetime
import json
import re
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stages.lib.model.loading import set_seed
from stages.lib.run.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's; where it is, there is no whole model
# what transformers, gguf and safetensors raise on damaged files
DATE = datetime.date(2024, 7, 26)  # Llama 3.2's own, where a template cannot ask for today's
UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError, struct.error)
UNREADABLE += (SafetensorError,)


@dataclasses.dataclass(frozen=True)
class RandomInit:
    """Sizes of a random model that has another model's vocabulary and special tokens: for tests."""

    seed: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


def load_gguf(
    path: Path, random_init: RandomInit | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantises a Llama GGUF to fp32; with `random_init`, a small random model instead, same tokenizer.

    transformers refuses to save a model it loaded from GGUF, so the weights move, strictly, into an ordinary
    model of the same configuration without the traces of quantisation.

    Raises:
        UserError: not a GGUF file, or not of an architecture transformers can read.
    """
    folder, file = str(path.parent), path.name
    try:
        tokenizer = split_digits(AutoTokenizer.from_pretrained(folder, gguf_file=file))
        config = AutoConfig.from_pretrained(folder, gguf_file=file)
        config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # the GGUF holds it in fp32: 9.99999975e-06
        vars(config).pop("_model_name_or_path", None)
        tokenizer.model_max_length = config.max_position_embeddings
        if random_init is not None:
            sizes = dataclasses.asdict(random_init)
            set_seed(sizes.pop("seed"))
            config.update(sizes | {"head_dim": random_init.hidden_size // random_init.num_attention_heads})
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer
        dequantised = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=file, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(dequantised.state_dict(), strict=True, assign=True)
        model.tie_weights()
        return model, tokenizer
    except UNREADABLE as error:
        raise UserError(f"{path.name}: not a GGUF model that transformers can read: {error}") from error


def split_digits(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Restores the splitting into single digits, which transformers 5.23 loses on the way from GGUF.

    Without it '\\n\\n1.' becomes [198, 198, 33, 30] in SmolLM2's vocabulary, with it [1116, 33, 30], as in
    the original tokenizer and in llama.cpp.
    """
    backend = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, backend.pre_tokenizer])
    return tokenizer


def load_folder(folder: Path, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The causal language model and fast tokenizer in a folder, fp32; safetensors only, no code from it.

    Args:
        name: for errors; a hub id where the folder is a download.

    Raises:
        UserError: an adapter, no safetensors, quantised, unreadable, with weights missing, or without a fast tokenizer.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{name}: is an adapter (LoRA or another), not a whole model")
    if not list(folder.glob("*.safetensors")):
        raise UserError(
            f"{name}: has no *.safetensors at its top; convert the weights, other formats are not read"
        )
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(folder, **options)
        if getattr(config, "quantization_config", None) is not None:
            raise UserError(f"{name}: is quantised; choose the original, unquantised model")
        model, loading = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **options
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, **options)
    except UNREADABLE as error:
        raise UserError(f"{name}: not a causal language model that can be loaded: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        raise UserError(f"{name}: {len(missing)} weights are missing, {missing[0]} among them; fetch it again")
    if not tokenizer.is_fast:
        raise UserError(f"{name}: has no fast tokenizer (tokenizer.json); convert it first")
    return model, tokenizer


def base_of_adapter(folder: Path, name: str) -> tuple[str, str] | None:
    """What an adapter was trained on, as its settings name it, and at which revision; None for a whole model.

    Raises:
        UserError: the settings cannot be read, name no base, or are of another kind of model.
    """
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        base, task = settings.get("base_model_name_or_path"), settings.get("task_type")
        revision = settings.get("revision") or "main"
    except (ValueError, AttributeError) as error:
        raise UserError(f"{name}: {ADAPTER_CONFIG} is no JSON object: {error}") from error
    if not isinstance(base, str) or not base:
        raise UserError(f"{name}: is an adapter, and {ADAPTER_CONFIG} does not name its base_model_name_or_path")
    if task not in (None, "CAUSAL_LM"):
        raise UserError(
            f"{name}: is an adapter of another kind of model ({task}); choose one of a causal language model"
        )
    return base, revision


def load_adapted(folder: Path, base: Path, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model that an adapter makes of its base, merged in fp32; its own tokenizer where it has one.

    Args:
        base: the folder of the whole model that it was trained on.

    Raises:
        UserError: no safetensors, of a kind that cannot be merged, or it does not fit the base; as of `load_folder`.
    """
    from peft import PeftModel, get_peft_model_state_dict

    weights = folder / "adapter_model.safetensors"
    if not weights.is_file():
        raise UserError(f"{name}: is an adapter without {weights.name}; other formats are not read")
    model, tokenizer = load_folder(base, f"{name}: its base {base}")
    try:
        whole = {f"base_model.model.{name}" for name in model.state_dict()}  # it may hold a trained embedding too
        adapted = PeftModel.from_pretrained(model, str(folder), local_files_only=True)
        own = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
        given = load_file(weights).keys()
        if not own <= given <= own | whole:  # PEFT warns, and draws what is missing
            raise ValueError(f"{weights.name} holds other weights than its settings say")
        model = adapted.merge_and_unload()
        if (folder / "tokenizer.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (*UNREADABLE, NotImplementedError) as error:
        raise UserError(f"{name}: an adapter that cannot be merged into {base}: {error}") from error
    return model, tokenizer


def set_special_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pad_token: str, name: str
) -> None:
    """Makes tokenizer, configuration and generation settings agree on pad, EOS and BOS.

    The generation settings keep nothing else: a published temperature or penalty would act on every answer.

    Raises:
        UserError: no chat template, no EOS, an EOS that does not end the template's turns, or a pad token
            that is unknown, outside the embedding, the EOS, or used by the template.
    """
    if tokenizer.chat_template is None:
        raise UserError(f"{name}: the tokenizer has no chat template; choose an instruction-tuned model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{name}: the tokenizer has no EOS token; choose an instruction-tuned model")
    tokenizer.chat_template = settled_template(tokenizer.chat_template, name)
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the embedding {model.config.vocab_size} rows"
        )
    turn_ids = _rendered_turn(tokenizer, name)
    pad_id = tokenizer.get_vocab().get(pad_token)
    if pad_id is None:
        problem = f"has no token {pad_token!r}"
    elif pad_id == tokenizer.eos_token_id:
        problem = f"pad_token {pad_token!r} is the EOS"
    elif pad_id in turn_ids:
        problem = f"its chat template uses {pad_token!r}"
    else:
        problem = None
    if problem:
        raise UserError(f"{name}: {problem}; set fetch_base.pad_token to {_unused_tokens(tokenizer, turn_ids)}")
    if tokenizer.eos_token_id not in turn_ids[-4:]:
        raise UserError(f"{name}: its chat template does not end a turn with {tokenizer.eos_token!r}, its EOS")
    tokenizer.pad_token = pad_token
    ids = {
        "pad_token_id": pad_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    model.config.update(ids)
    model.generation_config = GenerationConfig(**ids)


def settled_template(template: str | dict[str, str], name: str) -> str | dict[str, str]:
    """The chat template with what would change by itself held fast.

    Today's date (Llama 3.2, SmolLM3) becomes a fixed one: a prompt would have other token ids tomorrow. Where a
    model can think before it answers (Qwen3, SmolLM3), it does not: the pairs hold answers alone, and a sampled one
    is only as long as theirs. Written into the template, so that whoever loads the tokenizer does the same.

    Raises:
        UserError: it asks for the date in a way that cannot be replaced.
    """
    if isinstance(template, dict):
        return {key: str(settled_template(each, name)) for key, each in template.items()}
    call = re.compile(r"""strftime_now\(\s*(?:"([^"]*)"|'([^']*)')\s*\)""")
    settled = call.sub(lambda found: f'"{DATE.strftime(found[1] or found[2])}"', template)
    if "strftime_now" in settled.replace("strftime_now is defined", ""):
        raise UserError(f"{name}: its chat template writes today's date; choose another base model")
    if "enable_thinking" in settled:
        settled = "{%- set enable_thinking = false %}" + settled
    return settled


def _unused_tokens(tokenizer: PreTrainedTokenizerBase, turn_ids: list[int]) -> str:
    """Which tokens can pad, and how a shell and Hydra let one of them through."""
    used = {tokenizer.eos_token_id, *turn_ids}
    found = sorted(
        (token_id, token)
        for token, token_id in tokenizer.get_added_vocab().items()
        if token_id not in used and token.strip()
    )
    if not found:
        return "an unused one of its own"
    names = ", ".join(token for _, token in found[:5])
    return f"""an unused one of its own, such as {names} (after -S: 'fetch_base.pad_token="{found[0][1]}"')"""


def _rendered_turn(tokenizer: PreTrainedTokenizerBase, name: str) -> list[int]:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # a template is a program and can raise anything
        raise UserError(f"{name}: its chat template fails on a question and an answer: {error}") from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]
