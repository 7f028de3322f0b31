"""CPU tensors that pass for a GPU's: what a device would refuse, and what would wait for it, shows without one."""

import sys
from collections import Counter

import torch
from torch import Tensor

#: what makes the host wait for the device, or copies from pageable memory
WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"}


class OnGpu(Tensor):
    """A tensor that says it is on a CUDA device; what is computed from it is one, too, until it is copied to the host.

    `waits` counts, by name, the calls for which the host would have to wait.
    """

    waits: Counter[str] = Counter()
    refuses_float64 = False

    @property
    def is_cuda(self) -> bool:
        return True

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in WAITS:
            OnGpu.waits[name] += 1
        out = super().__torch_function__(function, types, args, kwargs or {})
        if name == "cpu":
            return out.as_subclass(Tensor)
        if OnGpu.refuses_float64 and isinstance(out, OnGpu) and out.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64"
            )
        return out


def on_gpu(tensor: Tensor) -> Tensor:
    """The same values, said to be on a GPU."""
    return tensor.as_subclass(OnGpu)


def install(set_attribute, capability: tuple[int, int], refuses_float64: bool) -> None:
    """Makes every packed batch lie on a faked card, and with it what models and losses make of it.

    Args:
        set_attribute: setattr, or monkeypatch.setattr.
        capability: compute capability of the card; from (8, 0) on it would need FlashAttention itself.
    """
    from stages.lib.model import packing

    moved = packing.PackedBatch.to

    def to(self, device):
        batch = vars(moved(self, device))
        return packing.PackedBatch(**{k: on_gpu(v) if isinstance(v, Tensor) else v for k, v in batch.items()})

    set_attribute(packing.PackedBatch, "to", to)
    set_attribute(OnGpu, "refuses_float64", refuses_float64)
    set_attribute(torch.cuda, "get_device_capability", lambda device=None: capability)
    for module in list(sys.modules.values()):  # on cards whole sequences are packed
        if getattr(module, "shares_prefixes", None) is packing.shares_prefixes and module is not packing:
            set_attribute(module, "shares_prefixes", lambda device: False)
    set_attribute(packing, "shares_prefixes", lambda device: False)
