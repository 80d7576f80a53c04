"""The gradient of one step. Knows model, factors and rows; nothing of optimizers or files.

Legend: N = tokens of a micro-batch, M = positions whose prediction is weighed, D = model width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tunesmith.decoder.base import Decoder
from tunesmith.training.batches import Row
from tunesmith.training.factors import FactorView, TrainableLora
from tunesmith.training.folded import FoldedLlama, covers
from tunesmith.training.loss import Scores, score
from tunesmith.training.metrics import Tally
from tunesmith.training.packing import MICRO_BATCH_TOKENS, MicroBatch, micro_batches
from tunesmith.training.workers import Workers


class Learner:
    """Runs rows forward and backward, on all workers. `beat` is called before each forward pass."""

    def __init__(
        self,
        model: Decoder,
        factors: TrainableLora,
        workers: Workers,
        *,
        beat: Callable[[], None],
        dtype: torch.dtype = torch.float32,
        max_tokens: int = MICRO_BATCH_TOKENS,
    ) -> None:
        """`dtype` is that of the products, as far as `folded.covers` the model; gradients add up in fp32."""
        self._model = model
        self._folded = FoldedLlama(model, factors, dtype) if covers(model) else None
        self._prompt_head_VD = None if dtype == torch.float32 else model.head_VD.to(dtype)
        self._factors = factors
        self._views = [factors.view() for _ in range(workers.count)]
        self._workers = workers
        self._beat = beat
        self._max_tokens = max_tokens

    def learn(self, rows: Sequence[Row], *, prompt_loss_weight: float) -> Tally:
        """Leaves the gradient of the weighted mean loss over `rows` in `factors.flat_gradient`."""
        total = Tally()
        if self._folded is not None:
            self._folded.fold()

        def share(worker: int, indices: list[int]) -> Tally:
            mine = [rows[index] for index in indices]
            return self._learn_share(worker, mine, prompt_loss_weight)

        for tally in self._workers.run(share, rows):
            total.merge(tally)
        gradients = torch.stack([view.flat_gradient for view in self._views])
        torch.sum(gradients, 0, out=self._factors.flat_gradient).div_(total.weight)
        return total

    def _learn_share(self, worker: int, rows: Sequence[Row], prompt_loss_weight: float) -> Tally:
        view, tally = self._views[worker], Tally()
        view.flat_gradient.zero_()
        for batch in micro_batches(rows, prompt_loss_weight=prompt_loss_weight, max_tokens=self._max_tokens):
            self._beat()
            tally.add(batch, self._learn_batch(batch, view))
        return tally

    @torch.no_grad()
    def _learn_batch(self, batch: MicroBatch, view: FactorView) -> Scores:
        def scored(hidden_MD: Tensor, gradient_MD: Tensor) -> Scores:
            return score(self._model, hidden_MD, batch, gradient_MD, prompt_head_VD=self._prompt_head_VD)

        if self._folded is not None:
            return self._folded.learn(batch, view, scored)
        with torch.enable_grad():
            hidden_ND = self._model.hidden(batch.token_ids_N, batch.positions_N, batch.attend, view)
        hidden_MD = hidden_ND.detach()[batch.predicting_M]
        gradient_MD = torch.empty_like(hidden_MD)
        scores = scored(hidden_MD, gradient_MD)
        hidden_ND.backward(torch.zeros_like(hidden_ND).index_copy_(0, batch.predicting_M, gradient_MD))
        return scores
