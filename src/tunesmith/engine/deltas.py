"""Adapters as compiled steps over panels read them, and which tokens of a step each has: `deltas.h` beside this.

Legend: R = rank, V = vocabulary, D = model width, O, I = outputs and inputs of a linear layer.
"""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.adapters.lora import Lora
from tunesmith.decoder.llama import LlamaConfig
from tunesmith.decoder.panels import HEADERS as MATRICES
from tunesmith.decoder.panels import Bits, Floats, Size
from tunesmith.engine import memory

HEADERS = (*(Path(__file__).with_name(name) for name in ("deltas.h", "attention.h")), *MATRICES)
"""What sources of steps over panels include."""


class Shape(ctypes.Structure):
    """Of a model."""

    _fields_ = [(name, ctypes.c_int32) for name in ("width", "layers", "heads", "kv_heads", "head_width", "feed_width")]

    @classmethod
    def of(cls, config: LlamaConfig) -> Shape:
        """Those of a model."""
        counts = (config.width, config.layers, config.heads, config.kv_heads, config.head_width)
        return cls(*counts, config.feed_forward_width)


class _Adapter(ctypes.Structure):
    _fields_ = [
        ("packed", Floats),
        *((name, Size) for name in ("rank", "bits", "embedding_rank")),
        *((name, Floats) for name in ("embedding_a", "embedding_b")),
    ]


class _Group(ctypes.Structure):
    _fields_ = [("adapter", ctypes.POINTER(_Adapter)), ("tokens", Size), ("token", ctypes.POINTER(Size))]


class Groups(ctypes.Structure):
    """Which tokens of a step have which adapter."""

    _fields_ = [("groups", Size), ("group", ctypes.POINTER(_Group))]

    @classmethod
    def of(cls, adapters: Sequence[PanelAdapter | None], lengths: Sequence[int]) -> Groups:
        """Of so many tokens of each adapter, one after another."""
        tokens: defaultdict[PanelAdapter, list[int]] = defaultdict(list)
        start = 0
        for adapter, length in zip(adapters, lengths, strict=True):
            if adapter is not None:
                tokens[adapter] += range(start, start + length)
            start += length
        groups = (_Group * len(tokens))()
        for group, (adapter, mine) in zip(groups, tokens.items(), strict=True):
            group.adapter, group.tokens = ctypes.pointer(adapter.native), len(mine)
            group.token = (Size * len(mine))(*mine)
        return cls(len(groups), groups)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """A library whose source includes `deltas.h`, its functions of that declared."""
    shape = ctypes.POINTER(Shape)
    library.tunesmith_adapter_size.argtypes, library.tunesmith_adapter_size.restype = (shape, Size, Size), Size
    library.tunesmith_pack_adapter.argtypes = (shape, Floats, Size, ctypes.c_float, Size, Floats)
    library.tunesmith_pack_adapter.restype = None
    return library


class PanelAdapter:
    """An adapter for steps of one base."""

    def __init__(self, library: ctypes.CDLL, shape: Shape, lora: Lora, bits: Bits, slots: memory.Slots) -> None:
        """Its factors have so many `bits`, whatever the base's matrices have, and lie in memory of `slots`.

        Raises ValueError for numbers that are not finite, which fixed point does not have.
        """
        parts = [lora.parts(layer, site) for layer, sites in enumerate(lora.layout.layers) for site in sites]
        factors = [torch.cat([getattr(part, name) for part in site]) for site in parts for name in ("a_RI", "b_OR")]
        flat = torch.cat([factor.flatten() for factor in factors]).float()
        if bits != 32 and not bool(torch.isfinite(flat).all()):
            raise ValueError("the adapter has weights that are not finite numbers")
        self._packed = slots.take(library.tunesmith_adapter_size(shape, lora.rank, bits), self)
        library.tunesmith_pack_adapter(shape, flat.data_ptr(), lora.rank, lora.scale, bits, self._packed.data_ptr())
        self.native = _Adapter(packed=self._packed.data_ptr(), rank=lora.rank, bits=bits)
        self._embedding: list[Tensor] = []
        if lora.embedding is not None:
            a_VR, b_RD = lora.embedding.a_RI.T.float(), lora.embedding.b_OR.T.float() * lora.scale
            self._embedding = [a_VR.contiguous(), b_RD.contiguous()]
            self.native.embedding_rank = a_VR.shape[1]
            self.native.embedding_a, self.native.embedding_b = (factor.data_ptr() for factor in self._embedding)
