"""A step of generation on a device, recorded once for each of a few shapes (`decoder.replays`).

One token of each sequence, whatever their adapters. What differs from step to step comes as one tensor of numbers.

Legend: B = sequences, rounded up, b = blocks of the longest, rounded up, D = model width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.adapters.stack import PackedAdapter
from tunesmith.adapters.table import AdapterTable
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.replays import Recorder, Replays, power, recurring, to_device
from tunesmith.engine.blocks import BLOCK_TOKENS
from tunesmith.engine.kvcache import KVCache, Span

HEADER = 3
"""Numbers of a sequence before those of its blocks: its token, its position, the place of its adapter."""


class RecordedStep:
    """Steps of one base. For one thread."""

    def __init__(self, weights: Llama, cache: KVCache, recorder: Recorder | None) -> None:
        """`cache` is that of the base; from now on it lies where it is."""
        self._weights, self._cache = weights, cache
        self._replays, self._table = Replays(recorder), AdapterTable()
        self._spare = cache.settle()

    def __call__(
        self, token_ids: Sequence[int], spans: Sequence[Span], adapters: Sequence[PackedAdapter | None]
    ) -> tuple[Tensor, Tensor]:
        """States after the last norm [., D], and logits [., V], of the last token of each span, which is given."""
        plain = not any(adapters)
        places = [0] * len(spans) if plain else self._table.places(adapters)
        blocks = recurring(max(-(-span.end // BLOCK_TOKENS) for span in spans), 1)
        rows = [[0, 0, 0, *[self._spare] * blocks] for _ in range(power(len(spans)))]
        for row, token_id, span, place in zip(rows, token_ids, spans, places, strict=False):
            own = span.blocks[: -(-span.end // BLOCK_TOKENS)]
            row[: HEADER + len(own)] = token_id, span.start, place, *own
        step = to_device(torch.tensor(rows), self._cache.device)
        key = None if plain else self._table.version
        hidden_BD, logits_BV = self._replays.run(key, [step], self._plain if plain else self._adapted)
        return hidden_BD[: len(spans)], logits_BV[: len(spans)]

    def _plain(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._compute(*inputs, adapted=False)

    def _adapted(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._compute(*inputs, adapted=True)

    def _compute(self, step: Tensor, *, adapted: bool) -> Sequence[Tensor]:
        token_ids_B, positions_B, places_B = step[:, :HEADER].unbind(1)
        attention = self._cache.attend_next(step[:, HEADER:], positions_B)
        adapters = self._table.at(places_B) if adapted else None
        hidden_BD = self._weights.hidden(token_ids_B, positions_B, attention, adapters)
        return hidden_BD, self._weights.logits(hidden_BD)
