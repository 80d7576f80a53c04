"""Pieces of one or more jobs, side by side, for one forward and backward pass. Knows shapes, no model.

A piece is laid out by itself, whatever lies beside it: its tokens are rounded up alone, and so are the groups of rows
whose attention is computed at once; groups of one width are then joined across pieces. So what a job gets from a pass
depends on no other job in it.

Legend: N = tokens of the pass, rounded up, M = positions whose prediction is weighed, C = those of completion tokens,
B = rows of a group.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.decoder.replays import power, recurring
from tunesmith.training.attention import SQUARES, grouped
from tunesmith.training.factors import FactorView
from tunesmith.training.kernels import CELL_ROUNDING, RowGroup
from tunesmith.training.packing import MicroBatch

PIECE_ROUNDING = 16
PASS_ROUNDING = ((128, 16), (512, 32), (1_024, 64))
LARGEST_ROUNDING = 128
"""Tokens are rounded up to a multiple; a pass of up to so many tokens to the second number. Products of bf16 over a
whole pass are compiled for each shape that they meet, about 1 ms a shape; with fewer than 16 rows the libraries use
other kernels, which add up in another order."""
MOST_FRAMED_TOKENS = 2_048
"""More keep a GPU busy for longer than it takes to ask it for them."""
LEAST_FRAMED_TOKENS = 64
LEAST_FRAMED_CELLS = 256
LEAST_FRAMED_POSITIONS = 16


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
    predicting_M: Tensor
    target_M: Tensor
    weight_M: Tensor
    """As in a `MicroBatch`, times the share of the piece."""
    completion_C: Tensor

    @classmethod
    def of(cls, pieces: Sequence[Piece], *, grid: int | None = None) -> Pass:
        """All tokens of each, one after another, rounded up to a multiple of `grid`, or as torch's products like it."""
        batches = [piece.batch for piece in pieces]
        missing = [-len(batch.token_ids_N) % (grid or PIECE_ROUNDING) for batch in batches]
        padded = [F.pad(batch.token_ids_N, (0, more)) for batch, more in zip(batches, missing, strict=True)]
        *starts, end = accumulate(map(len, padded), initial=0)
        if grid is None:
            more = -end % next((rounding for most, rounding in PASS_ROUNDING if end <= most), LARGEST_ROUNDING)
            padded.append(padded[0].new_zeros(more))
        counts = accumulate((len(batch.predicting_M) for batch in batches), initial=0)
        return cls(
            list(pieces),
            [slice(start, stop) for start, stop in pairwise([*starts, end])],
            torch.cat(padded),
            predicting_M=torch.cat([batch.predicting_M + start for batch, start in zip(batches, starts, strict=True)]),
            target_M=torch.cat([batch.target_M for batch in batches]),
            weight_M=torch.cat([piece.batch.weight_M * piece.share for piece in pieces]),
            completion_C=torch.cat([batch.completion_C + at for batch, at in zip(batches, counts, strict=False)]),
        )

    @classmethod
    def framed(cls, piece: Piece) -> tuple[Pass, RowGroup]:
        """A piece alone, and its rows without a gap, in few shapes that come again.

        Behind its tokens others follow as one more row, and rows without tokens. Positions that are added, all of them
        that of the last token of that row, weigh nothing.
        """
        batch, lengths = piece.batch, piece.batch.row_lengths
        n_tokens, n_positions = len(batch.token_ids_N), len(batch.predicting_M)
        framed = recurring(n_tokens + 1, LEAST_FRAMED_TOKENS)
        # Most tokens predict something that is weighed, or few do: else there would be shapes of every sort.
        few = max(power(n_positions), LEAST_FRAMED_POSITIONS)
        more, positions = framed - n_tokens, (few if few <= framed // 2 else framed) - n_positions
        empty = power(len(lengths) + 1) - len(lengths) - 1
        starts = [*accumulate(lengths, initial=0), *[framed] * empty]
        cells = max(power(max(*lengths, more)), LEAST_FRAMED_CELLS)
        rows = RowGroup(torch.tensor(starts), torch.tensor([*lengths, more, *[0] * empty]), cells, framed)
        work = cls(
            [piece],
            [slice(0, framed)],
            F.pad(batch.token_ids_N, (0, more)),
            predicting_M=F.pad(batch.predicting_M, (0, positions), value=framed - 1),
            target_M=F.pad(batch.target_M, (0, positions)),
            weight_M=F.pad(batch.weight_M * piece.share, (0, positions)),
            completion_C=batch.completion_C,
        )
        return work, rows.to(batch.token_ids_N.device)

    def groups(self) -> list[RowGroup]:
        """Rows whose attention is computed at once."""
        batches, device = [piece.batch for piece in self.pieces], self.token_ids_N.device
        # What squares take in the caches of a processor is no matter elsewhere, and each group is some calls.
        squares = SQUARES if device.type == "cpu" else math.inf
        return [group.to(device) for group in _row_groups(batches, [span.start for span in self.spans], squares)]

    def rows(self) -> RowGroup:
        """All of them. On a device without a gap: what is added behind a piece counts as more of its last row."""
        lengths = [length for piece in self.pieces for length in piece.batch.row_lengths]
        starts = [
            span.start + before
            for piece, span in zip(self.pieces, self.spans, strict=True)
            for before in accumulate(piece.batch.row_lengths[:-1], initial=0)
        ]
        device, end = self.token_ids_N.device, None
        if device.type != "cpu":
            end = len(self.token_ids_N)
            lengths = [after - start for start, after in pairwise([*starts, end])]
        return RowGroup(torch.tensor(starts), torch.tensor(lengths), max(lengths), end).to(device)

    def asking(self, rows: RowGroup) -> Tensor:
        """Of each of `rows`, all of them, the place of the first token that predicts something weighed [B].

        Its length without one.
        """
        end = torch.tensor([len(self.token_ids_N)])
        predicting_M1 = torch.cat([self.predicting_M, end])
        first_B = predicting_M1[torch.searchsorted(self.predicting_M, rows.start_B)] - rows.start_B
        return first_B.minimum(rows.length_B)

    def weighed(self) -> Iterator[slice]:
        """Which of M are those of each piece."""
        end = 0
        for piece in self.pieces:
            start, end = end, end + len(piece.batch.predicting_M)
            yield slice(start, end)


def _row_groups(batches: Sequence[MicroBatch], starts: Sequence[int], squares: float) -> list[RowGroup]:
    """`starts`: the first token of each batch in the pass. `squares`: see `grouped`."""
    by_cells: defaultdict[int, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for batch, start in zip(batches, starts, strict=True):
        row_starts = [start + before for before in accumulate(batch.row_lengths, initial=0)]
        for first, end, cells in grouped(batch.row_lengths, CELL_ROUNDING, squares):
            # A group of a single piece has a place of its own, so that it stays as small as it was made.
            key = cells if len(batches) > 1 else -first
            by_cells[key][0].extend(row_starts[first:end])
            by_cells[key][1].extend(batch.row_lengths[first:end])
    groups = by_cells.values()
    return [RowGroup(torch.tensor(at), torch.tensor(n), max(n) + -max(n) % CELL_ROUNDING) for at, n in groups]
