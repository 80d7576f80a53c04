"""Many adapters in one forward pass: each token gets the delta of its own adapter, or none.

Tokens of one adapter lie together (a segment). A long segment is two ordinary products; short ones of equal length,
as when many sequences generate at once, are stacked and go through two batched products together.

Legend: N = tokens, S = segments stacked, T = tokens of a segment, I = inputs of a site, R = ranks of its linear layers
one after another, O = its outputs, V = vocabulary, D = model width.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.adapters.lora import Lora, LowRank, Site

STACKED_TOKENS = 4
"""Longer segments are not stacked: copying their factors together costs more than the calls it saves."""
STACKS_KEPT = 4
"""A batch that generates keeps its composition for many steps; copying its factors each step would cost as much as
the products."""


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class PackedAdapter:
    """One adapter, its factors of each site as two matrices: `x A B` is the delta, scale included."""

    factors: tuple[dict[Site, tuple[Tensor, Tensor]], ...]
    """By layer: A [I, R] and B [R, O], which is block-diagonal where a site is several linear layers."""
    embedding: tuple[Tensor, Tensor] | None = None
    """A [V, R] and B [R, D], where the adapter covers the embedding."""

    @classmethod
    def from_lora(cls, lora: Lora, dtype: torch.dtype, device: torch.device | str) -> PackedAdapter:
        """The same adapter, in the precision of the model that it is for."""
        packed = []
        for layer, names in enumerate(lora.layout.layers):
            sites: dict[Site, tuple[Tensor, Tensor]] = {}
            for site in names:
                a_IR, b_RO = _side_by_side(lora.parts(layer, site), lora.scale)
                sites[site] = (a_IR.to(device, dtype), b_RO.to(device, dtype))
            packed.append(sites)
        if lora.embedding is None:
            return cls(tuple(packed))
        a_VR, b_RD = lora.embedding.a_RI.T, lora.embedding.b_OR.T * lora.scale
        return cls(tuple(packed), (a_VR.to(device, dtype).contiguous(), b_RD.to(device, dtype).contiguous()))


def _side_by_side(parts: Sequence[LowRank], scale: float) -> tuple[Tensor, Tensor]:
    """A [I, R], and B [R, O] times `scale`, block-diagonal, in as few operations as can be: models come and go."""
    a_IR = torch.cat([part.a_RI.T for part in parts], 1)
    b_RO = a_IR.new_zeros(a_IR.shape[1], sum(len(part.b_OR) for part in parts))
    row = column = 0
    for part in parts:
        outputs, rank = part.b_OR.shape
        torch.mul(part.b_OR.T, scale, out=b_RO[row : row + rank, column : column + outputs])
        row, column = row + rank, column + outputs
    return a_IR, b_RO


Segment = tuple[PackedAdapter, int]
"""An adapter and how many tokens it has."""
Stack = tuple[dict[Site, tuple[Tensor, Tensor]], ...]
"""By layer: A [S, I, R] and B [S, R, O]."""


class AdapterStacks:
    """Makes mixtures, and keeps the stacked factors of the latest."""

    def __init__(self) -> None:
        self._stacks: OrderedDict[tuple[PackedAdapter, ...], Stack] = OrderedDict()

    def mix(self, plain_tokens: int, segments: Sequence[Segment]) -> Mixture | None:
        """The adapters of a batch: first `plain_tokens` without one, then the segments in order.

        Neighbouring segments of equal length share products, so put equal ones side by side.
        """
        runs, start = [], plain_tokens
        for group in _alike(segments):
            tokens = group[0][1]
            adapters = tuple(adapter for adapter, _ in group)
            runs.append(_Run(start, len(group), tokens, self._stack(adapters), adapters))
            start += len(group) * tokens
        return Mixture(plain_tokens, start, tuple(runs)) if runs else None

    def _stack(self, adapters: tuple[PackedAdapter, ...]) -> Stack:
        if len(adapters) == 1:
            return _stack(adapters)  # views of one adapter's factors: nothing to keep
        if adapters not in self._stacks:
            self._stacks[adapters] = _stack(adapters)
            if len(self._stacks) > STACKS_KEPT:
                self._stacks.popitem(last=False)
        self._stacks.move_to_end(adapters)
        return self._stacks[adapters]


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring segments of equal length."""

    start: int
    segments: int
    tokens: int
    stack: Stack
    adapters: tuple[PackedAdapter, ...]


@dataclass(frozen=True, slots=True)
class Mixture:
    """The adapters of one batch of tokens; what `Adapters` asks."""

    plain_tokens: int
    tokens: int
    runs: tuple[_Run, ...]

    def delta(self, layer: int, site: Site, x_NI: Tensor) -> Tensor:
        """See `Adapters`."""
        outputs = self.runs[0].stack[layer][site][1].shape[-1]
        delta_NO = x_NI.new_empty(self.tokens, outputs)
        delta_NO[: self.plain_tokens] = 0
        for run in self.runs:
            a_SIR, b_SRO = run.stack[layer][site]
            rows = slice(run.start, run.start + run.segments * run.tokens)
            x_STI = x_NI[rows].view(run.segments, run.tokens, -1)
            torch.bmm(torch.bmm(x_STI, a_SIR), b_SRO, out=delta_NO[rows].view(run.segments, run.tokens, outputs))
        return delta_NO

    def add(self, layer: int, site: Site, x_NI: Tensor, into_NO: Tensor) -> None:
        """Adds `delta` in place."""
        for run in self.runs:
            a_SIR, b_SRO = run.stack[layer][site]
            rows = slice(run.start, run.start + run.segments * run.tokens)
            low_STR = torch.bmm(x_NI[rows].view(run.segments, run.tokens, -1), a_SIR)
            into_NO[rows].view(run.segments, run.tokens, -1).baddbmm_(low_STR, b_SRO)

    def embedding_delta(self, token_ids_N: Tensor) -> Tensor | None:
        """See `Adapters`. Not stacked: it is one look-up a pass, and A is as long as the vocabulary."""
        delta_ND: Tensor | None = None
        for run in self.runs:
            for index, adapter in enumerate(run.adapters):
                if adapter.embedding is None:
                    continue
                a_VR, b_RD = adapter.embedding
                if delta_ND is None:
                    delta_ND = b_RD.new_zeros(self.tokens, b_RD.shape[1])
                start = run.start + index * run.tokens
                rows = slice(start, start + run.tokens)
                torch.mm(F.embedding(token_ids_N[rows], a_VR), b_RD, out=delta_ND[rows])
        return delta_ND


def _alike(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    for tokens, group in itertools.groupby(segments, key=lambda segment: segment[1]):
        if tokens <= STACKED_TOKENS:
            yield list(group)
        else:
            yield from ([segment] for segment in group)


def _stack(adapters: tuple[PackedAdapter, ...]) -> Stack:
    return tuple(
        {site: _stack_site(adapters, layer, site) for site in sites} for layer, sites in enumerate(adapters[0].factors)
    )


def _stack_site(adapters: tuple[PackedAdapter, ...], layer: int, site: Site) -> tuple[Tensor, Tensor]:
    pairs = [adapter.factors[layer][site] for adapter in adapters]
    if len(pairs) == 1:
        a_IR, b_RO = pairs[0]
        return a_IR[None], b_RO[None]
    ranks = max(a_IR.shape[1] for a_IR, _ in pairs)  # smaller ones are filled up with zeros, which add nothing
    a_SIR = torch.stack([F.pad(a_IR, (0, ranks - a_IR.shape[1])) for a_IR, _ in pairs])
    b_SRO = torch.stack([F.pad(b_RO, (0, 0, 0, ranks - b_RO.shape[0])) for _, b_RO in pairs])
    return a_SIR, b_SRO
