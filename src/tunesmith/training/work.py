"""What compiled steps of a Llama read and where their losses go: `layers.h` has the same structure.

Legend: N = tokens, a multiple of `GRID`, M = weighed positions.
"""

from __future__ import annotations

import ctypes
import threading

import torch
from torch import Tensor

from tunesmith.decoder.packed import Address, Size
from tunesmith.training.loss import Scores


class Work(ctypes.Structure):
    """Addresses, which hold on to nothing."""

    _fields_ = [
        *((name, Size) for name in ("tokens", "rows", "positions")),
        *((name, Address) for name in ("token_ids", "row_start", "row_length", "predicting", "target", "weight")),
        *((name, Address) for name in ("nll", "right", "memory")),
    ]


class Assignment:
    """The tokens of a step, and room for the scores of its positions."""

    def __init__(
        self,
        token_ids_N: Tensor,
        row_start: Tensor,
        row_length: Tensor,
        predicting_M: Tensor,
        target_M: Tensor,
        weight_M: Tensor,
    ) -> None:
        """Tokens outside of rows are computed and count for nothing."""
        self.scores = Scores(torch.empty(len(target_M)), torch.empty(len(target_M), dtype=torch.bool))
        self._kept = (token_ids_N, row_start, row_length, predicting_M, target_M, weight_M)
        tensors = (*self._kept, self.scores.nll_M, self.scores.right_M)
        assert all(tensor.is_contiguous() for tensor in tensors)
        sizes = (len(token_ids_N), len(row_start), len(target_M))
        self.work = Work(*sizes, *(tensor.data_ptr() for tensor in tensors))
        """Valid as long as this object is there."""


class Memory:
    """Memory of each thread, kept from step to step: new memory has to be cleared by the system."""

    def __init__(self) -> None:
        self._own = threading.local()

    def room(self, size: int) -> int:
        """The address of so many bytes; what was there before may be gone."""
        memory: Tensor | None = getattr(self._own, "bytes", None)
        if memory is None or len(memory) < size:
            self._own.bytes = memory = None  # what there was has to make room first
            self._own.bytes = memory = torch.empty(size, dtype=torch.uint8)
        return memory.data_ptr()
