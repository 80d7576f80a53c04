"""Steps of the engine in bf16, in one call of compiled code, on processors that multiply tiles of it: `tiles.cpp`.

Prompts and single tokens, of any sequences and adapters, go through the model together; keys and values lie in the
cache as tiles, so a cache belongs to these steps alone. Numbers differ from those of fp32 as bf16 does
(docs/design/decisions/decode.md), and a sequence's do not depend on what is computed beside it.

Legend: N = tokens of a step, B = rows of logits, D = model width, V = vocabulary, R = rank, O, I = outputs and inputs.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.adapters.lora import Lora
from tunesmith.decoder import packed
from tunesmith.decoder.base import Decoder
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.packed import GRID, Address, Count, PackedLlama, Size
from tunesmith.engine.blocks import BLOCK_TOKENS
from tunesmith.engine.kvcache import KVCache, Span

SOURCE = Path(__file__).with_name("tiles.cpp")
TOKENS_A_THREAD = 64
"""A step is dealt to threads from so many tokens for each on: each reads all weights."""


class _Adapter(ctypes.Structure):
    _fields_ = [
        *((name, Address) for name in ("packed", "embedding_a", "embedding_b")),
        ("rank", Count),
        ("scale", ctypes.c_float),
    ]


class _Span(ctypes.Structure):
    _fields_ = [
        ("start", Size),
        ("tokens", Size),
        ("position", Size),
        ("blocks", ctypes.POINTER(Count)),
        ("adapter", ctypes.POINTER(_Adapter)),
    ]


class _Work(ctypes.Structure):
    _fields_ = [
        ("tokens", Size),
        ("spans", Size),
        ("token_ids", Address),
        ("span", ctypes.POINTER(_Span)),
        ("keys", ctypes.POINTER(Address)),
        ("values", ctypes.POINTER(Address)),
        ("hidden", Address),
    ]


@cache
def _library() -> ctypes.CDLL | None:
    library = packed.library(SOURCE)
    if library is not None:
        model = ctypes.POINTER(packed.Model)
        library.tunesmith_engine_step.argtypes = (model, ctypes.POINTER(_Work))
        library.tunesmith_logits.argtypes = (model, Address, Size, Address)
        library.tunesmith_engine_step.restype = library.tunesmith_logits.restype = None
    return library


def covers(weights: Decoder) -> bool:
    """Whether steps of a base, whose weights are given in fp32, can be done here."""
    return isinstance(weights, Llama) and _library() is not None and packed.covers(weights)


class TiledAdapter:
    """The factors of an adapter, packed for one base."""

    def __init__(self, model: PackedLlama, lora: Lora) -> None:
        """Raises ValueError for factors that are not all numbers: they would spoil what is computed beside them."""
        parts = [lora.parts(layer, site) for layer, sites in enumerate(lora.layout.layers) for site in sites]
        factors = [torch.cat([getattr(part, name) for part in site]) for site in parts for name in ("a_RI", "b_OR")]
        flat = torch.cat([factor.flatten() for factor in factors]).float()
        embedding = [] if lora.embedding is None else [lora.embedding.a_RI.T, lora.embedding.b_OR]
        self._embedding = [factor.float().contiguous() for factor in embedding]
        if not all(bool(torch.isfinite(values).all()) for values in (flat, *self._embedding)):
            raise ValueError("the adapter has weights that are not finite numbers")
        self._packed = model.pack_factors(flat, lora.rank, lora.scale)
        self.native = _Adapter(packed=self._packed.data_ptr(), rank=lora.rank, scale=lora.scale)
        if self._embedding:
            self.native.embedding_a, self.native.embedding_b = (factor.data_ptr() for factor in self._embedding)


class TiledStep:
    """Steps of one base. For one thread."""

    def __init__(self, weights: Llama, cache: KVCache) -> None:
        """`covers(weights)`; `cache`, of bf16, is that of the base."""
        library = _library()
        assert library is not None
        self._library = library
        self._model = PackedLlama(library, weights, trained=False)
        self._cache = cache
        self._width, self._vocabulary = weights.config.width, weights.config.vocabulary_size
        self._threads = ThreadPoolExecutor(max(1, torch.get_num_threads()), "step")

    def adapter(self, lora: Lora) -> TiledAdapter:
        """An adapter for steps of this base. Raises ValueError."""
        return TiledAdapter(self._model, lora)

    def hidden(
        self, tokens: Sequence[Sequence[int]], spans: Sequence[Span], adapters: Sequence[TiledAdapter | None]
    ) -> Tensor:
        """Last states [N, D], fp32, of the tokens of each sequence one after another; stores keys and values."""
        keys, values = ((Address * len(each))(*(x.data_ptr() for x in each)) for each in self._cache.reserve(spans))
        n_tokens = sum(map(len, tokens))
        ends = list(itertools.accumulate(map(len, tokens), initial=0))

        def run(members: range) -> Tensor:
            mine = list(itertools.chain.from_iterable(tokens[i] for i in members))
            whole = -(-len(mine) // GRID) * GRID
            ids, hidden = torch.tensor(mine + [0] * (whole - len(mine))), torch.empty(whole, self._width)
            native = (_Span * len(members))()
            for span, index in zip(native, members, strict=True):
                adapter = adapters[index]
                span.start, span.tokens = ends[index] - ends[members.start], len(tokens[index])
                span.position = spans[index].start
                span.blocks = (Count * len(spans[index].blocks))(*spans[index].blocks)
                if adapter is not None:
                    span.adapter = ctypes.pointer(adapter.native)
            work = _Work(whole, len(members), ids.data_ptr(), native, keys, values, hidden.data_ptr())
            self._library.tunesmith_engine_step(self._model.native, work)
            return hidden[: len(mine)]

        dealt = _deal(ends, min(torch.get_num_threads(), max(1, n_tokens // TOKENS_A_THREAD)))
        return run(dealt[0]) if len(dealt) == 1 else torch.cat(list(self._threads.map(run, dealt)))

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """[B, V], fp32."""
        hidden_BD = hidden_BD.contiguous()
        logits_BV = torch.empty(len(hidden_BD), self._vocabulary)
        arguments = (hidden_BD.data_ptr(), len(hidden_BD), logits_BV.data_ptr())
        self._library.tunesmith_logits(self._model.native, *arguments)
        return logits_BV


def _deal(ends: Sequence[int], parts: int) -> list[range]:
    """Sequences as at most so many neighbouring ranges of about equally many tokens; `ends` begins with 0."""
    dealt, start = [], 0
    for part in range(1, parts + 1):
        stop = start
        while stop < len(ends) - 1 and (ends[stop + 1] <= ends[-1] * part / parts or stop == start):
            stop += 1
        if part == parts:
            stop = len(ends) - 1
        if stop > start:
            dealt.append(range(start, stop))
        start = stop
    return dealt


assert BLOCK_TOKENS == GRID, "a block of the cache is a block of a product"
