"""Steps with prompts on the processor by compiled code: its products, and what is between (`prompts.cpp`).

Legend: N = tokens, W = those whose states are wanted, D = model width, F = feed-forward width, d = head width, H, K =
query and key/value heads.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from tunesmith import compiled
from tunesmith.adapters.lora import Site
from tunesmith.decoder.llama import Llama, rotation
from tunesmith.decoder.panels import declare
from tunesmith.engine import memory
from tunesmith.engine.deltas import HEADERS, Groups, PanelAdapter, Shape
from tunesmith.engine.kvcache import KVCache, Span
from tunesmith.engine.paneled import SITES, NativeSpan, PaneledLlama, native_spans

SOURCE = Path(__file__).with_name("prompts.cpp")
_Floats, _Count, _Size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _Count) for name in ("heads", "kv_heads", "head_width")),
        ("epsilon", ctypes.c_float),
        *((name, _Floats) for name in ("q_norm", "k_norm", "cosines", "sines")),
        ("spans", _Size),
        ("span", ctypes.POINTER(NativeSpan)),
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
        signatures: dict[str, list[type]] = {
            "attend": [ctypes.POINTER(_Attention), _Count, _Count],
            "add_deltas": [ctypes.POINTER(Groups), ctypes.POINTER(Shape), _Size, _Floats, _Floats, _Size, _Size],
            "embed": [ctypes.POINTER(Groups), _Floats, _Floats, _Size, _Size, _Floats],
            "norm": [_Floats, _Floats, _Floats, ctypes.c_float, _Size, _Count, _Floats],
            "gate": [_Floats, _Size, _Count, _Floats],
        }
        for name, parameters in signatures.items():
            function = getattr(library, f"tunesmith_{name}")
            function.argtypes, function.restype = parameters, None
        self._library = library
        self._weights, self._panels, self._cache = weights, panels, cache
        self._room = _Room(*[torch.empty(0)] * 5)
        config = weights.config
        positions = torch.arange(config.context_tokens + 1)
        turns = rotation(positions, config, torch.float32)
        self._cos, self._sin = (x[:, 0, : config.head_width // 2].contiguous() for x in turns)
        self._threads = ThreadPoolExecutor(max(1, torch.get_num_threads()), "heads")

    def hidden(
        self,
        token_ids: Sequence[int],
        spans: Sequence[Span],
        adapters: Sequence[PanelAdapter | None],
        wanted: Sequence[int],
    ) -> Tensor:
        """Last states [W, D] of the last `wanted` tokens of each of `spans`, whose tokens stand one after another.

        Keys and values of all of them are stored; for nothing else do tokens that are not wanted need the last layer.
        """
        config, weights, n_tokens, n_wanted = self._weights.config, self._weights, len(token_ids), sum(wanted)
        keys, values = self._cache.reserve(spans)
        lengths = [span.end - span.start for span in spans]
        native, groups = native_spans(spans, lengths), Groups.of(adapters, lengths)
        x_ND, y_ND = torch.empty(n_tokens, config.width), torch.empty(n_tokens, config.width)
        ids = (_Count * n_tokens)(*token_ids)
        self._library.tunesmith_embed(
            groups, _address(weights.embedding_VD), ids, n_tokens, config.width, _address(x_ND)
        )
        room, added_ND = self._room_for(n_tokens), None
        for index, layer in enumerate(weights.layers):
            self._normalise(x_ND, added_ND, layer.attention_norm_D, y_ND)
            qkv = self._product(y_ND, groups, index, "qkv", room.qkv[:n_tokens])
            if layer.qkv_bias is not None:
                qkv.add_(layer.qkv_bias)
            if index == len(weights.layers) - 1 and n_wanted < n_tokens:
                native, groups = native_spans(spans, wanted), Groups.of(adapters, wanted)
                x_ND = x_ND[last_places(wanted, lengths)]
                y_ND, n_tokens = y_ND[:n_wanted], n_wanted
            attention = _Attention(
                heads=config.heads,
                kv_heads=config.kv_heads,
                head_width=config.head_width,
                epsilon=config.norm_epsilon,
                q_norm=_address(layer.q_norm_d),
                k_norm=_address(layer.k_norm_d),
                cosines=_address(self._cos),
                sines=_address(self._sin),
                spans=len(native),
                span=native,
                qkv=_address(qkv),
                keys=_address(keys[index]),
                values=_address(values[index]),
                mixed=_address(room.mixed),
            )
            self._by_heads(attention)
            added_ND = self._product(room.mixed[:n_tokens], groups, index, "o", room.added_ND[:n_tokens])
            self._normalise(x_ND, added_ND, layer.feed_norm_D, y_ND)
            gate_up = self._product(y_ND, groups, index, "gate_up", room.gate_up[:n_tokens])
            product_NF = room.product_NF[:n_tokens]
            self._library.tunesmith_gate(gate_up.data_ptr(), n_tokens, config.feed_forward_width, product_NF.data_ptr())
            added_ND = self._product(product_NF, groups, index, "down", added_ND)
        self._normalise(x_ND, added_ND, weights.norm_D, y_ND)
        return y_ND

    def _product(self, x: Tensor, groups: Groups, layer: int, site: Site, into: Tensor) -> Tensor:
        panels = self._panels
        product = panels.product(x, panels.layers[layer][site], into)
        if groups.groups:
            numbers = (groups, panels.shape, len(SITES) * layer + SITES.index(site), x.data_ptr(), product.data_ptr())
            panels.share(len(x), lambda first, last: self._library.tunesmith_add_deltas(*numbers, first, last))
        return product

    def _room_for(self, n_tokens: int) -> _Room:
        if n_tokens > len(self._room.qkv):
            config = self._weights.config
            stacked, inner = config.query_width + 2 * config.key_width, config.feed_forward_width
            widths = (stacked, config.query_width, config.width, 2 * inner, inner)
            pieces = memory.Pieces()
            self._room = _Room(*(pieces(4 * n_tokens * width).view(torch.float32).view(-1, width) for width in widths))
        return self._room

    def _normalise(self, x_ND: Tensor, added_ND: Tensor | None, gain_D: Tensor, into_ND: Tensor) -> None:
        """Adds to x in place."""
        epsilon, (n_tokens, width) = self._weights.config.norm_epsilon, x_ND.shape
        addresses = (_address(x_ND), _address(added_ND), _address(gain_D))
        self._library.tunesmith_norm(*addresses, epsilon, n_tokens, width, _address(into_ND))

    def _by_heads(self, attention: _Attention) -> None:
        heads, attend = attention.kv_heads, self._library.tunesmith_attend
        parts = min(torch.get_num_threads(), heads)
        ends = [heads * part // parts for part in range(parts + 1)]
        if parts == 1:
            attend(attention, 0, heads)
        else:
            list(self._threads.map(lambda part: attend(attention, ends[part], ends[part + 1]), range(parts)))


def library() -> ctypes.CDLL | None:
    """What is compiled here, panels with it; None without a compiler."""
    found = compiled.load(SOURCE, *HEADERS, reordering=False)
    return None if found is None else declare(found)


def last_places(wanted: Sequence[int], lengths: Sequence[int]) -> list[int]:
    """The last `wanted` places of each of so many that follow one another."""
    ends = itertools.accumulate(lengths)
    return [place for end, last in zip(ends, wanted, strict=True) for place in range(end - last, end)]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
