"""Low-rank adapters (LoRA, arXiv:2106.09685), by PEFT: a frozen model, and small matrices beside its linear layers.

One set of weights is policy and reference: with its adapters off the model is the one it was, bit for bit. The frozen
linear layers are held in the precision that autocast would multiply in, the adapters in float32.

PEFT is imported where adapters are asked for: without them, no stage waits for it.
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, cast

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages.lib.model.loading import (
    DTYPES,
    cast_linear_layers,
    freeze,
    load_causal_lm,
    own_memory,
    return_freed_memory,
    save_model,
)
from stages.lib.run.artefacts import read_json, write_json
from stages.lib.run.errors import UserError
from stages.lib.run.params import Section

if TYPE_CHECKING:
    from peft import PeftModel

FOLDER = "adapter"  # beside the full weights that it was merged into
REWARD = "reward"  # the reward model's adapters, where they lie beside the policy's
OUTER = "base_model.model."  # what PEFT puts before a weight's name


class Lora(Section):
    """The section `lora`, which the training stages share."""

    rank: int | None = Field(gt=0)  # of every adapter; null: full fine-tuning
    alpha: float = Field(gt=0)  # an adapter's product counts alpha / rank times
    dropout: float = Field(ge=0, lt=1)  # of what goes into the adapters, in training
    targets: Literal["all-linear"] | list[str]  # which layers: all linear ones but the output layer, or by name

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.targets:
            raise ValueError("targets is empty; all-linear, or names such as q_proj")
        return self


FULL = Lora(rank=None, alpha=32.0, dropout=0.0, targets="all-linear")


def add_adapters(
    model: PreTrainedModel, lora: Lora, precision: str, task: Literal["CAUSAL_LM", "SEQ_CLS"] = "CAUSAL_LM"
) -> "PeftModel":
    """Freezes the model and puts fresh adapters beside its linear layers, in place: they change nothing yet.

    Their weights are drawn here: seed first. In a precision below fp32 the frozen linear layers take it.

    Args:
        task: SEQ_CLS of a reward model, whose head `score` is trained with the adapters.

    Returns:
        PEFT's view of the model, whose only trainable parameters are the adapters' and such a head's.

    Raises:
        UserError: no layer of the model has a name that `lora.targets` lists, or the output layer or the embedding
            has one.
    """
    from peft import LoraConfig, get_peft_model

    assert lora.rank is not None
    freeze(model)
    if precision != "fp32":
        cast_linear_layers(model, DTYPES[precision], but=("score",) if task == "SEQ_CLS" else ())
    own_memory(model)
    config = LoraConfig(
        task_type=task,  # of SEQ_CLS, PEFT keeps a trainable copy of the head
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]: PEFT 0.21 takes any number
        lora_dropout=lora.dropout,
        target_modules=lora.targets,
    )
    try:
        with warnings.catch_warnings():  # PEFT takes adapters that are there already for a mistake
            warnings.filterwarnings("ignore", message="You are trying to modify a model with PEFT")
            adapted = get_peft_model(model, config)  # adapters of half-precision layers are float32 (PEFT 0.21)
    except ValueError as error:
        raise UserError(f"params.yaml: lora.targets does not fit {type(model).__name__}: {error}") from error
    if task == "CAUSAL_LM" and has_adapter(cast(nn.Module, model.get_output_embeddings())):
        raise UserError("params.yaml: lora.targets names the output layer, whose adapter no loss here would train")
    if has_adapter(model.get_input_embeddings()):  # of tied weights, merging would move the output layer too
        raise UserError("params.yaml: lora.targets names the embedding; adapters lie beside linear layers here")
    names = [name for name, module in model.named_modules() if has_adapter(module)]
    asked = [] if lora.targets == "all-linear" else lora.targets
    if without := [each for each in asked if not any(f".{name}".endswith(f".{each}") for name in names)]:
        raise UserError(f"params.yaml: lora.targets: no layer of {type(model).__name__} is named {without[0]}")
    adapted.eval()
    for layer in _adapted_layers(model):
        layer.cast_input_dtype_enabled = False  # autocast does it, and once for the layers that share their input
    return adapted


def put_beside(base: PreTrainedModel, other: PreTrainedModel, adapter: Path) -> bool:
    """Puts the adapters in `adapter` beside the base's layers, in place, where they make `other` of it.

    Named REWARD, frozen and off; those that `add_adapters` puts there afterwards are others.

    Args:
        base: a transformer, without a head.
        other: the same transformer with these adapters merged into it.
        adapter: as `save_adapted` leaves it; need not be there.

    Returns:
        Whether they do, but for the rounding of that merger; where not, the base is as it was.
    """
    if not adapter.exists():
        return False
    from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict

    config = cast(LoraConfig, LoraConfig.from_pretrained(str(adapter)))
    prefix = f"{OUTER}{type(other).base_model_prefix}."
    saved = load_file(adapter / "adapter_model.safetensors")
    weights = {name.removeprefix(prefix): weight for name, weight in saved.items() if ".lora_" in name}
    layers = sorted({name.partition(".lora_")[0] for name in weights})
    ours, theirs = dict(base.named_parameters()), dict(other.named_parameters())
    if ours.keys() != theirs.keys() or not {f"{layer}.weight" for layer in layers} <= ours.keys():
        return False
    for name, weight in ours.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            down, up = (weights[f"{layer}.lora_{each}.weight"].to(weight.device) for each in "AB")
            product = (up @ down) * (config.lora_alpha / config.r)
            made = weight + (product.T if config.fan_in_fan_out else product)
            if made.shape != theirs[name].shape or not torch.allclose(made, theirs[name], rtol=1e-5, atol=1e-7):
                return False
        elif not torch.equal(weight, theirs[name]):
            return False
    config.target_modules, config.modules_to_save, config.task_type = layers, None, None
    inject_adapter_in_model(config, base, REWARD)
    set_peft_model_state_dict(base, weights, REWARD)
    freeze(base)
    for layer in _adapted_layers(base):
        layer.set_adapter([])
        layer.cast_input_dtype_enabled = False
    return True


def has_adapter(module: nn.Module) -> bool:
    """Whether it is one of PEFT's layers, for which PEFT need not be imported."""
    return hasattr(module, "lora_A") and hasattr(module, "enable_adapters")


def _adapted_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if has_adapter(module)]


@contextmanager
def adapters_off(model: nn.Module, but: str | None = None) -> Iterator[None]:
    """Inside the block, the model as it was without its adapters, or with one of them; of one that has none, itself."""
    layers = _adapted_layers(model)
    active = [layer.active_adapters for layer in layers]
    for layer in layers:
        layer.set_adapter([but] if but else [])
    try:
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer.set_adapter(names)


@contextmanager
def adapters_learn(model: nn.Module) -> Iterator[None]:
    """Their dropout acts inside the block, and nowhere else."""
    drops = [drop for layer in _adapted_layers(model) for drop in layer.lora_dropout.values()]
    for drop in drops:
        drop.train()
    try:
        yield
    finally:
        for drop in drops:
            drop.eval()


class TrainedWeights:
    """What a checkpoint keeps of a model with adapters: these alone."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.names = {name for name, weight in model.named_parameters() if weight.requires_grad}

    def state_dict(self) -> dict[str, Tensor]:
        return {name: weight for name, weight in self.model.state_dict().items() if name in self.names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        found = self.model.load_state_dict(state, strict=False)
        unfit = sorted(self.names & set(found.missing_keys)) + sorted(found.unexpected_keys)
        if unfit:
            raise ValueError(f"the checkpoint is of other adapters: {unfit[0]}")


def save_adapted(
    adapted: "PeftModel",
    weights: dict[str, Tensor],
    base: Path,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    load: Callable[[Path], PreTrainedModel] = load_causal_lm,
) -> None:
    """The model that base and adapters make, as `save_model` writes it, and in `folder`/adapter the adapters alone.

    Args:
        weights: of the model, under its own names; those of the adapters are taken.
        base: the model that the adapters were put on, models/<name>; so the adapters name it.
        load: reads it, in fp32.
    """
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch)
        adapted.save_pretrained(
            str(adapter), state_dict={OUTER + name: weight for name, weight in weights.items()}
        )
        (adapter / "README.md").unlink()  # PEFT's form of a card
        settings = read_json(adapter / "adapter_config.json")
        write_json(adapter / "adapter_config.json", settings | {"base_model_name_or_path": f"models/{base.name}"})
        return_freed_memory(torch.device("cpu"))  # of training: the base is mapped from its file, not allocated
        save_model(merged(load(base), adapter), tokenizer, folder, beside={FOLDER: adapter})


def merged(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """The model, in float32 on the CPU, with the adapters in `adapter` added to its weights, in place."""
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(model, str(adapter), local_files_only=True)
    return adapted.merge_and_unload()
