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


class AdapterTable:
    """Factors of adapters, one below the other. Place 0 adds nothing."""

    def __init__(self) -> None:
        self.version = 0
        """Another number whenever the factors came to lie elsewhere."""
        self._layers: tuple[dict[Site, Pair], ...] = ()
        """A [S, I, R] and B [S, R, O]."""
        self._embedding: Pair | None = None
        """A [S, V, R] and B [S, R, D]."""
        self._place_of: WeakKeyDictionary[PackedAdapter, int] = WeakKeyDictionary()
        self._used_at: list[int] = []
        """When each place was asked for last, counted in calls."""
        self._calls = 0

    def places(self, adapters: Sequence[PackedAdapter | None]) -> list[int]:
        """Where the factors of each are. They stay there at least until the next call."""
        self._calls += 1
        wanted = dict.fromkeys(adapter for adapter in adapters if adapter is not None)
        if not all(map(self._holds, wanted)) or len(wanted) >= max(1, len(self._used_at)):
            self._lay_out(list(wanted))
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

    def _lay_out(self, wanted: Sequence[PackedAdapter]) -> None:
        """Anew, for these and as many again: all are copied again when they are asked for."""
        places = max(len(self._used_at), 1 << len(wanted).bit_length())
        made: list[Pair | None] = []
        tables = self._tables() if self._layers else [None] * (1 + sum(map(len, wanted[0].factors)))
        for table, *own in zip(tables, *map(_factors, wanted), strict=True):
            ranks = max([0 if table is None else table[0].shape[2], *(_ranks(pair) for pair in own if pair)])
            like = next((pair for pair in own if pair), None)
            if like is not None:
                a_IR, b_RO = like
                made.append((a_IR.new_zeros(places, len(a_IR), ranks), b_RO.new_zeros(places, ranks, b_RO.shape[1])))
            elif table is not None:
                a_SIR, b_SRO = table
                made.append((a_SIR.new_zeros(places, *a_SIR.shape[1:]), b_SRO.new_zeros(places, *b_SRO.shape[1:])))
            else:
                made.append(None)
        supply = iter(made)
        self._embedding = next(supply)
        self._layers = tuple({site: pair for site in layer if (pair := next(supply))} for layer in wanted[0].factors)
        self._place_of, self._used_at = WeakKeyDictionary(), [0] * places
        self.version += 1

    def _put(self, adapter: PackedAdapter) -> None:
        place = min(range(1, len(self._used_at)), key=self._used_at.__getitem__)
        for other in [other for other, at in self._place_of.items() if at == place]:
            del self._place_of[other]
        self._place_of[adapter], self._used_at[place] = place, self._calls
        for table, own in zip(self._tables(), _factors(adapter), strict=True):
            if table is None:
                continue
            for whole, factor in zip(table, own or (None, None), strict=True):
                whole[place].zero_()
                if factor is not None:
                    rows, columns = factor.shape
                    whole[place, :rows, :columns] = factor

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


def _ranks(pair: Pair) -> int:
    return pair[0].shape[1]
