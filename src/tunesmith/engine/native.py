"""A step of generation in one call of compiled code, where there is a C++ compiler: `decode.cpp` beside this.

Without a compiler, and for whatever it does not cover, steps are those of torch: slower, and with the same numbers but
for rounding.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from tunesmith import compiled
from tunesmith.decoder.llama import Llama, rotation
from tunesmith.engine.deltas import HEADERS, Groups, PanelAdapter, Shape
from tunesmith.engine.kvcache import KVCache, Span
from tunesmith.engine.paneled import SITES, NativeSpan, PaneledLlama, native_spans

SOURCE = Path(__file__).with_name("decode.cpp")
MOST_ROWS = 64
"""Up to so many sequences this is faster than torch's step (benchmarks/decode.py)."""
ROWS_A_THREAD = 2
"""Rows are dealt to threads from so many for each on; each reads all weights."""

_Floats = ctypes.c_void_p


class _Layer(ctypes.Structure):
    _names = ("attention_norm", "qkv_bias", "q_norm", "k_norm", "feed_norm", *SITES)
    _fields_ = [(name, _Floats) for name in _names]


class _Model(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        *((name, ctypes.c_int32) for name in ("vocabulary", "bits")),
        ("epsilon", ctypes.c_float),
        *((name, _Floats) for name in ("embedding", "norm", "head", "cosines", "sines")),
        ("layer", ctypes.POINTER(_Layer)),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        ("rows", ctypes.c_int64),
        ("token_ids", ctypes.POINTER(ctypes.c_int32)),
        ("span", ctypes.POINTER(NativeSpan)),
        ("groups", Groups),
        ("keys", ctypes.POINTER(_Floats)),
        ("values", ctypes.POINTER(_Floats)),
        ("hidden", _Floats),
        ("logits", _Floats),
    ]


class NativeStep:
    """Steps of one base. Keeps the weights that it points to alive. For one thread."""

    def __init__(self, library: ctypes.CDLL, weights: Llama, panels: PaneledLlama, cache: KVCache) -> None:
        """`covers(weights)`, which lie in `panels`; `cache` is that of the base."""
        self._run = library.tunesmith_decode
        self._run.argtypes, self._run.restype = (ctypes.POINTER(_Model), ctypes.POINTER(_Step)), None
        self._cache = cache
        self._threads = ThreadPoolExecutor(max(1, torch.get_num_threads()), "decode")
        config = weights.config
        positions = torch.arange(config.context_tokens + 1)
        turns = [x[:, 0, : config.head_width // 2].contiguous() for x in rotation(positions, config, torch.float32)]
        layers = (_Layer * config.layers)()
        for native, layer, sites in zip(layers, weights.layers, panels.layers, strict=True):
            native.attention_norm, native.feed_norm = _address(layer.attention_norm_D), _address(layer.feed_norm_D)
            native.q_norm, native.k_norm = _address(layer.q_norm_d), _address(layer.k_norm_d)
            native.qkv_bias = _address(layer.qkv_bias)
            for name, site in sites.items():
                setattr(native, name, _address(site.data))
        self._model = _Model(
            shape=panels.shape,
            vocabulary=config.vocabulary_size,
            bits=panels.bits,
            epsilon=config.norm_epsilon,
            embedding=_address(weights.embedding_VD),
            norm=_address(weights.norm_D),
            head=_address(panels.head.data),
            cosines=_address(turns[0]),
            sines=_address(turns[1]),
            layer=layers,
        )
        self._layers = config.layers
        self._width, self._vocabulary = config.width, config.vocabulary_size
        self._kept = (weights, panels, turns, layers)

    def __call__(
        self, token_ids: Sequence[int], spans: Sequence[Span], adapters: Sequence[PanelAdapter | None]
    ) -> tuple[Tensor, Tensor]:
        """Hidden states [rows, D] and logits [rows, V] of one token of each sequence; stores its keys and values."""
        rows = len(token_ids)
        assert 0 < rows <= MOST_ROWS
        keys, values = ((_Floats * self._layers)(*map(_address, each)) for each in self._cache.reserve(spans))
        hidden, logits = torch.empty(rows, self._width), torch.empty(rows, self._vocabulary)

        def run(part: slice) -> None:
            mine = spans[part]
            step = _Step(
                rows=len(mine),
                token_ids=(ctypes.c_int32 * len(mine))(*token_ids[part]),
                span=native_spans(mine, [1] * len(mine)),
                groups=Groups.of(adapters[part], [1] * len(mine)),
                keys=keys,
                values=values,
                hidden=_address(hidden[part]),
                logits=_address(logits[part]),
            )
            self._run(ctypes.byref(self._model), ctypes.byref(step))

        parts = max(1, min(torch.get_num_threads(), rows // ROWS_A_THREAD))
        ends = [rows * part // parts for part in range(parts + 1)]
        dealt = [slice(start, stop) for start, stop in itertools.pairwise(ends)]
        if len(dealt) == 1:
            run(dealt[0])
        else:
            list(self._threads.map(run, dealt))
        return hidden, logits


def library() -> ctypes.CDLL | None:
    """What is compiled here; None without a compiler."""
    return compiled.load(SOURCE, *HEADERS, reordering=False)


def covers(weights: Llama) -> bool:
    """Whether the weights are of the kind that the compiled code reads: fp32 in memory of the CPU."""
    return all(p.dtype == torch.float32 and p.device.type == "cpu" and p.is_contiguous() for p in weights.parameters())


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
