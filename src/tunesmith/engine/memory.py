"""Memory in large pages, where the system has them: what every step reads from end to end is read faster so."""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict

import torch
from torch import Tensor

PAGE_BYTES = 2 << 20
"""Of a large page."""
SLAB_BYTES = 16 << 20
"""Of which pieces are cut; what is not used of it is never touched."""


def empty(size: int) -> Tensor:
    """`size` bytes. Less than half a large page is ordinary memory."""
    if size < PAGE_BYTES // 2 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    pages = mmap.mmap(-1, size + 2 * PAGE_BYTES)  # what lies before and behind whole pages is never touched
    pages.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    start = -whole.data_ptr() % PAGE_BYTES
    return whole[start : start + size]


class Pieces:
    """Memory given away in pieces that lie one after another, and is kept as long as any of them."""

    def __init__(self) -> None:
        self._rest = torch.empty(0, dtype=torch.uint8)

    def __call__(self, size: int) -> Tensor:
        """The next `size` bytes, from a multiple of 64 on."""
        whole = -(-size // 64) * 64
        if whole > len(self._rest):
            self._rest = empty(max(whole, SLAB_BYTES))
        piece, self._rest = self._rest[:size], self._rest[whole:]
        return piece


class Slots:
    """Memory for things of a few sizes that come and go: what one leaves is for the next of its size."""

    def __init__(self) -> None:
        self._pieces = Pieces()
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)

    def take(self, size: int, owner: object) -> Tensor:
        """`size` bytes, until `owner` is gone."""
        free = self._free[size]
        slot = free.pop() if free else self._pieces(size)
        weakref.finalize(owner, free.append, slot)
        return slot
