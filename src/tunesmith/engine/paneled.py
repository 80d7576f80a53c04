"""The weights of a Llama as compiled steps of the engine multiply with them: one copy for prompts and tokens.

Legend: N = tokens, D = model width, V = vocabulary.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tunesmith.adapters.lora import Lora, Site
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.mapped import release
from tunesmith.decoder.panels import Bits, Panels, sites
from tunesmith.engine import deltas, memory
from tunesmith.engine.blocks import BLOCK_TOKENS
from tunesmith.engine.deltas import PanelAdapter, Shape
from tunesmith.engine.kvcache import Span

SITES: tuple[Site, ...] = ("qkv", "o", "gate_up", "down")
"""Of a layer, in the order of compiled code."""
ROWS_A_THREAD = 48
"""Rows of a product are dealt to threads from so many for each on: below, to hand them over takes as long."""


assert BLOCK_TOKENS == 32, "positions of a block of the cache in attention.h"


class NativeSpan(ctypes.Structure):
    """What compiled code sees of the tokens of a sequence in a step: see `attention.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("first", "tokens", "position", "wanted", "into")),
        ("blocks", ctypes.POINTER(ctypes.c_int32)),
    ]


def native_spans(spans: Sequence[Span], wanted: Sequence[int]) -> ctypes.Array[NativeSpan]:
    """Of sequences whose tokens stand one after another in a step; the last `wanted` of each are to attend."""
    native, first, into = (NativeSpan * len(spans))(), 0, 0
    for one, span, attending in zip(native, spans, wanted, strict=True):
        one.first, one.tokens, one.position = first, span.end - span.start, span.start
        one.wanted, one.into = attending, into
        one.blocks = (ctypes.c_int32 * len(span.blocks))(*span.blocks)
        first, into = first + one.tokens, into + attending
    return native


class PaneledLlama:
    """Weights for steps of one thread at a time, which shares its products out to as many as torch has."""

    def __init__(self, library: ctypes.CDLL, model: Llama, bits: Bits = 32) -> None:
        """Takes over the matrices of a model in fp32, which then has embedding and norms alone.

        `library` has the functions of `fixed.h` and `deltas.h`; `bits` see `Panels`. Raises ValueError as that does.
        """
        room = memory.Pieces()
        self.bits: Bits = bits
        self.shape = Shape.of(model.config)
        self._library, self._slots = deltas.declare(library), memory.Slots()
        self.layers: list[dict[Site, Panels]] = []
        nothing = torch.empty(0)
        for layer, weights in zip(model.layers, sites(model), strict=True):
            self.layers.append(
                {
                    name: Panels(library, weight_OI, bits=bits, room=room)
                    for name, weight_OI in zip(SITES, weights, strict=True)
                }
            )
            release([*layer.qkv_parts, *weights[1:]])
            layer.qkv_parts, layer.o, layer.gate_up, layer.down = [], nothing, nothing, nothing
        self.head = Panels(library, model.head_VD, bits=bits, room=room)
        release([model.head_VD])
        if not model.config.tied:
            model.head_VD = nothing
        self._threads = ThreadPoolExecutor(max(1, torch.get_num_threads()), "products")

    def adapter(self, lora: Lora) -> PanelAdapter:
        """An adapter for steps of this base. Raises ValueError.

        Its factors are in fp32 or in 8 bits: with many adapters a step takes as long as what it reads of them.
        """
        return PanelAdapter(self._library, self.shape, lora, 32 if self.bits == 32 else 8, self._slots)

    def product(self, x: Tensor, weight: Panels, into: Tensor | None = None) -> Tensor:
        """See `Panels`."""
        into = x.new_empty(len(x), weight.columns) if into is None else into
        self.share(len(x), lambda start, end: weight.product(x[start:end], into[start:end]))
        return into

    def share(self, rows: int, work: Callable[[int, int], object]) -> None:
        """Has `work` done for rows from one number to another, parts of them at a time."""
        parts = min(torch.get_num_threads(), rows // ROWS_A_THREAD)
        if parts <= 1:
            work(0, rows)
            return
        ends = [rows * part // parts for part in range(parts + 1)]
        list(self._threads.map(work, ends[:-1], ends[1:]))

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V] of states after the last norm."""
        return self.product(hidden_ND, self.head)
