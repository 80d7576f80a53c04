"""`Kernels` as loops of our own: `kernels.cpp`, compiled on the machine that runs it, where it has a compiler."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tunesmith import compiled
from tunesmith.decoder import packed
from tunesmith.rundir import write_bytes
from tunesmith.training.kernels import Eager, Heads, Kernels, RowGroup, Spread, Turn

SOURCE, *INCLUDED = (
    Path(__file__).with_name(name) for name in ("step.cpp", "head.h", "layers.h", "attention.h", "kernels.cpp")
)
"""Whole steps (`training.step`), and what they are made of."""

STEP = "2026-11-30, second"
"""When the arithmetic of a step last changed, so that it gives other last digits."""

_SIZE, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES: dict[str, list[type]] = {
    "norm": [*[_POINTER] * 4, _SIZE, _SIZE, _FLOAT],
    "norm_backward": [*[_POINTER] * 5, _SIZE, _SIZE],
    "swiglu": [*[_POINTER] * 2, _SIZE, _SIZE],
    "swiglu_backward": [*[_POINTER] * 3, _SIZE, _SIZE],
    "spread": [*[_POINTER] * 8, *[_SIZE] * 5, _FLOAT],
    "gather": [*[_POINTER] * 8, *[_SIZE] * 5, _FLOAT],
    "merge": [*[_POINTER] * 4, *[_SIZE] * 4],
    "part": [*[_POINTER] * 4, *[_SIZE] * 4],
    "softmax": [_POINTER, _SIZE, _SIZE],
    "softmax_backward": [*[_POINTER] * 2, _SIZE, _SIZE],
    "loss": [*[_POINTER] * 5, _SIZE, _SIZE],
}
"""The parameters of each function, as in `kernels.cpp`, which has each for both of these."""
_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


class KernelsChanged(RuntimeError):
    """A run began with other kernels than there are now: it would go on with other last digits."""


def available() -> Kernels:
    """Compiled ones, or torch's."""
    return load() or Eager()


def confirm(record: Path, device: str | None = None) -> None:
    """Writes to `record` which kernels a run begins with, or `device`, where it is trained on one.

    Raises KernelsChanged where it began with others.
    """
    found = library() if device is None else None
    kind = device or ("eager" if found is None else "tiles" if packed.library(SOURCE, *INCLUDED) else "fixed")
    kind = f"{kind}, {torch.backends.cpu.get_cpu_capability()}, {STEP}"
    if not record.exists():
        write_bytes(record, kind.encode())
    elif (known := record.read_text()) != kind:
        raise KernelsChanged(
            f"{record}: this run began with other kernels ({known}) than there are here ({kind}): a C++ compiler was "
            "removed or added, this is another processor, or tunesmith was updated; put that back, or fine-tune again"
        )


@cache
def load() -> Native | None:
    """None without a compiler."""
    compiled_here = library()
    return None if compiled_here is None else Native(compiled_here)


def library() -> ctypes.CDLL | None:
    """What is compiled here; None without a compiler (see `compiled.load`)."""
    return compiled.load(SOURCE, *INCLUDED, *packed.HEADERS)


class Native:
    """Implements `Kernels` over the compiled functions; calls let other threads run."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._functions: dict[tuple[str, torch.dtype], Callable[..., None]] = {}
        for name, parameters in _SIGNATURES.items():
            for dtype, suffix in _DTYPES.items():
                function = getattr(library, f"{name}_{suffix}")
                function.argtypes, function.restype = parameters, None
                self._functions[name, dtype] = function

    def norm(self, x_ND: Tensor, added_ND: Tensor | None, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        normed_ND, inverse_N = torch.empty_like(x_ND, dtype=dtype), x_ND.new_empty(len(x_ND))
        self._call("norm", dtype, x_ND, added_ND, normed_ND, inverse_N, *x_ND.shape, epsilon)
        return normed_ND, inverse_N

    def norm_backward(self, grad_normed_ND: Tensor, normed_ND: Tensor, inverse_N: Tensor, grad_ND: Tensor) -> Tensor:
        """See `Kernels`."""
        rounded_ND, dtype = torch.empty_like(normed_ND), normed_ND.dtype
        parts = (grad_normed_ND, normed_ND, inverse_N, grad_ND, rounded_ND)
        self._call("norm_backward", dtype, *parts, *normed_ND.shape)
        return rounded_ND

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See `Kernels`."""
        product_NF = gate_up.new_empty(len(gate_up), gate_up.shape[1] // 2)
        self._call("swiglu", gate_up.dtype, gate_up, product_NF, *product_NF.shape)
        return product_NF

    def swiglu_backward(self, gate_up: Tensor, grad_NF: Tensor) -> Tensor:
        """See `Kernels`."""
        grad_gate_up = torch.empty_like(gate_up)
        self._call("swiglu_backward", gate_up.dtype, gate_up, grad_NF, grad_gate_up, *grad_NF.shape)
        return grad_gate_up

    def spread(self, qkv: Tensor, rows: RowGroup, turn: Turn, heads: Heads) -> Spread:
        """See `Kernels`."""
        stacks, group = len(rows.start_B) * heads.keys, heads.queries // heads.keys
        shapes = [(stacks, group * rows.cells, heads.width), *[(stacks, rows.cells, heads.width)] * 2]
        spread = Spread(*(qkv.new_empty(shape) for shape in shapes))
        self._turn("spread", qkv, spread, rows, turn, heads)
        return spread

    def gather(self, spread: Spread, rows: RowGroup, turn: Turn, heads: Heads, into: Tensor) -> None:
        """See `Kernels`."""
        self._turn("gather", into, spread, rows, turn, heads)

    def merge(self, out: Tensor, rows: RowGroup, heads: Heads, into: Tensor) -> None:
        """See `Kernels`."""
        self._move("merge", out, rows, heads, into)

    def part(self, grad_N: Tensor, rows: RowGroup, heads: Heads) -> Tensor:
        """See `Kernels`."""
        stacks, group = len(rows.start_B) * heads.keys, heads.queries // heads.keys
        grad = grad_N.new_empty(stacks, group * rows.cells, heads.width)
        self._move("part", grad, rows, heads, grad_N)
        return grad

    def softmax(self, score: Tensor) -> Tensor:
        """See `Kernels`."""
        cells = score.shape[2]
        self._call("softmax", score.dtype, score, score.numel() // cells**2, cells)
        return score

    def softmax_backward(self, grad: Tensor, weights: Tensor) -> Tensor:
        """See `Kernels`."""
        cells = grad.shape[2]
        self._call("softmax_backward", grad.dtype, grad, weights, grad.numel() // cells**2, cells)
        return grad

    def loss(self, logits_MV: Tensor, target_M: Tensor, weight_M: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        nll_M, right_M = torch.empty_like(weight_M), torch.empty_like(weight_M, dtype=torch.bool)
        parts = (logits_MV, target_M, weight_M, nll_M, right_M)
        self._call("loss", logits_MV.dtype, *parts, *logits_MV.shape)
        return nll_M, right_M

    def _turn(self, name: str, qkv: Tensor, spread: Spread, rows: RowGroup, turn: Turn, heads: Heads) -> None:
        tensors = (qkv, rows.start_B, rows.length_B, turn.cos, turn.sin, spread.q, spread.k, spread.v)
        sizes = (len(rows.start_B), rows.cells, heads.queries, heads.keys, heads.width)
        self._call(name, qkv.dtype, *tensors, *sizes, heads.width**-0.5)

    def _move(self, name: str, cells: Tensor, rows: RowGroup, heads: Heads, tokens: Tensor) -> None:
        sizes = (len(rows.start_B), rows.cells, heads.queries, heads.width)
        self._call(name, cells.dtype, cells, rows.start_B, rows.length_B, tokens, *sizes)

    def _call(self, name: str, dtype: torch.dtype, *arguments: Tensor | float | None) -> None:
        plain: list[int | float | None] = []
        for argument in arguments:
            if isinstance(argument, Tensor):
                assert argument.is_contiguous()
                plain.append(argument.data_ptr())
            else:
                plain.append(argument)
        self._functions[name, dtype](*plain)
