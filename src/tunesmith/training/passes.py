"""Pieces of one or more jobs, side by side, for one forward and backward pass. Knows shapes, no model.

A piece is laid out by itself, whatever lies beside it: its tokens are rounded up alone, and its rows are padded to its
own longest. Attention is computed for all pieces of one width at a time. So what a job gets from a pass depends on no
other job in it.

Legend: N = tokens of the pass, rounded up, M = positions whose prediction is weighed, C = those of completion tokens,
B, T = rows and cells of the padded shape, H = heads, d = head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.training.factors import FactorView
from tunesmith.training.packing import MicroBatch

PIECE_ROUNDING, PASS_ROUNDING = 16, 64
"""Tokens are rounded up to a multiple. Products of bf16 over a whole pass are compiled for each shape that they meet,
about 1.5 ms a shape; with fewer than 16 rows the libraries use other kernels, which add up in another order."""
FINE_UP_TO = 128
"""Passes up to so many tokens are rounded as pieces are."""
CELL_ROUNDING = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one job, and where their gradient goes."""

    batch: MicroBatch
    view: FactorView
    share: float
    """One over the weight of all tokens that the job weighs in this step."""


@dataclass(frozen=True, slots=True)
class Pass:
    """Tokens of all pieces one after another."""

    pieces: list[Piece]
    spans: list[slice]
    """Which tokens are those of each piece, the added ones included."""
    token_ids_N: Tensor
    positions_N: Tensor
    cells: list[Cells]
    predicting_M: Tensor
    target_M: Tensor
    weight_M: Tensor
    """As in a `MicroBatch`, times the share of the piece."""
    completion_C: Tensor

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Pass:
        """Sorted by width, so that what is padded alike lies side by side."""
        ordered = sorted(pieces, key=lambda piece: _width(piece.batch))
        starts, end = [], 0
        for piece in ordered:
            starts.append(end)
            end += len(piece.batch.token_ids_N) + _missing(piece.batch)
        spans = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], end], strict=True)]
        pairs = zip(ordered, spans, strict=True)
        groups = [list(group) for _, group in groupby(pairs, lambda pair: _width(pair[0].batch))]
        more = 0 if end <= FINE_UP_TO else -end % PASS_ROUNDING
        batches = [piece.batch for piece in ordered]
        counts = [0, *accumulate(len(batch.predicting_M) for batch in batches)]
        return cls(
            ordered,
            spans,
            F.pad(torch.cat([F.pad(batch.token_ids_N, (0, _missing(batch))) for batch in batches]), (0, more)),
            F.pad(torch.cat([F.pad(batch.positions_N, (0, _missing(batch))) for batch in batches]), (0, more)),
            [Cells.of(group) for group in groups],
            predicting_M=torch.cat([batch.predicting_M + start for batch, start in zip(batches, starts, strict=True)]),
            target_M=torch.cat([batch.target_M for batch in batches]),
            weight_M=torch.cat([piece.batch.weight_M * piece.share for piece in ordered]),
            completion_C=torch.cat([batch.completion_C + at for batch, at in zip(batches, counts, strict=False)]),
        )

    def weighed(self) -> Iterator[slice]:
        """Which of M are those of each piece."""
        end = 0
        for piece in self.pieces:
            start, end = end, end + len(piece.batch.predicting_M)
            yield slice(start, end)


@dataclass(frozen=True, slots=True)
class Cells:
    """Between tokens one after another and the padded shape that attention works on, for pieces of one width.

    Tokens that were added stand at the first cell of their piece and bring nothing.
    """

    span: slice
    shape: tuple[int, int]
    """B, T"""
    token_of_cell: Tensor
    cell_of_token: Tensor
    real_tokens: Tensor
    added_tokens: Tensor

    @classmethod
    def of(cls, group: Sequence[tuple[Piece, slice]]) -> Cells:
        """`group`: pieces of one width, with their tokens, one after another."""
        width, first = _width(group[0][0].batch), group[0][1].start
        token_of_cell, cell_of_token, real, added = [], [], [], []
        n_rows = 0
        for piece, span in group:
            rows, length = piece.batch.token_of_cell_BT.shape
            n_tokens, start, cell = len(piece.batch.token_ids_N), span.start - first, n_rows * width
            token_of_cell.append(F.pad(piece.batch.token_of_cell_BT, (0, width - length)).flatten() + start)
            row, column = piece.batch.cell_of_token_N // length, piece.batch.cell_of_token_N % length
            cell_of_token.append(F.pad(row * width + column, (0, _missing(piece.batch))) + cell)
            real.append(torch.arange(start, start + n_tokens))
            added.append(torch.arange(start + n_tokens, span.stop - first))
            n_rows += rows
        return cls(
            slice(first, group[-1][1].stop),
            (n_rows, width),
            *(torch.cat(parts) for parts in (token_of_cell, cell_of_token, real, added)),
        )

    def pad(self, x_NHd: Tensor) -> Tensor:
        """[B, T, H, d]; no real token attends to what stands in a cell that was added."""
        x_BTHd: Tensor = x_NHd[self.span].index_select(0, self.token_of_cell).unflatten(0, self.shape)
        return x_BTHd

    def unpad(self, x_BTHd: Tensor) -> Tensor:
        """[tokens of the span, H d]"""
        return x_BTHd.flatten(0, 1).index_select(0, self.cell_of_token).flatten(1)

    def pad_gradient(self, x_NHd: Tensor) -> Tensor:
        """[B, T, H, d] with zeros in cells that were added."""
        cells = x_NHd.new_zeros(self.shape[0] * self.shape[1], *x_NHd.shape[1:])
        real = x_NHd[self.span].index_select(0, self.real_tokens)
        cells.index_copy_(0, self.cell_of_token.index_select(0, self.real_tokens), real)
        x_BTHd: Tensor = cells.unflatten(0, self.shape)
        return x_BTHd

    def unpad_gradient(self, x_BTHd: Tensor) -> Tensor:
        """[tokens of the span, H, d] with zeros for tokens that were added."""
        return x_BTHd.flatten(0, 1).index_select(0, self.cell_of_token).index_fill_(0, self.added_tokens, 0.0)


def _missing(batch: MicroBatch) -> int:
    """How many tokens are added to round up."""
    return -len(batch.token_ids_N) % PIECE_ROUNDING


def _width(batch: MicroBatch) -> int:
    length = batch.token_of_cell_BT.shape[1]
    return length + -length % CELL_ROUNDING
