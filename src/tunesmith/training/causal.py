"""Attention of a training step in fp32, and its gradient, by compiled code of ours: `causal.h` beside this.

Nothing is computed for keys that a query does not see, and nothing is kept of a row but a number for each query and
head. It takes a half to a third of the time of torch's batched products (docs/design/decisions/training-step.md).

Legend: N = tokens, H, K = query and key/value heads, d = head width.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from tunesmith.decoder.panels import Floats, Size
from tunesmith.training.kernels import HeadNorms, Heads, RowGroup, Turn


class _Causal(ctypes.Structure):
    _fields_ = [
        *((name, Size) for name in ("rows", "tokens")),
        *((name, Floats) for name in ("start", "length", "asking")),
        *((name, Size) for name in ("heads", "kv_heads", "width")),
        *((name, Floats) for name in ("cos", "sin", "q_norm", "k_norm")),
        ("epsilon", ctypes.c_float),
        *((name, Floats) for name in ("qkv", "out", "log_total", "grad_out", "grad_qkv")),
    ]


def declare(library: ctypes.CDLL) -> None:
    """Its functions in a library that has them."""
    for name in ("attend_rows", "attend_rows_back"):
        function = getattr(library, f"tunesmith_{name}")
        function.argtypes, function.restype = [ctypes.POINTER(_Causal)], None


@dataclass(frozen=True, slots=True)
class CausalRows:
    """Implements `attention.RowAttention`."""

    library: ctypes.CDLL
    asks: ClassVar[bool] = True

    def attend(
        self,
        qkv: Tensor,
        rows: RowGroup,
        turn: Turn,
        heads: Heads,
        into: Tensor,
        norms: HeadNorms | None = None,
        asking_B: Tensor | None = None,
    ) -> _Attended:
        """See `RowAttention`. All of it is fp32."""
        log_total = qkv.new_empty(heads.queries, len(qkv))
        attended = _Attended(self.library, qkv, rows, asking_B, turn, heads, norms, into, log_total)
        self.library.tunesmith_attend_rows(attended.native())
        return attended


@dataclass(frozen=True, slots=True)
class _Attended:
    """Implements `attention.Attended`."""

    library: ctypes.CDLL
    qkv: Tensor
    rows: RowGroup
    asking_B: Tensor | None
    turn: Turn
    heads: Heads
    norms: HeadNorms | None
    out: Tensor
    log_total: Tensor
    """[H, N], of what each softmax was added up to."""

    def native(self, grad_N: Tensor | None = None, into: Tensor | None = None) -> _Causal:
        """What compiled code is given."""
        norms = self.norms
        before = (self.turn.cos, self.turn.sin, *((None, None) if norms is None else (norms.q_d, norms.k_d)))
        tensors = (self.qkv, self.out, self.log_total, grad_N, into)
        for each in (*before, *tensors):
            assert each is None or (each.is_contiguous() and each.dtype == torch.float32)
        return _Causal(
            len(self.rows.start_B),
            len(self.qkv),
            *map(_address, (self.rows.start_B, self.rows.length_B, self.asking_B)),
            *(self.heads.queries, self.heads.keys, self.heads.width),
            *map(_address, before),
            0.0 if norms is None else norms.epsilon,
            *map(_address, tensors),
        )

    def backward(self, grad_N: Tensor, into: Tensor) -> None:
        """See `Attended`."""
        self.library.tunesmith_attend_rows_back(self.native(grad_N, into))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
