"""Loading, freezing, precision, device and seeds."""

import ctypes
import os
import random
import shutil
import sys
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import FullyShardedDataParallelPlugin, GradScalerKwargs
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from stages.lib.run.artefacts import NoRoomError, is_no_room, require_room
from stages.lib.run.errors import UserError

Module = TypeVar("Module", bound=nn.Module)
# torch's 2^16 overflows fp16 where a loss is of summed log-probs, and throws steps away
INITIAL_LOSS_SCALE = 2.0**10
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def set_seed(seed: int = 42) -> None:
    """Seeds Python, NumPy and torch (every device)."""
    random.seed(seed)
    np.random.seed(seed)  # TRL's PPO draws its minibatches from NumPy
    torch.manual_seed(seed)


def disable_dropout_in_model(model: nn.Module) -> None:
    """Sets p = 0 on every dropout, so that policy and reference differ by weights alone."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def pick_device() -> torch.device:
    """The device of this run: $DEVICE if set, else cuda, mps or cpu, whichever is there first.

    The environment, not params.yaml: moving to another machine must not by itself rerun a trained model.
    Under torchrun each process takes the GPU of its local rank.

    Raises:
        UserError: the device cannot compute: it is not there, or this build of torch has no kernels for it.
    """
    name = os.environ.get("DEVICE", "")
    asked = f"DEVICE={name}" if name else ""
    if not name:
        with warnings.catch_warnings(record=True) as caught:  # torch warns of a driver too old for it, and says no
            warnings.simplefilter("always")
            name = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
        complaints = [str(warning.message) for warning in caught if "CUDA" in str(warning.message)]
        if name == "cpu" and complaints and _is_main_process():
            print(f"warning: runs on the CPU, since CUDA does not work here: {complaints[0]}", file=sys.stderr)
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        ones = torch.ones(8, 8, device=device)
        works = float((ones @ ones).sum()) == 512.0  # an empty tensor needs no kernel
    except (RuntimeError, AssertionError) as error:
        remedy = (
            "unset it or choose cpu" if asked else "set DEVICE=cpu, or install a torch that has kernels for it"
        )
        raise UserError(f"{asked or name}: not usable here ({error}); {remedy}") from error
    if not works:
        raise UserError(f"{asked or name}: multiplies wrongly; set DEVICE=cpu")
    if device.type == "cpu":
        torch.set_flush_denormal(True)  # a saturated loss makes denormal gradients, which CPUs crawl through
        _keep_freed_memory()
    return device


def _is_main_process() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _keep_freed_memory() -> None:
    """Tells glibc to keep large freed blocks: returned to the kernel, each would be zeroed again at its next use.

    Halves the time of the fresh buffers that every micro-batch needs. Does nothing where libc has no mallopt.
    """
    if mallopt := _of_libc("mallopt"):
        m_mmap_max, m_trim_threshold = -4, -1  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def return_freed_memory(device: torch.device) -> None:
    """Gives the kernel back what is kept: before work that wants blocks of other sizes, or memory of a mapped file.

    Does nothing where the work is another device's, whose memory is not glibc's.
    """
    if device.type == "cpu" and (malloc_trim := _of_libc("malloc_trim")):
        malloc_trim(0)


def _of_libc(name: str) -> Any:
    """A function of glibc's, or None where there is none of that name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def pick_precision(precision: str, device: torch.device) -> str:
    """Resolves `auto`: bf16 where the hardware multiplies it, fp16 on older CUDA cards, else fp32; says what it took.

    Returns:
        'bf16', 'fp16' or 'fp32'.
    """
    found = resolve_precision(precision, device)
    if _is_main_process():
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        print(f"on {device}{name} in {found}")
    return found


def resolve_precision(precision: str, device: torch.device) -> str:
    """`pick_precision`, saying nothing."""
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return "bf16" if capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") else "fp32"
    return "fp32"


def autocast(device: torch.device, precision: str) -> AbstractContextManager:
    """Matrix products in `precision` over fp32 weights; for fp32, a context that does nothing."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=DTYPES[precision])


def make_accelerator(device: torch.device, precision: str) -> Accelerator:
    """Accelerate's view of `device` and `precision`; processes come from torchrun or `accelerate launch`.

    Raises:
        UserError: accelerate would compute in another precision.
    """
    mixed_precision = "no" if precision == "fp32" else precision
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=mixed_precision,
        kwargs_handlers=[GradScalerKwargs(init_scale=INITIAL_LOSS_SCALE)],
    )
    if accelerator.distributed_type == DistributedType.FSDP:
        # accelerate 1.15 would round weights, reduced gradients and log-probs to `precision`; autocast is enough
        cast(FullyShardedDataParallelPlugin, accelerator.state.fsdp_plugin).mixed_precision_policy = None
    if accelerator.mixed_precision != mixed_precision:
        # accelerate 1.15 keeps the first precision of a process; under a launcher its own setting could win
        raise UserError(f"precision {precision} was asked for, accelerate runs {accelerator.mixed_precision}")
    require_autocast(accelerator, precision)
    return accelerator


def require_autocast(accelerator: Accelerator, precision: str) -> None:
    """
    Raises:
        UserError: accelerate would compute in fp32 without a word.
    """
    if accelerator.native_amp != (precision != "fp32"):
        where = accelerator.device.type
        raise UserError(f"accelerate has no autocast to {precision} on {where}; name another base.precision")


def loss_scale(accelerator: Accelerator) -> float:
    """By which fp16's scaler multiplies losses: less after a step than before where that step was skipped.

    Accelerate 1.15's own flag stays False with a fused optimizer. 1 where nothing is scaled.
    """
    return accelerator.scaler.get_scale() if accelerator.scaler is not None else 1.0


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer `fetch_base` prepared: with a chat template, an EOS and a pad token other than it.

    Raises:
        UserError: one of the three is missing.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    if tokenizer.chat_template is None:
        raise UserError(f"{folder}: the tokenizer has no chat template; choose an instruction-tuned model")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}: the tokenizer has no EOS token; choose an instruction-tuned model")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(f"{folder}: the pad token must exist and differ from the EOS; run fetch_base again")
    return tokenizer


def load_causal_lm(folder: Path, device: torch.device | None = None) -> PreTrainedModel:
    """The causal language model in `folder`: fp32, eval mode, no dropout, on `device` or the CPU."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    disable_dropout_in_model(model)
    return on_device(model, device).eval()


def on_device(model: PreTrainedModel, device: torch.device | None) -> PreTrainedModel:
    """The model, moved in place; without a device, to the CPU."""
    model.to(device or "cpu")  # pyright: ignore[reportArgumentType]: transformers wraps it without its types
    return model


def freeze(model: Module) -> Module:
    """Eval mode and no gradients: a reference, a reward model or a backbone."""
    return model.eval().requires_grad_(False)


def cast_linear_layers(module: nn.Module, dtype: torch.dtype, but: tuple[str, ...] = ()) -> None:
    """Casts the weights of a frozen module's linear layers, bit for bit as autocast would on every call.

    Norms, embeddings and the layers named in `but` stay as they are. A tied output layer is cut loose from the
    embedding.
    """
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear) and name not in but:
            for part, parameter in layer.named_parameters():
                setattr(layer, part, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))


def own_memory(module: nn.Module) -> None:
    """Copies the parameters out of their memory-mapped checkpoint, whose pages count as this process's memory."""
    for parameter in module.parameters():
        parameter.data = parameter.data.clone()


def save_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
    beside: Mapping[str, Path] = MappingProxyType({}),
) -> None:
    """One safetensors file, configuration and tokenizer: no pickle, no optimizer state, no shards.

    Written beside `folder` and moved in file by file: the old ones may be hard links into DVC's cache, which
    writing in place would change, and a killed or full-disk run leaves no half a model. Of an earlier model's
    folders none stays.

    Args:
        weights: the model's state dict, where the model itself may hold only a part of it; None: its own.
        beside: folders that are copied into `folder`, by their names there.

    Raises:
        NoRoomError: the disk cannot hold the model; `folder` is as it was.
    """
    num_bytes = sum(weight.numel() * weight.element_size() for weight in model.parameters())  # shared ones once
    for rest in folder.parent.glob(f".{folder.name}.*.partial"):  # of a killed process
        shutil.rmtree(rest)
    require_room(folder, num_bytes)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    if weights is not None:  # gathered from parts, tied weights are two tensors
        weights = {name: weight for name, weight in weights.items() if name not in model.all_tied_weights_keys}
    try:
        model.save_pretrained(partial, state_dict=weights, max_shard_size="100GB")
        tokenizer.save_pretrained(partial)
        for name, source in beside.items():
            shutil.copytree(source, partial / name)
        folder.mkdir(exist_ok=True)
        for old in (entry for entry in folder.iterdir() if entry.is_dir()):
            shutil.rmtree(old)
        for file in sorted(partial.iterdir()):
            os.replace(file, folder / file.name)
    except Exception as error:
        if not is_no_room(error):
            raise
        raise NoRoomError(folder, num_bytes) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
