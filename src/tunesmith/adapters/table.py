"""Adapters in places of a table, so that a step over tokens of any of them is always the same operations.

What `adapters.stack` does for a batch as it comes, this does where nothing but numbers may differ from step to step.

Legend: N = tokens, S = places, I = inputs of a site, R = the most ranks of any adapter there, O = its outputs,
V = vocabulary, D = model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from torch import Tensor

from tunesmith.adapters.lora import Site
from tunesmith.adapters.stack import PackedAdapter

Pair = tuple[Tensor, Tensor]

PATIENCE = 64
"""Calls that a table lasts for at least before it is given up for one of fewer ranks: laying it out takes as long as
many steps."""


class AdapterTable:
    """Factors of adapters, one below the other. Place 0 adds nothing."""

    def __init__(self, most_bytes: int) -> None:
        """It takes no more than `most_bytes` of memory."""
        self._most_bytes = most_bytes
        self.version = 0
        """Another number whenever the factors came to lie elsewhere."""
        self._layers: tuple[dict[Site, Pair], ...] = ()
        """A [S, I, R] and B [S, R, O]."""
        self._embedding: Pair | None = None
        """A [S, V, R] and B [S, R, D]."""
        self._place_of: WeakKeyDictionary[PackedAdapter, int] = WeakKeyDictionary()
        self._used_at: list[int] = []
        """When each place was asked for last, counted in calls."""
        self._calls = self._laid_out_at = 0

    def places(self, adapters: Sequence[PackedAdapter | None]) -> list[int] | None:
        """Where the factors of each are. They stay there at least until the next call.

        None where so many, of such ranks, would take too much memory, or where there is no room beside what was there
        a moment ago.
        """
        self._calls += 1
        wanted = dict.fromkeys(adapter for adapter in adapters if adapter is not None)
        missing = len(wanted) >= max(1, len(self._used_at))
        if (missing or not all(map(self._holds, wanted))) and not self._lay_out(list(wanted)):
            return None
        known = [adapter for adapter in wanted if adapter in self._place_of]
        for adapter in known:
            self._used_at[self._place_of[adapter]] = self._calls
        for adapter in wanted:
            if adapter not in self._place_of:
                self._put(adapter)
        return [0 if adapter is None else self._place_of[adapter] for adapter in adapters]

    def at(self, places_N: Tensor) -> Placed:
        """The adapters of the tokens of a step."""
        return Placed(self._layers, self._embedding, places_N)

    def _holds(self, adapter: PackedAdapter) -> bool:
        """Whether there is room for its ranks."""
        if not self._layers:
            return False
        pairs = zip(self._tables(), _factors(adapter), strict=True)
        return all(own is None or (table is not None and _ranks(own) <= table[0].shape[2]) for table, own in pairs)

    def _lay_out(self, wanted: Sequence[PackedAdapter]) -> bool:
        """Anew, for these, a quarter more and the ranks there were, if that is not too much: else without the latter.

        All are copied again when they are asked for. Returns whether there is a table for these.
        """
        before, places = self._tables() if self._layers else None, 1 + len(wanted) + len(wanted) // 4
        recent = before is not None and self._calls - self._laid_out_at < PATIENCE
        for known, count in ((before, max(places, len(self._used_at))), *([] if recent else [(None, places)])):
            shapes = list(_shapes(wanted, known or [None] * (1 + sum(map(len, wanted[0].factors)))))
            like = next(pair for pair in _factors(wanted[0]) if pair)[0]
            if count * sum(sum(pair) * ranks for *pair, ranks in shapes) * like.itemsize <= self._most_bytes:
                break
        else:
            return False
        self._layers, self._embedding, before, known = (), None, None, None  # first of all that memory is to be free
        self._place_of, self._used_at = WeakKeyDictionary(), [0] * count
        self.version += 1
        self._laid_out_at = self._calls
        supply = iter(
            (like.new_zeros(count, inputs, ranks), like.new_zeros(count, ranks, outputs)) if ranks else None
            for inputs, outputs, ranks in shapes
        )
        self._embedding = next(supply)
        self._layers = tuple({site: pair for site in layer if (pair := next(supply))} for layer in wanted[0].factors)
        return True

    def _put(self, adapter: PackedAdapter) -> None:
        place = min(range(1, len(self._used_at)), key=self._used_at.__getitem__)
        for other in [other for other, at in self._place_of.items() if at == place]:
            del self._place_of[other]
        for table, own in zip(self._tables(), _factors(adapter), strict=True):
            if table is None:
                continue
            for whole, factor in zip(table, own or (None, None), strict=True):
                whole[place].zero_()
                if factor is not None:
                    rows, columns = factor.shape
                    whole[place, :rows, :columns] = factor
        self._place_of[adapter], self._used_at[place] = place, self._calls

    def _tables(self) -> list[Pair | None]:
        return [self._embedding, *(pair for layer in self._layers for pair in layer.values())]


@dataclass(frozen=True, slots=True)
class Placed:
    """Implements `Adapters`: those of the tokens of a step."""

    layers: tuple[dict[Site, Pair], ...]
    embedding: Pair | None
    places_N: Tensor

    def delta(self, layer: int, site: Site, x_NI: Tensor) -> Tensor:
        """See `Adapters`."""
        a_SIR, b_SRO = self.layers[layer][site]
        low_N1R = x_NI[:, None].bmm(a_SIR[self.places_N])
        return low_N1R.bmm(b_SRO[self.places_N]).squeeze(1)

    def embedding_delta(self, token_ids_N: Tensor) -> Tensor | None:
        """See `Adapters`."""
        if self.embedding is None:
            return None
        a_SVR, b_SRD = self.embedding
        return a_SVR[self.places_N, token_ids_N][:, None].bmm(b_SRD[self.places_N]).squeeze(1)


def _factors(adapter: PackedAdapter) -> Iterator[Pair | None]:
    """The embedding's, and those of each site of each layer."""
    yield adapter.embedding
    for layer in adapter.factors:
        yield from layer.values()


def _shapes(adapters: Sequence[PackedAdapter], tables: Sequence[Pair | None]) -> Iterator[tuple[int, int, int]]:
    """Inputs, outputs and ranks of what holds `adapters`, with no fewer ranks than `tables`; 0: there are none."""
    for table, *own in zip(tables, *map(_factors, adapters), strict=True):
        known = [(len(a_IR), b_RO.shape[1], a_IR.shape[1]) for a_IR, b_RO in filter(None, own)]
        if table is not None:
            known.append((table[0].shape[1], table[1].shape[2], table[0].shape[2]))
        yield max(known, key=lambda sizes: sizes[2], default=(0, 0, 0))


def _ranks(pair: Pair) -> int:
    return pair[0].shape[1]
