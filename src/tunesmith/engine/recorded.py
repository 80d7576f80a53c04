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
from tunesmith.decoder.base import to_device
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.replays import Recorder, Replays, recurring
from tunesmith.engine.blocks import BLOCK_TOKENS
from tunesmith.engine.kvcache import KVCache, Span

HEADER = 3
"""Numbers of a sequence before those of its blocks: its token, its position, the place of its adapter."""
MOST_FILLED = 2
SPARE_BLOCKS = 256
"""Each sequence is read as if it were as long as the longest. That may come to twice the blocks there are, and some."""
TABLE_SHARE = 0.125
"""Of a GPU's memory, what the table of adapters may take."""
TABLE_BYTES = 1 << 30
"""And of that of a device which does not say how much it has."""


class RecordedStep:
    """Steps of one base. For one thread."""

    def __init__(self, weights: Llama, cache: KVCache, recorder: Recorder | None) -> None:
        """`cache` is that of the base."""
        self._weights, self._cache = weights, cache
        self._replays, self._table = Replays(recorder), AdapterTable(_most_bytes(cache.device))
        self._lying: tuple[int, int] = (0, 0)

    def __call__(
        self, token_ids: Sequence[int], spans: Sequence[Span], adapters: Sequence[PackedAdapter | None]
    ) -> tuple[Tensor, Tensor] | None:
        """States after the last norm [., D], and logits [., V], of the last token of each span, which is given.

        None where it is not worth it: sequences of very different lengths, or adapters that take too much memory.
        """
        own = [span.blocks[: -(-span.end // BLOCK_TOKENS)] for span in spans]
        rows, blocks = recurring(len(spans), 1), recurring(max(map(len, own)), 1)
        if rows * blocks > MOST_FILLED * sum(map(len, own)) + SPARE_BLOCKS:
            return None
        adapted = any(adapters)
        places = self._table.places(adapters) if adapted else [0] * len(spans)
        if places is None:
            return None
        self._cache.reserve(spans)
        if self._lying != (self._cache.version, self._table.version):
            self._replays.clear()
            self._lying = self._cache.version, self._table.version
        # Places behind the last block are not looked at, and rows behind the last sequence are the first once more.
        numbers = [
            [token_id, span.start, place, *taken, *[taken[0]] * (blocks - len(taken))]
            for token_id, span, place, taken in zip(token_ids, spans, places, own, strict=True)
        ]
        numbers += [numbers[0]] * (rows - len(spans))
        step = to_device(torch.tensor(numbers), self._cache.device)
        hidden_BD, logits_BV = self._replays.run(adapted, [step], self._adapted if adapted else self._plain)
        return hidden_BD[: len(spans)], logits_BV[: len(spans)]

    def _plain(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._compute(*inputs, adapted=False)

    def _adapted(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return self._compute(*inputs, adapted=True)

    def _compute(self, step: Tensor, *, adapted: bool) -> Sequence[Tensor]:
        """`step` [B, 3 + b], int64; states [B, D] and logits [B, V]."""
        token_ids_B, positions_B, places_B = step[:, :HEADER].unbind(1)
        attention = self._cache.attend_next(step[:, HEADER:], positions_B)
        adapters = self._table.at(places_B) if adapted else None
        hidden_BD = self._weights.hidden(token_ids_B, positions_B, attention, adapters)
        return hidden_BD, self._weights.logits(hidden_BD)


def _most_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return TABLE_BYTES
    return int(TABLE_SHARE * torch.cuda.get_device_properties(device).total_memory)
