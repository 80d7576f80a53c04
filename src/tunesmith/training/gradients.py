"""The gradient of one step, for one job or for many at once. Knows model, factors and rows; nothing of optimizers.

What a job gets depends on nothing but its own rows: they are shared out and cut into pieces alone, jobs of many tokens
are computed alone, and those of few side by side (`training.passes`).

Legend: M = positions whose prediction is weighed, N = tokens, D = model width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch

from tunesmith.decoder import replays
from tunesmith.decoder.base import Decoder
from tunesmith.decoder.llama import Llama
from tunesmith.training import device as of_device
from tunesmith.training import panels, step
from tunesmith.training.batches import Row
from tunesmith.training.factors import FactorView, TrainableLora
from tunesmith.training.folded import FoldedLlama, covers
from tunesmith.training.frozen import FrozenWeights, PlainWeights
from tunesmith.training.kernels import Kernels
from tunesmith.training.loss import Head, PlainHead, Scores, score
from tunesmith.training.metrics import Tally
from tunesmith.training.native import available
from tunesmith.training.packing import MICRO_BATCH_TOKENS, MicroBatch, micro_batches
from tunesmith.training.panels import PanelWeights
from tunesmith.training.passes import Pass, Piece
from tunesmith.training.step import CompiledLlama
from tunesmith.training.workers import Workers, deal

ALONE_FROM_TOKENS = 192
"""From so many tokens in a step on, a job is computed alone, with its factors in the dtype of the products: they fill
products by themselves (docs/design/decisions/training-step.md)."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """What one job learns in one step."""

    factors: TrainableLora
    rows: Sequence[Row]
    prompt_loss_weight: float
    max_tokens: int = MICRO_BATCH_TOKENS
    """Of a micro-batch."""

    @property
    def n_tokens(self) -> int:
        """Of all rows."""
        return sum(len(row.token_ids) for row in self.rows)


@dataclass(frozen=True, slots=True)
class _Share:
    """The part of a lesson that one thread takes."""

    lesson: int
    pieces: list[Piece]
    tally: Tally

    @property
    def n_tokens(self) -> int:
        return sum(len(piece.batch.token_ids_N) for piece in self.pieces)


class Learner:
    """Runs rows forward and backward, on all workers. `beat` is called before each forward pass."""

    def __init__(
        self,
        model: Decoder,
        site_outputs: Sequence[list[int]],
        workers: Workers,
        *,
        beat: Callable[[], None],
        dtype: torch.dtype = torch.float32,
        kernels: Kernels | None = None,
    ) -> None:
        """`dtype` is that of the products, as far as `folded.covers` the model; gradients add up in fp32. int16 is
        fixed point, where that is compiled, and fp32 elsewhere. Without `kernels`, the best that are available.

        `site_outputs` are those of every job's `TrainableLora`: they follow from the model.
        """
        self._model = model
        self._device = device = model.head_VD.device
        self._by_hand: CompiledLlama | FoldedLlama | None = None
        # On a processor norms of heads are for attention row by row, so in fixed point where bf16 was asked for.
        normed = isinstance(model, Llama) and model.config.qk_norm and device.type == "cpu"
        by_rows = normed and kernels is None and panels.library() is not None
        if by_rows and dtype == torch.bfloat16:
            dtype = torch.int16
        if covers(model) and (by_rows or not normed):
            if device.type != "cpu":
                chosen = kernels or of_device.kernels(device)
                free_bytes = partial(of_device.free_bytes, device) if device.type == "cuda" else None
                dtype = torch.float32 if dtype == torch.int16 else dtype
                held = of_device.has_room(device, model.config.matrix_numbers * dtype.itemsize)
                attention = of_device.attention(model, dtype)
                plain = PlainWeights(model, site_outputs, dtype, chosen, held=held, attention=attention)
                recorded = None if attention is None else replays.Replays(replays.recorder_of(device))
                self._by_hand = FoldedLlama(model, plain, chosen, free_bytes, recorded)
            elif kernels is None and dtype == torch.bfloat16 and step.covers(model):
                self._by_hand = CompiledLlama(model)
            else:
                chosen = kernels or available()
                weights = _laid_out(model, site_outputs, dtype, chosen, compiled=kernels is None)
                self._by_hand = FoldedLlama(model, weights, chosen)
        by_autograd = self._by_hand is None and dtype == torch.bfloat16
        self._prompt_head_VD = model.head_VD.to(dtype) if by_autograd else None
        self._workers = workers
        self._beat = beat

    @cached_property
    def prompt_head(self) -> Head | None:
        """That of steps, for what is measured of tokens that weigh little; None: it is the model's own."""
        if isinstance(self._by_hand, FoldedLlama):
            return self._by_hand.head
        coarse_VD = self._prompt_head_VD
        if self._by_hand is not None:  # which has it in tiles
            coarse_VD = self._model.head_VD.to(torch.bfloat16)
        return None if coarse_VD is None else PlainHead(coarse_VD)

    def learn(self, lessons: Sequence[Lesson]) -> list[Tally]:
        """Leaves the gradient of the weighted mean loss over each lesson's rows in its `factors.flat_gradient`."""
        shares = [self._shares(index, lesson) for index, lesson in enumerate(lessons)]
        together: list[_Share] = []
        for lesson, mine in zip(lessons, shares, strict=True):
            if self._by_hand is None:
                self._workers.each(self._by_autograd, mine)
                continue
            alone = lesson.n_tokens >= ALONE_FROM_TOKENS or not self._by_hand.shares
            self._by_hand.take(lesson.factors, single=alone)
            if alone:
                self._workers.each(self._alone, mine)
            else:
                together += mine
        if together:
            most = min(lessons[share.lesson].max_tokens for share in together)
            loads = deal([share.n_tokens for share in together], min(self._workers.threads, len(together)))
            work = [[together[index] for index in load] for load in loads]
            self._workers.each(partial(self._together, max_tokens=most), work, sharing=False)
        return [_added_up(lesson.factors, mine) for lesson, mine in zip(lessons, shares, strict=True)]

    def _shares(self, index: int, lesson: Lesson) -> list[_Share]:
        rows = lesson.rows
        dealt = deal([len(row.token_ids) for row in rows], min(self._workers.at_once(self._device), len(rows)))
        cut = [
            micro_batches(
                [rows[index] for index in indices],
                prompt_loss_weight=lesson.prompt_loss_weight,
                max_tokens=lesson.max_tokens,
            )
            for indices in dealt
        ]
        weight = sum(float(batch.weight_M.double().sum()) for batches in cut for batch in batches)
        views = lesson.factors.views(len(cut))
        return [
            _Share(index, [Piece(batch.to(self._device), view, 1 / weight) for batch in batches], Tally())
            for view, batches in zip(views, cut, strict=True)
        ]

    def _together(self, shares: Sequence[_Share], max_tokens: int) -> None:
        tallies = {id(piece): share.tally for share in shares for piece in share.pieces}
        for share in shares:
            share.pieces[0].view.begin()
        for pieces in _passes(shares, max_tokens):
            work, scores = self._scored(pieces, single=False)
            for piece, weighed in zip(work.pieces, work.weighed(), strict=True):
                tallies[id(piece)].add(piece.batch, Scores(scores.nll_M[weighed], scores.right_M[weighed]))

    def _alone(self, share: _Share) -> None:
        share.pieces[0].view.begin()
        # Counted last: to read what a device has computed is to wait for it.
        scored = [(piece.batch, self._scored([piece], single=True)[1]) for piece in share.pieces]
        for batch, scores in scored:
            share.tally.add(batch, scores)

    def _scored(self, pieces: Sequence[Piece], *, single: bool) -> tuple[Pass, Scores]:
        assert self._by_hand is not None
        self._beat()
        return self._by_hand.learn(pieces, single=single)

    def _by_autograd(self, share: _Share) -> None:
        share.pieces[0].view.begin()
        for piece in share.pieces:
            self._beat()
            share.tally.add(piece.batch, self._differentiated(piece.batch, piece.view, piece.share))

    def _differentiated(self, batch: MicroBatch, view: FactorView, share: float) -> Scores:
        hidden_ND = self._model.hidden(batch.token_ids_N, batch.positions_N, batch.attend, view)
        with torch.no_grad():
            hidden_MD = hidden_ND.detach()[batch.predicting_M]
            gradient_MD = torch.empty_like(hidden_MD)
            scores = score(self._model, hidden_MD, batch, gradient_MD, prompt_head_VD=self._prompt_head_VD)
            gradient_ND = torch.zeros_like(hidden_ND).index_copy_(0, batch.predicting_M, gradient_MD.mul_(share))
        hidden_ND.backward(gradient_ND)
        return scores


def _laid_out(
    model: Llama, site_outputs: Sequence[list[int]], dtype: torch.dtype, kernels: Kernels, *, compiled: bool
) -> FrozenWeights:
    library = panels.library() if compiled and dtype != torch.bfloat16 else None
    if library is None:
        return PlainWeights(model, site_outputs, torch.float32 if dtype == torch.int16 else dtype, kernels)
    # Fixed point has no infinity: in fp32 a loss that is no number says that the base is none.
    fixed = dtype == torch.int16 and all(bool(torch.isfinite(weight).all()) for weight in model.parameters())
    return PanelWeights(library, model, kernels, 16 if fixed else 32)


def _passes(shares: Sequence[_Share], max_tokens: int) -> Iterator[list[Piece]]:
    """All pieces, as many at a time as there is room for; those of one share one after another."""
    waiting = [list(share.pieces) for share in shares]
    while waiting := [pieces for pieces in waiting if pieces]:
        room = max_tokens
        taken: list[Piece] = []
        for pieces in waiting:
            n_tokens = len(pieces[0].batch.token_ids_N)
            if not taken or n_tokens <= room:
                taken.append(pieces.pop(0))
                room -= n_tokens
        yield taken


def _added_up(factors: TrainableLora, shares: Sequence[_Share]) -> Tally:
    total = Tally()
    for share, view in zip(shares, factors.views(len(shares)), strict=True):
        total.merge(share.tally)
        if view.flat_gradient is not factors.flat_gradient:
            factors.flat_gradient.add_(view.flat_gradient)
    return total
