"""Training on a device other than the processor: what is asked of it, and what only it needs.

Everything else is the same code (`training.folded` with torch's products). Equal folders give equal bytes on the same
device: torch is told to use nothing that adds up in an order of chance.
"""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tunesmith.decoder.base import Decoder
from tunesmith.decoder.llama import Llama
from tunesmith.errors import InvalidRequest
from tunesmith.training.attention import FlashRows, RowAttention, attend
from tunesmith.training.kernels import Eager, Heads, Kernels, RowGroup, Turn
from tunesmith.training.memory import is_lost, is_shortage
from tunesmith.training.passes import LEAST_FRAMED_CELLS

logger = logging.getLogger(__name__)

MICRO_BATCH_TOKENS = 16_384
"""Of one forward pass: enough to fill a large device. Where memory runs out, half as many are tried (`memory.Room`)."""
HELD_SHARE = 0.25
"""Of free memory, what weights laid out for products may take. Where it is not enough they are made for each product
anew, of those that the model has: the numbers are the same, and a step of few tokens takes longer."""
_IN_ONE_ORDER: dict[str, Any] = {"deterministic": True, "split_reductions": False, "dynamic_scale_rblock": False}
"""Of the compiler: how a row is added up depends neither on a clock nor on how many there are."""
LARGEST_DIFFERENCE = 0.02
"""Between two ways to the same numbers in 16 bits, in shares of the largest."""
_COMPILED = ("norm", "norm_backward", "swiglu", "loss")


def prepare(name: str) -> torch.device:
    """The device of this name (`RunSpec.device`), ready. Raises InvalidRequest where torch finds none of it."""
    device = torch.device(name)
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= found:
            raise InvalidRequest(
                f"This job was to be trained on {name}, and torch {torch.__version__} finds no such device: it finds "
                f"{found} of CUDA. Set TUNESMITH_TRAINER_DEVICE to one that is there, or to cpu.",
                param=None,
            )
        # Both are read when they are first needed: sums in one order, and room for passes of many sizes.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.set_float32_matmul_precision("highest")  # whatever the environment says of TF32
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    return device


def description(model: Decoder, dtype: torch.dtype) -> str:
    """What decides last digits of steps of a model on its device."""
    device = model.head_VD.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    by_rows = isinstance(model, Llama) and attention(model, dtype) is not None
    ways = type(kernels(device)).__name__.lower(), "rows" if by_rows else "groups"
    return f"{device.type}: {name}, {', '.join(ways)}, torch {torch.__version__}"


def free_bytes(device: torch.device) -> int:
    """Memory that can still be had: of the device, and what torch holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def has_room(device: torch.device, n_bytes: int) -> bool:
    """Whether a second copy of weights in so many bytes leaves most of the memory to steps."""
    return device.type != "cuda" or n_bytes <= HELD_SHARE * free_bytes(device)


@cache
def kernels(device: torch.device) -> Kernels:
    """What stands between products: on CUDA each a kernel of its own, made by torch's compiler where that works."""
    if device.type != "cuda":
        return Eager()
    try:
        compiled = Compiled()
        compiled.try_out(device)
        return compiled
    except Exception as error:  # its own compilers, a C compiler, Python's headers: much may be missing
        logger.warning("torch's compiler does not work here, and a step takes longer: %s", error)
        return Eager()


def attention(model: Llama, dtype: torch.dtype) -> RowAttention | None:
    """All rows of a pass in one call, where torch has that for the device; None: in groups of similar ones."""
    config = model.config
    return _attention(model.head_VD.device, dtype, Heads(config.heads, config.kv_heads, config.head_width))


@cache
def _attention(device: torch.device, dtype: torch.dtype, heads: Heads) -> RowAttention | None:
    if device.type == "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return None
    try:
        _hold_against_groups(FlashRows(), device, dtype, heads)
        return FlashRows()
    except Exception as error:  # an old GPU, an old torch, heads of a width that its kernel has not
        if is_shortage(error) or (is_lost(error) and not _answers(device)):
            raise
        logger.warning("attention over rows of any lengths does not work here, and a step takes longer: %s", error)
        return None


def _answers(device: torch.device) -> bool:
    """Whether it still computes: some faults are of one kernel, others of all that a process may still ask for."""
    try:
        return float(torch.ones(2, device=device).sum()) == 2.0
    except RuntimeError:
        return False


def _hold_against_groups(way: RowAttention, device: torch.device, dtype: torch.dtype, heads: Heads) -> None:
    """Raises RuntimeError where it gives other numbers than attention by groups, or not the same bits twice."""
    lengths = [1, 130, 17, 64]
    end = sum(lengths)
    starts = torch.tensor([sum(lengths[:index]) for index in range(len(lengths))])
    rows = RowGroup(starts, torch.tensor(lengths), max(lengths), end).to(device)
    # As rows of a frame come (`Pass.framed`): the last without a token, and all said to be longer than they are.
    ends = torch.tensor([end])
    framed = RowGroup(torch.cat([starts, ends]), torch.tensor([*lengths, 0]), LEAST_FRAMED_CELLS, end).to(device)
    angle = torch.arange(max(lengths), device=device)[:, None] / torch.arange(1, heads.width // 2 + 1, device=device)
    turn = Turn(angle.cos(), angle.sin())
    assert max(lengths) < LEAST_FRAMED_CELLS
    chance = torch.Generator().manual_seed(0)
    stacked, inner = (heads.queries + 2 * heads.keys) * heads.width, heads.queries * heads.width
    qkv, grad_N = (torch.randn(end, width, generator=chance).to(device, dtype) for width in (stacked, inner))
    found: list[tuple[Tensor, Tensor]] = []
    for each in (way, way, None):
        out_N, of_qkv = torch.zeros_like(grad_N), torch.zeros_like(qkv)
        attended = (
            attend(Eager(), qkv, rows, turn, heads, out_N)
            if each is None
            else each.attend(qkv, framed if found else rows, turn, heads, out_N)
        )
        attended.backward(grad_N, of_qkv)
        found.append((out_N, of_qkv))
    for one, again, known in zip(*found, strict=True):
        if not bool(torch.equal(one, again)):
            raise RuntimeError("it gives other bits the second time, or in a frame")
        if not bool((one.float() - known.float()).abs().max() <= LARGEST_DIFFERENCE * known.float().abs().max()):
            raise RuntimeError("it gives other numbers than attention by groups")


class Compiled(Eager):
    """Implements `Kernels`: a pass over the data each, where `Eager` takes several."""

    def __init__(self) -> None:
        for name in _COMPILED:
            setattr(self, name, torch.compile(getattr(super(), name), dynamic=True, options=_IN_ONE_ORDER))
        self._swiglu_backward = torch.compile(_swiglu_backward, dynamic=True, options=_IN_ONE_ORDER)

    def try_out(self, device: torch.device) -> None:
        """Compiles some of it. Raises what the compiler raises."""
        normed_ND, _ = self.norm(torch.ones(32, 64, device=device), None, 1e-5, torch.bfloat16)
        self.swiglu_backward(normed_ND, self.swiglu(normed_ND))

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
