"""A training step of a Llama in one call of compiled code, on processors that multiply bf16: `step.cpp`.

What `training.folded` does with torch's products, for any jobs side by side. What stands between two products costs as
much as the products there; here a step is two to three times faster
(docs/design/decisions/training-step.md). Elsewhere steps are those of `training.folded`.

Legend: M = weighed positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from weakref import WeakKeyDictionary

from torch import Tensor

from tunesmith.decoder import packed
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.packed import GRID, Address, Count, PackedLlama, Size
from tunesmith.training import native
from tunesmith.training.factors import TrainableLora
from tunesmith.training.loss import Scores
from tunesmith.training.passes import Pass, Piece
from tunesmith.training.work import Assignment, Memory, Work


class _Piece(ctypes.Structure):
    _fields_ = [
        ("start", Size),
        ("tokens", Size),
        *((name, Address) for name in ("flat", "gradient", "packed")),
        ("rank", Count),
        ("embedding_rank", Count),
        ("scale", ctypes.c_float),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [("work", Work), ("pieces", Size), ("piece", ctypes.POINTER(_Piece))]


@cache
def _library() -> ctypes.CDLL | None:
    library = packed.library(native.SOURCE, *native.INCLUDED)
    if library is not None:
        for function in (library.tunesmith_step, library.tunesmith_step_memory):
            function.argtypes = (ctypes.POINTER(packed.Model), ctypes.POINTER(_Pass))
        library.tunesmith_step.restype, library.tunesmith_step_memory.restype = None, Size
    return library


def available() -> bool:
    """Whether this machine can."""
    return _library() is not None


def covers(model: Llama) -> bool:
    """Whether steps of `model` can be done here."""
    return available() and packed.covers(model)


class CompiledLlama:
    """The frozen weights of a model, laid out for steps. Threads may share it."""

    shares = True
    """A pass may hold pieces of several jobs."""

    def __init__(self, model: Llama) -> None:
        """`covers(model)`."""
        library = _library()
        assert library is not None
        self._library = library
        self._model = PackedLlama(library, model, trained=True)
        self._factors: WeakKeyDictionary[TrainableLora, Tensor] = WeakKeyDictionary()
        self._memory = Memory()

    def take(self, factors: TrainableLora, *, single: bool) -> None:
        """The factors of a job as they are now, for the passes of a step, be they of that job alone or of several."""
        lora, known = factors.lora, self._factors.get(factors)
        self._factors[factors] = self._model.pack_factors(factors.flat, lora.rank, lora.scale, known)

    def learn(self, pieces: Sequence[Piece], *, single: bool) -> tuple[Pass, Scores]:
        """A pass over `pieces`, whose factors were taken: adds the gradient of its loss to their views."""
        work = Pass.of(pieces, grid=GRID)
        rows = work.rows()
        numbers = (work.predicting_M, work.target_M, work.weight_M)
        assigned = Assignment(work.token_ids_N, rows.start_B, rows.length_B, *numbers)
        native_pieces = (_Piece * len(pieces))()
        for native_piece, piece, span in zip(native_pieces, pieces, work.spans, strict=True):
            factors = piece.view.owner
            native_piece.start, native_piece.tokens = span.start, span.stop - span.start
            native_piece.flat, native_piece.gradient = factors.flat.data_ptr(), piece.view.flat_gradient.data_ptr()
            native_piece.packed, native_piece.rank = self._factors[factors].data_ptr(), factors.lora.rank
            native_piece.embedding_rank = 0 if factors.lora.embedding is None else factors.lora.rank
            native_piece.scale = factors.lora.scale
        step = _Pass(assigned.work, len(pieces), native_pieces)
        step.work.memory = self._memory.room(self._library.tunesmith_step_memory(self._model.native, step))
        self._library.tunesmith_step(self._model.native, step)
        return work, assigned.scores
