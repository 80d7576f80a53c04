"""Training on a device other than the processor: what is asked of it, and what only it needs.

Everything else is the same code (`training.folded` with torch's products). Equal folders give equal bytes on the same
device: torch is told to use nothing that adds up in an order of chance.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from tunesmith.errors import InvalidRequest
from tunesmith.training.kernels import Eager, Kernels

MICRO_BATCH_TOKENS = 16_384
"""Of one forward pass: enough to fill a large device. Where memory runs out, half as many are tried (`memory.Room`)."""
_COMPILED = ("norm", "norm_backward", "swiglu", "loss")


def prepare(name: str) -> torch.device:
    """The device of this name (`RunSpec.device`), ready. Raises InvalidRequest where torch finds none of it."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise InvalidRequest(
                f"This job was to be trained on {name}, and torch {torch.__version__} finds no such device: it finds "
                f"{torch.cuda.device_count()} of CUDA. Set TUNESMITH_TRAINER_DEVICE to one that is there, or to cpu.",
                param=None,
            )
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when its library is first used
        torch.use_deterministic_algorithms(True)
    return device


def description(device: torch.device) -> str:
    """What decides last digits there, besides what is installed."""
    return f"{device.type}: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else device.type


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: of the device, and what torch holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def kernels(device: torch.device) -> Kernels:
    """What stands between products: on CUDA each a kernel of its own, made by torch's compiler."""
    return Compiled() if device.type == "cuda" else Eager()


class Compiled(Eager):
    """Implements `Kernels`: a pass over the data each, where `Eager` takes several."""

    def __init__(self) -> None:
        for name in _COMPILED:
            setattr(self, name, torch.compile(getattr(super(), name), dynamic=True))
        self._swiglu_backward = torch.compile(_swiglu_backward, dynamic=True)

    def swiglu_backward(self, gate_up: Tensor, grad_NF: Tensor) -> Tensor:
        """See `Kernels`."""
        return self._swiglu_backward(gate_up, grad_NF)


def _swiglu_backward(gate_up: Tensor, grad_NF: Tensor) -> Tensor:
    """As `Eager` has it, without the results given as arguments that the compiler stumbles over."""
    gate_NF, up_NF = gate_up.float().chunk(2, 1)
    share_NF = gate_NF.sigmoid()
    swish_NF = gate_NF * share_NF
    of_gate_NF = grad_NF * up_NF * (share_NF + swish_NF * (1.0 - share_NF))
    return torch.cat([of_gate_NF, grad_NF * swish_NF], 1).to(gate_up.dtype)
