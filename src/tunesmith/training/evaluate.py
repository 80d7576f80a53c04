"""What a model says of rows, without learning from them: losses, log-probabilities, class probabilities."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tunesmith.adapters.lora import Adapters
from tunesmith.decoder.base import Decoder
from tunesmith.training.batches import Row
from tunesmith.training.loss import Head, measure
from tunesmith.training.memory import Room
from tunesmith.training.metrics import Tally
from tunesmith.training.packing import MicroBatch, micro_batches
from tunesmith.training.workers import Workers, deal

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Evaluator:
    """A model with its adapters, as it is now."""

    model: Decoder
    adapters: Adapters | None
    workers: Workers
    beat: Callable[[], None]
    """Called before each forward pass."""
    room: Room
    prompt_head: Head | None = None
    """See `loss.measure`."""

    def tally(self, rows: Sequence[Row], *, prompt_loss_weight: float) -> Tally:
        """Loss and accuracies over `rows`."""
        return _total([tally for _, _, tally in self._each(self._tally, rows, prompt_loss_weight)])

    def completion_logprobs(self, rows: Sequence[Row]) -> list[list[float]]:
        """Log-probabilities of the completion tokens of each row, nats, in fp32."""
        found: list[list[float]] = [[] for _ in rows]

        def nll(batch: MicroBatch, hidden_MD: Tensor) -> Tensor:
            return measure(self.model, hidden_MD, batch).nll_M.cpu()

        for indices, batch, nll_M in self._each(nll, rows, prompt_loss_weight=0.0):
            for index, part in zip(indices, nll_M.split(batch.completion_lengths), strict=True):
                found[index] = part.neg().tolist()
        return found

    def classified(
        self, rows: Sequence[Row], class_ids: Sequence[int], *, prompt_loss_weight: float
    ) -> tuple[Tally, NDArray[np.float64]]:
        """What `tally` says, and the probability of each class for each row, [rows, classes].

        It is that of the first token of the completion, normalised over the classes.
        """
        found = np.empty((len(rows), len(class_ids)))

        def both(batch: MicroBatch, hidden_MD: Tensor) -> tuple[Tally, NDArray[np.float64]]:
            firsts = list(accumulate(batch.completion_lengths[:-1], initial=0))
            logits = self.model.logits(hidden_MD[batch.completion_C[firsts]], class_ids)
            return self._tally(batch, hidden_MD), logits.double().softmax(1).cpu().numpy()

        measured = self._each(both, rows, prompt_loss_weight)
        for indices, _, (_, each) in measured:
            found[indices] = each
        return _total([tally for _, _, (tally, _) in measured]), found

    def _tally(self, batch: MicroBatch, hidden_MD: Tensor) -> Tally:
        tally = Tally()
        tally.add(batch, measure(self.model, hidden_MD, batch, self.prompt_head))
        return tally

    def _each(
        self, measure: Callable[[MicroBatch, Tensor], T], rows: Sequence[Row], prompt_loss_weight: float
    ) -> list[tuple[list[int], MicroBatch, T]]:
        """`measure(batch, hidden_MD)` of every micro-batch, with the indices of its rows among `rows`."""

        @torch.inference_mode()
        def share(max_tokens: int, indices: list[int]) -> list[tuple[list[int], MicroBatch, T]]:
            measured = []
            mine = [rows[index] for index in indices]
            device = self.model.head_VD.device
            for batch in micro_batches(
                mine, prompt_loss_weight=prompt_loss_weight, max_tokens=max_tokens, device=device
            ):
                self.beat()
                hidden_ND = self.model.hidden(batch.token_ids_N, batch.positions_N, batch.attend, self.adapters)
                value = measure(batch, hidden_ND[batch.predicting_M])
                measured.append(([indices[source] for source in batch.source], batch, value))
            return measured

        def all_shares(max_tokens: int) -> list[tuple[list[int], MicroBatch, T]]:
            at_once = self.workers.at_once(self.model.head_VD.device)
            shares = deal([len(row.token_ids) for row in rows], min(at_once, len(rows)))
            parts = self.workers.each(partial(share, max_tokens), shares)
            return [entry for entries in parts for entry in entries]

        return self.room.fit(all_shares)


def _total(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for tally in tallies:
        total.merge(tally)
    return total
