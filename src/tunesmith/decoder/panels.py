"""Matrices as compiled products of ours read them: laid out once, so that no product has to do it again.

In fp32 (`panels.h` beside this) or in fixed point of 16 or 8 bits (`fixed.h`).

Legend: N = rows of a product, O, I = outputs and inputs of a matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from tunesmith.decoder.llama import Llama
from tunesmith.decoder.mapped import stacked

HEADERS = tuple(Path(__file__).with_name(name) for name in ("fixed.h", "panels.h", "lanes.h"))
"""What sources that work on panels include."""
Size, Floats = ctypes.c_int64, ctypes.c_void_p
Bits = Literal[8, 16, 32]
"""Of a number of a matrix: 32 is fp32; 16 and 8 are fixed point."""
Room = Callable[[int], Tensor]
"""Memory of so many bytes."""


def plain_room(size: int) -> Tensor:
    """A `Room` of ordinary memory."""
    return torch.empty(size, dtype=torch.uint8)


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """A library whose source includes `fixed.h`, its functions of that declared."""
    signatures: dict[str, tuple[list[type], type | None]] = {
        "matrix_size": ([Size, Size, Size], Size),
        "pack_matrix": ([Floats, Size, Size, Floats, ctypes.c_bool, Size, Floats], None),
        "multiply": ([Floats, Floats, Size, Size, Size, Size, Floats], None),
    }
    for name, (parameters, result) in signatures.items():
        function = getattr(library, f"tunesmith_{name}")
        function.argtypes, function.restype = parameters, result
    return library


class Panels:
    """A matrix to multiply with. Threads may share it."""

    def __init__(
        self,
        library: ctypes.CDLL,
        weight_OI: Tensor,
        gain: Tensor | None = None,
        *,
        back: bool = False,
        bits: Bits = 32,
        room: Room = plain_room,
    ) -> None:
        """Of a weight in fp32 and the gain of the norm before it: for products I -> O, or O -> I.

        In fixed point with a scale for each column; raises ValueError for numbers that are not finite, which that does
        not have.
        """
        given = [weight_OI] if gain is None else [weight_OI, gain]
        if bits != 32 and not all(bool(torch.isfinite(numbers).all()) for numbers in given):
            raise ValueError(f"the model has weights that are not finite numbers, which {bits} bits do not have")
        self._multiply = library.tunesmith_multiply
        self.bits = bits
        outputs, inputs = weight_OI.shape
        self.depth, self.columns = (outputs, inputs) if back else (inputs, outputs)
        self.data = room(library.tunesmith_matrix_size(self.columns, self.depth, bits))
        weight_OI = weight_OI.contiguous()
        gained = None if gain is None else gain.data_ptr()
        library.tunesmith_pack_matrix(weight_OI.data_ptr(), outputs, inputs, gained, back, bits, self.data.data_ptr())

    def product(self, x: Tensor, into: Tensor | None = None) -> Tensor:
        """[N, depth] -> [N, columns]; a row's numbers depend on no other row."""
        x = x.contiguous()
        into = x.new_empty(len(x), self.columns) if into is None else into
        assert into.is_contiguous()
        kind = (self.bits, self.depth, self.columns)
        self._multiply(x.data_ptr(), self.data.data_ptr(), *kind, len(x), into.data_ptr())
        return into


def sites(model: Llama) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The weights [O, I] of qkv, o, gate_up and down of each layer."""
    for layer in model.layers:
        yield stacked(layer.qkv_parts), layer.o, layer.gate_up, layer.down
