"""Matrices in fp32 as compiled products of ours read them: laid out once, so that no product has to do it again.

`panels.h` beside this says how.

Legend: N = rows of a product, O, I = outputs and inputs of a matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.decoder.llama import Llama
from tunesmith.decoder.mapped import stacked

HEADERS = tuple(Path(__file__).with_name(name) for name in ("panels.h", "lanes.h"))
"""What sources that work on panels include."""
Size, Floats = ctypes.c_int64, ctypes.c_void_p


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """A library whose source includes `panels.h`, its functions of that declared."""
    signatures: dict[str, tuple[list[type], type | None]] = {
        "panels_size": ([Size, Size], Size),
        "pack_panels": ([Floats, Size, Size, Floats, Floats, Floats], None),
        "multiply": ([Floats, Floats, Size, Size, Size, Floats], None),
    }
    for name, (parameters, result) in signatures.items():
        function = getattr(library, f"tunesmith_{name}")
        function.argtypes, function.restype = parameters, result
    return library


class Panels:
    """A matrix to multiply with. Threads may share it."""

    def __init__(
        self, library: ctypes.CDLL, weight_OI: Tensor, gain: Tensor | None = None, *, back: bool = False
    ) -> None:
        """Of a weight in fp32 and the gain of the norm before it: for products I -> O, or O -> I."""
        self._multiply = library.tunesmith_multiply
        outputs, inputs = weight_OI.shape
        self.depth, self.columns = (outputs, inputs) if back else (inputs, outputs)
        self.data = torch.empty(library.tunesmith_panels_size(self.columns, self.depth))
        forward, backward = (None, self.data.data_ptr()) if back else (self.data.data_ptr(), None)
        weight_OI = weight_OI.contiguous()
        gained = None if gain is None else gain.data_ptr()
        library.tunesmith_pack_panels(weight_OI.data_ptr(), outputs, inputs, gained, forward, backward)

    def product(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """[N, depth] -> [N, columns]; a row's numbers depend on no other row."""
        x = x.contiguous()
        into = x.new_empty(len(x), self.columns) if into is None else into
        assert into.is_contiguous()
        self._multiply(x.data_ptr(), self.data.data_ptr(), self.depth, self.columns, len(x), into.data_ptr())
        return into


def sites(model: Llama) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The weights [O, I] of qkv, o, gate_up and down of each layer."""
    for layer in model.layers:
        yield stacked(layer.qkv_parts), layer.o, layer.gate_up, layer.down
