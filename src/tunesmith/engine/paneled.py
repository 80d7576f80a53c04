"""The weights of a Llama in fp32 as compiled steps of the engine multiply with them: one copy for prompts and tokens.

Legend: N = tokens, D = model width, V = vocabulary.
"""

from __future__ import annotations

import ctypes
import itertools
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from tunesmith.adapters.lora import Site
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.mapped import release
from tunesmith.decoder.panels import Panels, sites

SITES: tuple[Site, ...] = ("qkv", "o", "gate_up", "down")
"""Of a layer, in the order of compiled code."""
ROWS_A_THREAD = 48
"""Rows of a product are dealt to threads from so many for each on: below, to hand them over takes as long."""


class PaneledLlama:
    """Weights for steps of one thread at a time, which shares its products out to as many as torch has."""

    def __init__(self, library: ctypes.CDLL, model: Llama) -> None:
        """Takes over the matrices of a model in fp32, which then has embedding and norms alone.

        `library` has the functions of `panels.h`.
        """
        self.layers: list[dict[Site, Panels]] = []
        nothing = torch.empty(0)
        for layer, weights in zip(model.layers, sites(model), strict=True):
            self.layers.append(
                {name: Panels(library, weight_OI) for name, weight_OI in zip(SITES, weights, strict=True)}
            )
            release([*layer.qkv_parts, *weights[1:]])
            layer.qkv_parts, layer.o, layer.gate_up, layer.down = [], nothing, nothing, nothing
        self.head = Panels(library, model.head_VD)
        release([model.head_VD])
        if not model.config.tied:
            model.head_VD = nothing
        self._threads = ThreadPoolExecutor(max(1, torch.get_num_threads()), "products")

    def product(self, x: Tensor, weight: Panels, into: Tensor | None = None) -> Tensor:
        """See `Panels`."""
        parts = min(torch.get_num_threads(), len(x) // ROWS_A_THREAD)
        if parts <= 1:
            return weight.product(x, into)
        into = x.new_empty(len(x), weight.columns) if into is None else into
        ends = [len(x) * part // parts for part in range(parts + 1)]
        dealt = [(x[start:end], into[start:end]) for start, end in itertools.pairwise(ends)]
        list(self._threads.map(lambda part: weight.product(*part), dealt))
        return into

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """[N, V] of states after the last norm."""
        return self.product(hidden_ND, self.head)
