"""A training step of all weights of a Llama in one call of compiled code: `whole.cpp`.

For processors that multiply bf16; elsewhere autograd does it (`training.whole`).

Legend: N = tokens, M = weighed positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.decoder import packed
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.packed import GRID, Address, PackedLlama, Size
from tunesmith.training import step
from tunesmith.training.loss import Scores
from tunesmith.training.work import Assignment, Memory, Work

SOURCE, *INCLUDED = (Path(__file__).with_name(name) for name in ("whole.cpp", "head.h", "layers.h", "attention.h"))


class _Pass(ctypes.Structure):
    _fields_ = [("work", Work), ("flat", Address), ("gradient", Address)]


@cache
def _library() -> ctypes.CDLL | None:
    library = packed.library(SOURCE, *INCLUDED)
    if library is not None:
        for function in (library.tunesmith_whole, library.tunesmith_whole_memory):
            function.argtypes = (ctypes.POINTER(packed.Model), ctypes.POINTER(_Pass))
        library.tunesmith_whole.restype, library.tunesmith_whole_memory.restype = None, Size
    return library


def covers(model: Llama) -> bool:
    """Whether steps of `model` can be done here."""
    return _library() is not None and step.covers(model)


class WholeStep:
    """The weights of a model in training, laid out for steps. Threads may share it."""

    def __init__(self, model: Llama, flat: Tensor) -> None:
        """`covers(model)`, whose weights are views of `flat`, in the order of `Llama.parameters`."""
        library = _library()
        assert library is not None
        assert flat.data_ptr() == model.embedding_VD.data_ptr()
        assert len(flat) == sum(parameter.numel() for parameter in model.parameters())
        self._library, self._flat = library, flat
        self._model = PackedLlama(library, model, trained=True)
        self._memory = Memory()

    def take(self) -> None:
        """The weights as they are now, for the passes to come."""
        self._model.repack()

    def learn(
        self,
        token_ids_N: Tensor,
        row_lengths: Sequence[int],
        *,
        predicting_M: Tensor,
        target_M: Tensor,
        weight_M: Tensor,
        gradient: Tensor,
    ) -> Scores:
        """Scores of the positions; adds the gradient of their weighed loss to `gradient`, which is laid out as `flat`.

        Rows lie one after another. Each token predicts once at most.
        """
        starts = torch.tensor([*accumulate(row_lengths[:-1], initial=0)])
        padded_N = F.pad(token_ids_N, (0, -len(token_ids_N) % GRID))
        assigned = Assignment(padded_N, starts, torch.tensor(row_lengths), predicting_M, target_M, weight_M)
        work = _Pass(assigned.work, self._flat.data_ptr(), gradient.data_ptr())
        work.work.memory = self._memory.room(self._library.tunesmith_whole_memory(self._model.native, work))
        self._library.tunesmith_whole(self._model.native, work)
        return assigned.scores
