"""A model of the Llama family laid out for processors that multiply bf16: what compiled steps are given.

Frozen weights are packed once, forth and back; `packed.h` beside this has the same structures.

Legend: D = model width, d = head width, O, I = outputs and inputs of a site, R = rank, P = linear layers stacked in a
site, V = vocabulary.
"""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from tunesmith import compiled
from tunesmith.decoder.llama import KeptLayers, Layer, Llama, rotation
from tunesmith.decoder.mapped import release, stacked
from tunesmith.decoder.panels import Room, plain_room

HEADERS = tuple(Path(__file__).with_name(name) for name in ("packed.h", "tiles.h", "sums.h", "bf16.h"))
"""What sources that work on packed models include."""
GRID = 32
"""Rows and columns of a block: tokens go in multiples of it, and the widths of a model have to be multiples."""
Address, Count, Size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Site(ctypes.Structure):
    _fields_ = [
        *((name, Address) for name in ("forward", "backward", "gain")),
        ("inputs", Count),
        ("parts", Count),
        ("outputs", Count * 3),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [("sites", _Site * 4), ("bias", Address)]


class Model(ctypes.Structure):
    """What compiled code sees of a model."""

    _counts = ("width", "layers", "heads", "kv_heads", "head_width", "feed_width", "vocabulary")
    _fields_ = [
        *((name, Count) for name in _counts),
        ("epsilon", ctypes.c_float),
        *((name, Address) for name in ("embedding", "norm", "head", "head_forward", "head_backward", "cos", "sin")),
        ("layer", ctypes.POINTER(_Layer)),
    ]


@cache
def library(source: Path, *included: Path) -> ctypes.CDLL | None:
    """Compiled code that works on packed models.

    None for want of a compiler, of products of bf16 in the processor, or of tiles in what the system permits.
    """
    found = compiled.load(source, *included, *HEADERS)
    if found is None:
        return None
    found.tunesmith_tiles.restype = ctypes.c_bool
    if not found.tunesmith_tiles():
        return None
    model = ctypes.POINTER(Model)
    signatures: dict[str, tuple[list[type], type | None]] = {
        "packed_size": ([Size, Size], Size),
        "pack": ([Address, Size, Size, Address, Address, Address], None),
        "packed_factors_size": ([model, Size, ctypes.c_bool], Size),
        "pack_factors": ([model, Address, Size, ctypes.c_float, ctypes.c_bool, Address], None),
    }
    for name, (parameters, result) in signatures.items():
        function = getattr(found, f"tunesmith_{name}")
        function.argtypes, function.restype = parameters, result
    return found


def covers(model: Llama) -> bool:
    """Whether the widths of `model` are whole blocks, and its weights fp32 in memory of the processor."""
    config = model.config
    if config.qk_norm or isinstance(model.layers, KeptLayers):
        return False
    widths = (config.width, config.head_width, config.feed_forward_width)
    weights = (model.embedding_VD, *(layer.down for layer in model.layers))  # the others are as they are
    return all(width % GRID == 0 for width in widths) and all(
        weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in weights
    )


def _sites(layer: Layer) -> tuple[tuple[Tensor, ...], tuple[Tensor | None, ...]]:
    """The weights of each site [O, I], and the gains of the norm before it."""
    weights = (stacked(layer.qkv_parts), layer.o, layer.gate_up, layer.down)
    return weights, (layer.attention_norm_D, None, layer.feed_norm_D, None)


class PackedLlama:
    """The weights of a model, packed. Threads may share it."""

    def __init__(self, library: ctypes.CDLL, model: Llama, *, trained: bool, room: Room = plain_room) -> None:
        """`covers(model)`; with `trained` also for the way back, which takes as much again. `room`: for the weights.

        The memory of weights in mapped files is given back as they are packed.
        """
        self._library = library
        self._room = room
        self._trained = trained
        self._source = model
        self._kept: list[object] = []
        """What the structures point to."""
        config = model.config
        layers = (_Layer * config.layers)()
        for native_layer, layer, sites in zip(layers, model.layers, config.layout.layers, strict=True):
            weights, gains = _sites(layer)
            outputs = ([linear.outputs for linear in linears] for linears in sites.values())
            native_layer.sites = (_Site * 4)(*map(self._site, weights, gains, outputs))
            native_layer.bias = self._address(layer.qkv_bias)
            release([*layer.qkv_parts, *weights[1:]])
        forward, backward = self._pack(model.head_VD, None)
        release([model.head_VD])
        turns = rotation(torch.arange(config.context_tokens + 1), config, torch.float32)
        cos, sin = (x[:, 0, : config.head_width // 2].contiguous() for x in turns)
        self.native = Model(
            width=config.width,
            layers=config.layers,
            heads=config.heads,
            kv_heads=config.kv_heads,
            head_width=config.head_width,
            feed_width=config.feed_forward_width,
            vocabulary=config.vocabulary_size,
            epsilon=config.norm_epsilon,
            embedding=self._address(model.embedding_VD),
            norm=self._address(model.norm_D),
            head=self._address(model.head_VD),
            head_forward=self._address(forward),
            head_backward=self._address(backward),
            cos=self._address(cos),
            sin=self._address(sin),
            layer=layers,
        )

    def repack(self) -> None:
        """The weights as they are now, where the model they were packed from is trained."""
        native = self.native
        for native_layer, layer in zip(native.layer[: native.layers], self._source.layers, strict=True):
            for site, weight_OI in zip(native_layer.sites, _sites(layer)[0], strict=True):
                self._library.tunesmith_pack(
                    weight_OI.data_ptr(), *weight_OI.shape, site.gain, site.forward, site.backward
                )
        head = self._source.head_VD
        self._library.tunesmith_pack(head.data_ptr(), *head.shape, None, native.head_forward, native.head_backward)

    def pack_factors(self, flat: Tensor, rank: int, scale: float, into: Tensor | None = None) -> Tensor:
        """Factors as products read them. `flat`, fp32, has layer by layer and site by site A [P R, I] and B [O, R]."""
        if into is None:
            size = self._library.tunesmith_packed_factors_size(self.native, rank, self._trained)
            into = torch.empty(size, dtype=torch.bfloat16)
        pack = self._library.tunesmith_pack_factors
        pack(self.native, flat.data_ptr(), rank, scale, self._trained, into.data_ptr())
        return into

    def _site(self, weight_OI: Tensor, gain_I: Tensor | None, outputs: list[int]) -> _Site:
        forward, backward = self._pack(weight_OI, gain_I)
        return _Site(
            forward=self._address(forward),
            backward=self._address(backward),
            gain=self._address(gain_I),
            inputs=weight_OI.shape[1],
            parts=len(outputs),
            outputs=(Count * 3)(*outputs),
        )

    def _pack(self, weight_OI: Tensor, gain_I: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """As products read it, forth and back."""
        weight_OI = weight_OI.contiguous()
        size = self._library.tunesmith_packed_size(*weight_OI.shape)
        forward = self._room(2 * size).view(torch.bfloat16)
        backward = self._room(2 * size).view(torch.bfloat16) if self._trained else None
        gain, back = (None if tensor is None else tensor.data_ptr() for tensor in (gain_I, backward))
        self._library.tunesmith_pack(weight_OI.data_ptr(), *weight_OI.shape, gain, forward.data_ptr(), back)
        return forward, backward

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()
