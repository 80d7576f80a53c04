"""Steps of the engine in bf16 or int8, in one call of compiled code, on processors that multiply bf16: `tiles.cpp`.

Prompts and single tokens, of any sequences and adapters, go through the model together; keys and values lie in the
cache as tiles, so a cache belongs to these steps alone. Factors of adapters have 8 bits either way. Numbers differ from
those of fp32 as bf16 does (docs/design/decisions/decode.md), and a sequence's do not depend on what is computed beside.

Legend: L = tokens whose states are wanted, B = rows of logits, D = model width, V = vocabulary, R = rank, O, I =
outputs and inputs.
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
from tunesmith.engine import memory
from tunesmith.engine.blocks import BLOCK_TOKENS
from tunesmith.engine.kvcache import KVCache, Span

SOURCE = Path(__file__).with_name("tiles.cpp")
INCLUDED = tuple(SOURCE.with_name(name) for name in ("factors.h", "products.h", "int8.h", "rows.h"))
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
        ("wanted", Size),
        ("blocks", ctypes.POINTER(Count)),
        ("adapter", ctypes.POINTER(_Adapter)),
    ]


class _Work(ctypes.Structure):
    _fields_ = [
        ("tokens", Size),
        ("spans", Size),
        ("eight", ctypes.c_bool),
        ("token_ids", Address),
        ("span", ctypes.POINTER(_Span)),
        ("keys", ctypes.POINTER(Address)),
        ("values", ctypes.POINTER(Address)),
        ("hidden", Address),
    ]


@cache
def _library() -> ctypes.CDLL | None:
    library = packed.library(SOURCE, *INCLUDED)
    if library is not None:
        model = ctypes.POINTER(packed.Model)
        signatures: dict[str, tuple[list[type], type | None]] = {
            "engine_step": ([model, ctypes.POINTER(_Work)], None),
            "logits": ([model, ctypes.c_bool, Address, Size, Address], None),
            "factors_size": ([model, Size], Size),
            "factors": ([model, Address, Size, ctypes.c_float, Address], None),
            "eight_size": ([Size, Size], Size),
            "eight": ([Address, Size, Size, Address], None),
        }
        for name, (parameters, result) in signatures.items():
            function = getattr(library, f"tunesmith_{name}")
            function.argtypes, function.restype = parameters, result
    return library


def covers(weights: Decoder) -> bool:
    """Whether steps of a base, whose weights are given in fp32, can be done here."""
    return isinstance(weights, Llama) and _library() is not None and packed.covers(weights)


class TiledAdapter:
    """The factors of an adapter, in 8 bits, packed for one base."""

    def __init__(self, library: ctypes.CDLL, model: PackedLlama, lora: Lora, slots: memory.Slots) -> None:
        """Raises ValueError for factors that are not all numbers: they would spoil what is computed beside them."""
        parts = [lora.parts(layer, site) for layer, sites in enumerate(lora.layout.layers) for site in sites]
        factors = [torch.cat([getattr(part, name) for part in site]) for site in parts for name in ("a_RI", "b_OR")]
        flat = torch.cat([factor.flatten() for factor in factors]).float()
        embedding = [] if lora.embedding is None else [lora.embedding.a_RI.T, lora.embedding.b_OR]
        self._embedding = [factor.float().contiguous() for factor in embedding]
        self._packed = slots.take(library.tunesmith_factors_size(model.native, lora.rank), self)
        library.tunesmith_factors(model.native, flat.data_ptr(), lora.rank, lora.scale, self._packed.data_ptr())
        if not all(bool(torch.isfinite(values).all()) for values in (flat, *self._embedding)):
            raise ValueError("the adapter has weights that are not finite numbers")
        self.native = _Adapter(packed=self._packed.data_ptr(), rank=lora.rank, scale=lora.scale)
        if self._embedding:
            self.native.embedding_a, self.native.embedding_b = (factor.data_ptr() for factor in self._embedding)


class _Eights(PackedLlama):
    """The weights of a model in 8 bits, as `int8.h` reads them."""

    def _pack(self, weight_OI: Tensor, gain_I: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Without the gain, which goes into what is multiplied: weights that were rounded to 8 bits before stay."""
        if not bool(torch.isfinite(weight_OI).all()):
            raise ValueError("the model has weights that are not finite numbers, which 8 bits do not have")
        into = self._room(self._library.tunesmith_eight_size(*weight_OI.shape))
        weight_OI = weight_OI.contiguous()
        self._library.tunesmith_eight(weight_OI.data_ptr(), *weight_OI.shape, into.data_ptr())
        return into, None


class TiledStep:
    """Steps of one base. For one thread."""

    def __init__(self, weights: Llama, cache: KVCache, *, eight: bool = False) -> None:
        """`covers(weights)`; `cache`, of bf16, is that of the base. `eight`: weights in 8 bits, not bf16.

        Raises ValueError for weights that 8 bits cannot hold.
        """
        library = _library()
        assert library is not None
        self._library = library
        self._eight = eight
        self._slots = memory.Slots()
        pack = _Eights if eight else PackedLlama
        self._model = pack(library, weights, trained=False, room=memory.Pieces())
        self._cache = cache
        self._width, self._vocabulary = weights.config.width, weights.config.vocabulary_size
        self._threads = ThreadPoolExecutor(max(1, torch.get_num_threads()), "step")

    def adapter(self, lora: Lora) -> TiledAdapter:
        """An adapter for steps of this base. Raises ValueError."""
        return TiledAdapter(self._library, self._model, lora, self._slots)

    def hidden(
        self,
        tokens: Sequence[Sequence[int]],
        spans: Sequence[Span],
        adapters: Sequence[TiledAdapter | None],
        wanted: Sequence[int],
    ) -> Tensor:
        """Last states [L, D], fp32, of the last `wanted` tokens of each sequence; stores keys and values of all."""
        keys, values = ((Address * len(each))(*(x.data_ptr() for x in each)) for each in self._cache.reserve(spans))
        n_tokens = sum(map(len, tokens))
        ends = list(itertools.accumulate(map(len, tokens), initial=0))

        def run(members: range) -> Tensor:
            mine = list(itertools.chain.from_iterable(tokens[i] for i in members))
            whole = -(-len(mine) // GRID) * GRID
            ids = torch.tensor(mine + [0] * (whole - len(mine)))
            hidden = torch.empty(sum(wanted[i] for i in members), self._width)
            native = (_Span * len(members))()
            for span, index in zip(native, members, strict=True):
                adapter = adapters[index]
                span.start, span.tokens = ends[index] - ends[members.start], len(tokens[index])
                span.position, span.wanted = spans[index].start, wanted[index]
                span.blocks = (Count * len(spans[index].blocks))(*spans[index].blocks)
                if adapter is not None:
                    span.adapter = ctypes.pointer(adapter.native)
            work = _Work(whole, len(members), self._eight, ids.data_ptr(), native, keys, values, hidden.data_ptr())
            self._library.tunesmith_engine_step(self._model.native, work)
            return hidden

        dealt = _deal(ends, min(torch.get_num_threads(), max(1, n_tokens // TOKENS_A_THREAD)))
        return run(dealt[0]) if len(dealt) == 1 else torch.cat(list(self._threads.map(run, dealt)))

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """[B, V], fp32."""
        hidden_BD = hidden_BD.contiguous()
        logits_BV = torch.empty(len(hidden_BD), self._vocabulary)
        arguments = (self._eight, hidden_BD.data_ptr(), len(hidden_BD), logits_BV.data_ptr())
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
