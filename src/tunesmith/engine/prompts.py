"""Steps with prompts in fp32, on the processor, by compiled code: its products, and what is between (`prompts.cpp`).

Legend: N = tokens, D = model width, H, K = query and key/value heads, d = head width, F = feed-forward width.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith import compiled
from tunesmith.adapters.lora import Site
from tunesmith.adapters.stack import Mixture
from tunesmith.decoder.llama import Llama, rotation
from tunesmith.decoder.panels import HEADERS, declare
from tunesmith.engine.blocks import BLOCK_TOKENS
from tunesmith.engine.kvcache import KVCache, Span
from tunesmith.engine.paneled import PaneledLlama

SOURCE = Path(__file__).with_name("prompts.cpp")
_Floats, _Count, _Size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Span(ctypes.Structure):
    _fields_ = [
        *((name, _Size) for name in ("first", "tokens", "position")),
        ("blocks", ctypes.POINTER(_Count)),
    ]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _Count) for name in ("heads", "kv_heads", "head_width", "block_tokens")),
        ("epsilon", ctypes.c_float),
        *((name, _Floats) for name in ("q_norm", "k_norm", "cosines", "sines")),
        ("spans", _Size),
        ("span", ctypes.POINTER(_Span)),
        *((name, _Floats) for name in ("qkv", "keys", "values", "mixed")),
    ]


class _Room(NamedTuple):
    """What steps write into, again and again: new memory has to be cleared by the system."""

    qkv: Tensor
    mixed: Tensor
    added_ND: Tensor
    gate_up: Tensor
    product_NF: Tensor


class PromptStep:
    """Steps of one base. For one thread."""

    def __init__(self, library: ctypes.CDLL, weights: Llama, panels: PaneledLlama, cache: KVCache) -> None:
        """`native.covers(weights)`, which lie in `panels`; `cache` is that of the base."""
        self._attend, self._norm, self._gate = (
            getattr(library, f"tunesmith_{name}") for name in ("attend", "norm", "gate")
        )
        self._attend.argtypes = (ctypes.POINTER(_Attention), _Count, _Count)
        self._norm.argtypes = (_Floats, _Floats, _Floats, ctypes.c_float, _Size, _Count, _Floats)
        self._gate.argtypes = (_Floats, _Size, _Count, _Floats)
        self._attend.restype = self._norm.restype = self._gate.restype = None
        self._weights, self._panels, self._cache = weights, panels, cache
        self._room = _Room(*[torch.empty(0)] * 5)
        config = weights.config
        positions = torch.arange(config.context_tokens + 1)
        turns = rotation(positions, config, torch.float32)
        self._cos, self._sin = (x[:, 0, : config.head_width // 2].contiguous() for x in turns)
        self._threads = ThreadPoolExecutor(max(1, torch.get_num_threads()), "heads")

    def hidden(self, token_ids_N: Tensor, spans: Sequence[Span], adapters: Mixture | None) -> Tensor:
        """As `Llama.hidden`, for the tokens of `spans` one after another; stores their keys and values."""
        config, weights, n_tokens = self._weights.config, self._weights, len(token_ids_N)
        keys, values = self._cache.reserve(spans)
        native = (_Span * len(spans))()
        first = 0
        for one, span in zip(native, spans, strict=True):
            one.first, one.tokens, one.position = first, span.end - span.start, span.start
            one.blocks = (_Count * len(span.blocks))(*span.blocks)
            first += one.tokens
        x_ND = F.embedding(token_ids_N, weights.embedding_VD)
        if adapters is not None and (delta_ND := adapters.embedding_delta(token_ids_N)) is not None:
            x_ND += delta_ND
        room, added_ND = self._room_for(n_tokens), None
        y_ND = torch.empty_like(x_ND)
        for index, layer in enumerate(weights.layers):
            self._normalise(x_ND, added_ND, layer.attention_norm_D, y_ND)
            qkv = self._product(y_ND, adapters, index, "qkv", room.qkv[:n_tokens])
            if layer.qkv_bias is not None:
                qkv.add_(layer.qkv_bias)
            mixed = room.mixed[:n_tokens]
            attention = _Attention(
                heads=config.heads,
                kv_heads=config.kv_heads,
                head_width=config.head_width,
                block_tokens=BLOCK_TOKENS,
                epsilon=config.norm_epsilon,
                q_norm=_address(layer.q_norm_d),
                k_norm=_address(layer.k_norm_d),
                cosines=_address(self._cos),
                sines=_address(self._sin),
                spans=len(spans),
                span=native,
                qkv=_address(qkv),
                keys=_address(keys[index]),
                values=_address(values[index]),
                mixed=_address(mixed),
            )
            self._by_heads(attention)
            added_ND = self._product(mixed, adapters, index, "o", room.added_ND[:n_tokens])
            self._normalise(x_ND, added_ND, layer.feed_norm_D, y_ND)
            gate_up = self._product(y_ND, adapters, index, "gate_up", room.gate_up[:n_tokens])
            product_NF = room.product_NF[:n_tokens]
            self._gate(gate_up.data_ptr(), n_tokens, config.feed_forward_width, product_NF.data_ptr())
            added_ND = self._product(product_NF, adapters, index, "down", added_ND)
        self._normalise(x_ND, added_ND, weights.norm_D, y_ND)
        return y_ND

    def _product(self, x: Tensor, adapters: Mixture | None, layer: int, site: Site, into: Tensor) -> Tensor:
        product = self._panels.product(x, self._panels.layers[layer][site], into)
        if adapters is not None:
            adapters.add(layer, site, x, product)
        return product

    def _room_for(self, n_tokens: int) -> _Room:
        if n_tokens > len(self._room.qkv):
            config = self._weights.config
            stacked, inner = config.query_width + 2 * config.key_width, config.feed_forward_width
            widths = (stacked, config.query_width, config.width, 2 * inner, inner)
            self._room = _Room(*(torch.empty(n_tokens, width) for width in widths))
        return self._room

    def _normalise(self, x_ND: Tensor, added_ND: Tensor | None, gain_D: Tensor, into_ND: Tensor) -> None:
        """Adds to x in place."""
        epsilon, (n_tokens, width) = self._weights.config.norm_epsilon, x_ND.shape
        addresses = (_address(x_ND), _address(added_ND), _address(gain_D))
        self._norm(*addresses, epsilon, n_tokens, width, _address(into_ND))

    def _by_heads(self, attention: _Attention) -> None:
        heads = attention.kv_heads
        parts = min(torch.get_num_threads(), heads)
        ends = [heads * part // parts for part in range(parts + 1)]
        if parts == 1:
            self._attend(attention, 0, heads)
        else:
            list(self._threads.map(lambda part: self._attend(attention, ends[part], ends[part + 1]), range(parts)))


def library() -> ctypes.CDLL | None:
    """What is compiled here, panels with it; None without a compiler."""
    found = compiled.load(SOURCE, *HEADERS)
    return None if found is None else declare(found)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
