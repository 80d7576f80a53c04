"""Products of a training step by compiled code of ours, where there is a compiler: `panels.cpp` beside this.

Those with frozen weights are in fp32, or in fixed point of 16 bits, which is closer to fp32 than bf16 is, and for which
processors without bf16 need two thirds of the time. All else is in fp32.

Frozen weights are laid out once, forth and back, so that no product has to do it again, which takes the libraries a
third of the time at these sizes; what a site's factors add comes in the same pass. A token's results depend on no other
token, so one copy of the weights serves jobs alone and in company.

Legend: N = tokens, I, O = inputs and outputs of a site, R = rank, P = linear layers stacked in a site, D = model width,
V = vocabulary, M = positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from tunesmith import compiled
from tunesmith.adapters.lora import Site as SiteName
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.mapped import release
from tunesmith.decoder.panels import HEADERS, Bits, Floats, Panels, Size, declare, sites
from tunesmith.training import causal
from tunesmith.training.attention import RowAttention
from tunesmith.training.causal import CausalRows
from tunesmith.training.factors import Pair, TrainableLora
from tunesmith.training.frozen import Sites
from tunesmith.training.kernels import Kernels
from tunesmith.training.loss import Head, Scores, Weighed, score_frozen
from tunesmith.training.sites import Part

SOURCE, *INCLUDED = (Path(__file__).with_name(name) for name in ("panels.cpp", "causal.h"))


class _Site(ctypes.Structure):
    _fields_ = [
        ("forward", Floats * 3),
        *((name, Floats) for name in ("backward", "gain")),
        *((name, Size) for name in ("bits", "inputs", "parts")),
        ("outputs", Size * 3),
    ]


class _Piece(ctypes.Structure):
    _fields_ = [
        *((name, Size) for name in ("start", "tokens", "rank")),
        *((name, Floats) for name in ("packed", "low", "of_a", "of_b")),
        ("scale", ctypes.c_float),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """What is compiled here; None without a compiler (see `compiled.load`)."""
    found = compiled.load(SOURCE, *INCLUDED, *HEADERS, reordering=False)
    if found is None:
        return None
    causal.declare(found)
    site, pieces = ctypes.POINTER(_Site), ctypes.POINTER(_Piece)
    signatures: dict[str, tuple[list[type], type | None]] = {
        "low_width": ([site, Size], Size),
        "site_factors_size": ([site, Size], Size),
        "pack_site_factors": ([site, Floats, Floats, Size, ctypes.c_float, Floats], None),
        "site_forward": ([site, pieces, Size, Floats, Floats], None),
        "site_backward": ([site, pieces, Size, Floats, Floats, Floats], None),
    }
    for name, (parameters, result) in signatures.items():
        function = getattr(found, f"tunesmith_{name}")
        function.argtypes, function.restype = parameters, result
    return declare(found)


class PanelSite:
    """The frozen weights of a site as panels, and the factors of jobs as they were last taken. Implements `Site`."""

    def __init__(
        self, library: ctypes.CDLL, weight_OI: Tensor, outputs: Sequence[int], gain_I: Tensor | None, bits: Bits = 32
    ) -> None:
        """Of the weight of a site in fp32, and the outputs of each of its linear layers; the gain is that of the norm
        before the site. `bits` see `Panels`.
        """
        self._library = library
        self._gain_I = gain_I
        self._outputs, self._inputs = outputs, weight_OI.shape[1]
        self._forward = [Panels(library, part, gain_I, bits=bits) for part in weight_OI.split(list(outputs))]
        self._backward = Panels(library, weight_OI, gain_I, back=True, bits=bits)
        self._native = _Site(
            forward=(Floats * 3)(*(part.data.data_ptr() for part in self._forward)),
            backward=self._backward.data.data_ptr(),
            gain=None if gain_I is None else gain_I.data_ptr(),
            bits=bits,
            inputs=self._inputs,
            parts=len(outputs),
            outputs=(Size * 3)(*outputs),
        )
        self._factors: WeakKeyDictionary[TrainableLora, Tensor] = WeakKeyDictionary()

    def take(self, job: TrainableLora, factors: Pair, scale: float) -> None:
        """The factors of a job as they are now."""
        a, b_OR = factors
        packed = self._factors.get(job)
        if packed is None:
            packed = torch.empty(self._library.tunesmith_site_factors_size(self._native, b_OR.shape[1]))
            self._factors[job] = packed
        addresses = (a.data_ptr(), b_OR.data_ptr())
        self._library.tunesmith_pack_site_factors(self._native, *addresses, b_OR.shape[1], scale, packed.data_ptr())

    def forward(self, x_NI: Tensor, parts: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
        """See `Site`; what is kept are the inputs of B."""
        y_NO, kept = x_NI.new_empty(len(x_NI), sum(self._outputs)), []
        for part in parts:
            width = self._library.tunesmith_low_width(self._native, part.factors[1].shape[1])
            kept.append(x_NI.new_empty(part.span.stop - part.span.start, width))
        pieces = self._pieces(parts, kept)
        self._library.tunesmith_site_forward(self._native, pieces, len(pieces), x_NI.data_ptr(), y_NO.data_ptr())
        return y_NO, kept

    def backward(self, grad_NO: Tensor, x_NI: Tensor, saved: list[Tensor], parts: Sequence[Part]) -> Tensor:
        """See `Site`."""
        grad_NI, pieces = torch.empty_like(x_NI), self._pieces(parts, saved)
        tensors = (grad_NO, x_NI, grad_NI)
        assert all(tensor.is_contiguous() for tensor in tensors)
        addresses = (tensor.data_ptr() for tensor in tensors)
        self._library.tunesmith_site_backward(self._native, pieces, len(pieces), *addresses)
        return grad_NI

    def _pieces(self, parts: Sequence[Part], kept: Sequence[Tensor]) -> ctypes.Array[_Piece]:
        pieces = (_Piece * len(parts))()
        for piece, part, low in zip(pieces, parts, kept, strict=True):
            of_a, of_b = part.gradients
            piece.start, piece.tokens, piece.rank = part.span.start, part.span.stop - part.span.start, of_b.shape[1]
            piece.packed, piece.low = self._factors[part.view.owner].data_ptr(), low.data_ptr()
            piece.of_a, piece.of_b, piece.scale = of_a.data_ptr(), of_b.data_ptr(), part.view.scale
        return pieces


class PanelHead:
    """The head as panels. Implements `Head`."""

    def __init__(self, library: ctypes.CDLL, head_VD: Tensor, bits: Bits = 32) -> None:
        """Of the head in fp32; `bits` see `Panels`."""
        self.vocabulary = len(head_VD)
        self._forward, self._backward = (Panels(library, head_VD, back=back, bits=bits) for back in (False, True))

    def logits(self, states_MD: Tensor) -> Tensor:
        """See `Head`."""
        return self._forward.product(states_MD)

    def back(self, grad_MV: Tensor) -> Tensor:
        """See `Head`."""
        return self._backward.product(grad_MV)


class PanelWeights:
    """Implements `FrozenWeights`."""

    dtype = torch.float32
    shares = True
    grid: int | None = 1

    def __init__(self, library: ctypes.CDLL, model: Llama, kernels: Kernels, bits: Bits = 32) -> None:
        """Of weights in fp32; `bits` see `Panels`. Raises ValueError as that does.

        The memory of weights in mapped files is given back as they are laid out.
        """
        self._kernels = kernels
        self.attention: RowAttention | None = CausalRows(library)
        self.head: Head = PanelHead(library, model.head_VD, bits)
        self._layers: list[dict[SiteName, PanelSite]] = []
        for layer, names, weights in zip(model.layers, model.config.layout.layers, sites(model), strict=True):
            gains = (layer.attention_norm_D, None, layer.feed_norm_D, None)
            self._layers.append(
                {
                    name: PanelSite(library, weight_OI, [linear.outputs for linear in linears], gain_I, bits)
                    for (name, linears), weight_OI, gain_I in zip(names.items(), weights, gains, strict=True)
                }
            )
            release([*layer.qkv_parts, *weights[1:]])
        release([model.head_VD])

    def take(self, factors: TrainableLora, *, single: bool) -> None:
        """See `FrozenWeights`."""
        pairs, _ = factors.pairs(factors.flat)
        sites = [site for layer in self._layers for site in layer.values()]
        for site, pair in zip(sites, pairs, strict=True):
            site.take(factors, pair, factors.lora.scale)

    def layers(self, *, single: bool) -> Sequence[Sites]:
        """See `FrozenWeights`."""
        return self._layers  # type: ignore[return-value]

    def score(self, states_MD: Tensor, work: Weighed, grad_MD: Tensor, *, single: bool) -> Scores:
        """See `FrozenWeights`."""
        return score_frozen(self._kernels, self.head, states_MD, work, grad_MD)
