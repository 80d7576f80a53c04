"""A training step of a Llama in one call of compiled code, on processors that multiply tiles of bf16: `step.cpp`.

What `training.folded` does with torch's products, for any jobs side by side. What stands between two products costs as
much as the products there; here a step of few tokens is three to five times faster
(docs/design/decisions/training-step.md). Elsewhere steps are those of `training.folded`.

Legend: N = tokens, D = model width, F = feed-forward width, H, K = query and key/value heads, d = head width,
O, I = outputs and inputs of a site, V = vocabulary, M = weighed positions.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tunesmith.decoder.llama import Llama, rotation
from tunesmith.training import native
from tunesmith.training.factors import TrainableLora
from tunesmith.training.loss import Scores
from tunesmith.training.passes import Pass, Piece

GRID = 32
"""Pieces are rounded up to a multiple of so many tokens, and the widths of a model have to be multiples of it."""
_Address, _Count, _Size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


class _Site(ctypes.Structure):
    _fields_ = [
        *((name, _Address) for name in ("forward", "backward", "gain")),
        ("inputs", _Count),
        ("parts", _Count),
        ("outputs", _Count * 3),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [("sites", _Site * 4), ("bias", _Address)]


class _Model(ctypes.Structure):
    _counts = ("width", "layers", "heads", "kv_heads", "head_width", "feed_width", "vocabulary")
    _fields_ = [
        *((name, _Count) for name in _counts),
        ("epsilon", ctypes.c_float),
        *((name, _Address) for name in ("embedding", "norm", "head", "head_forward", "head_backward", "cos", "sin")),
        ("layer", ctypes.POINTER(_Layer)),
    ]


class _Piece(ctypes.Structure):
    _fields_ = [
        ("start", _Size),
        ("tokens", _Size),
        *((name, _Address) for name in ("flat", "gradient", "packed")),
        ("rank", _Count),
        ("embedding_rank", _Count),
        ("scale", ctypes.c_float),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, _Size) for name in ("tokens", "rows", "positions", "pieces")),
        *((name, _Address) for name in ("token_ids", "row_start", "row_length", "predicting", "target", "weight")),
        ("piece", ctypes.POINTER(_Piece)),
        *((name, _Address) for name in ("nll", "right", "memory")),
    ]


@cache
def _functions() -> dict[str, Callable[..., int]] | None:
    """None where tiles are missing: in the processor, in what the system permits, or for want of a compiler."""
    library = native.library()
    if library is None or not native.has_tiles(library):
        return None
    model, work = ctypes.POINTER(_Model), ctypes.POINTER(_Pass)
    signatures: dict[str, tuple[list[type], type | None]] = {
        "packed_size": ([_Size, _Size], _Size),
        "pack": ([_Address, _Size, _Size, _Address, _Address, _Address], None),
        "packed_factors_size": ([model, _Size], _Size),
        "pack_factors": ([model, _Address, _Size, ctypes.c_float, _Address], None),
        "step_memory": ([model, work], _Size),
        "step": ([model, work], None),
    }
    found: dict[str, Callable[..., int]] = {}
    for name, (parameters, result) in signatures.items():
        function = getattr(library, f"tunesmith_{name}")
        function.argtypes, function.restype = parameters, result
        found[name] = function
    return found


def available() -> bool:
    """Whether this machine can."""
    return _functions() is not None


def covers(model: Llama) -> bool:
    """Whether steps of `model`, which `folded.covers`, can be done here: its widths are whole blocks."""
    config = model.config
    widths = (config.width, config.head_width, config.feed_forward_width)
    stacked = (config.heads + 2 * config.kv_heads) * config.head_width
    # Gradients of queries, keys and values take the place of the gates.
    return available() and all(width % GRID == 0 for width in widths) and stacked <= 2 * config.feed_forward_width


class CompiledLlama:
    """The frozen weights of a model, laid out for steps. Threads may share it."""

    shares = True
    """A pass may hold pieces of several jobs."""

    def __init__(self, model: Llama, site_outputs: Sequence[list[int]]) -> None:
        """`covers(model)`.

        `site_outputs` are the outputs of each linear layer of each site (`TrainableLora.site_outputs`).
        """
        functions = _functions()
        assert functions is not None
        self._call = functions
        self._kept: list[object] = [model]
        """What the structures point to."""
        self._packed: WeakKeyDictionary[TrainableLora, Tensor] = WeakKeyDictionary()
        self._memory = threading.local()
        config, outputs = model.config, iter(site_outputs)
        layers = (_Layer * config.layers)()
        for native_layer, layer in zip(layers, model.layers, strict=True):
            weights = (layer.qkv, layer.o, layer.gate_up, layer.down)
            gains = (layer.attention_norm_D, None, layer.feed_norm_D, None)
            sites = (self._site(*each, next(outputs)) for each in zip(weights, gains, strict=True))
            native_layer.sites = (_Site * 4)(*sites)
            native_layer.bias = self._address(layer.qkv_bias)
        forward, backward = self._pack(model.head_VD, None)
        turns = rotation(torch.arange(config.context_tokens), config, torch.float32)
        cos, sin = (x[:, 0, : config.head_width // 2].contiguous() for x in turns)
        self._model = _Model(
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

    def take(self, factors: TrainableLora, *, single: bool) -> None:
        """The factors of a job as they are now, for the passes of a step, be they of that job alone or of several."""
        rank = factors.lora.rank
        packed = self._packed.get(factors)
        if packed is None:
            size = self._call["packed_factors_size"](self._model, rank)
            packed = self._packed[factors] = torch.empty(size, dtype=torch.bfloat16)
        flat = factors.flat.data_ptr()
        self._call["pack_factors"](self._model, flat, rank, factors.lora.scale, packed.data_ptr())

    def learn(self, pieces: Sequence[Piece], *, single: bool) -> tuple[Pass, Scores]:
        """A pass over `pieces`, whose factors were taken: adds the gradient of its loss to their views."""
        work = Pass.of(pieces, grid=GRID)
        lengths = [length for piece in pieces for length in piece.batch.row_lengths]
        starts = [
            span.start + before
            for piece, span in zip(pieces, work.spans, strict=True)
            for before in accumulate(piece.batch.row_lengths[:-1], initial=0)
        ]
        row_start, row_length = torch.tensor(starts), torch.tensor(lengths)
        scores = Scores(torch.empty(len(work.target_M)), torch.empty(len(work.target_M), dtype=torch.bool))
        native_pieces = (_Piece * len(pieces))()
        for native_piece, piece, span in zip(native_pieces, pieces, work.spans, strict=True):
            factors = piece.view.owner
            native_piece.start, native_piece.tokens = span.start, span.stop - span.start
            native_piece.flat, native_piece.gradient = factors.flat.data_ptr(), piece.view.flat_gradient.data_ptr()
            native_piece.packed, native_piece.rank = self._packed[factors].data_ptr(), factors.lora.rank
            native_piece.embedding_rank = 0 if factors.lora.embedding is None else factors.lora.rank
            native_piece.scale = factors.lora.scale
        step = _Pass(
            tokens=len(work.token_ids_N),
            rows=len(lengths),
            positions=len(work.target_M),
            pieces=len(pieces),
            token_ids=work.token_ids_N.data_ptr(),
            row_start=row_start.data_ptr(),
            row_length=row_length.data_ptr(),
            predicting=work.predicting_M.data_ptr(),
            target=work.target_M.data_ptr(),
            weight=work.weight_M.data_ptr(),
            piece=native_pieces,
            nll=scores.nll_M.data_ptr(),
            right=scores.right_M.data_ptr(),
        )
        step.memory = self._room(self._call["step_memory"](self._model, step))
        self._call["step"](self._model, step)
        return work, scores

    def _room(self, size: int) -> int:
        """The address of memory of this thread, kept from step to step: new memory has to be cleared by the system."""
        memory: Tensor | None = getattr(self._memory, "bytes", None)
        if memory is None or len(memory) < size:
            self._memory.bytes = memory = torch.empty(size, dtype=torch.uint8)
        return memory.data_ptr()

    def _site(self, weight_OI: Tensor, gain_I: Tensor | None, outputs: list[int]) -> _Site:
        forward, backward = self._pack(weight_OI, gain_I)
        return _Site(
            forward=self._address(forward),
            backward=self._address(backward),
            gain=self._address(gain_I),
            inputs=weight_OI.shape[1],
            parts=len(outputs),
            outputs=(_Count * 3)(*outputs),
        )

    def _pack(self, weight_OI: Tensor, gain_I: Tensor | None) -> tuple[Tensor, Tensor]:
        """As products read it, forth and back."""
        weight_OI = weight_OI.contiguous()
        size = self._call["packed_size"](*weight_OI.shape)
        forward, backward = (torch.empty(size, dtype=torch.bfloat16) for _ in range(2))
        gain = None if gain_I is None else gain_I.data_ptr()
        self._call["pack"](weight_OI.data_ptr(), *weight_OI.shape, gain, forward.data_ptr(), backward.data_ptr())
        return forward, backward

    def _address(self, tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        assert tensor.is_contiguous()
        self._kept.append(tensor)
        return tensor.data_ptr()
