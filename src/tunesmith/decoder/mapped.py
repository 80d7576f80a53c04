"""Weights that lie in a mapped file: side by side without a copy, and out of memory while nobody reads them."""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

_RANGE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ (\d+)")


def stacked(parts: Sequence[Tensor]) -> Tensor:
    """The parts [O, ...] one below the other. Where they lie so in memory already, nothing is copied.

    In files of safetensors' own writer, gate and up do.
    """
    if parts[0].device.type != "cpu":
        return torch.cat(list(parts))
    at = parts[0].data_ptr()
    for part in parts:
        if not part.is_contiguous() or part.data_ptr() != at:
            return torch.cat(list(parts))
        at += part.nbytes

    class Memory(ctypes.c_char * (at - parts[0].data_ptr())):  # type: ignore[misc]
        """What the tensor below holds on to; and it, to the parts."""

    memory = Memory.from_address(parts[0].data_ptr())
    memory.parts = parts
    return torch.frombuffer(memory, dtype=parts[0].dtype).view(-1, *parts[0].shape[1:])


def release(tensors: Iterable[Tensor]) -> None:
    """Gives back the memory of those that lie in a mapped file (Linux): it is read again by whoever needs it.

    Nothing happens to other tensors, nor where the map was written to: what was written would be lost.
    """
    clean = _clean_maps()
    for tensor in tensors:
        start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        if any(first <= start and end <= last for first, last in clean):
            # Whole pages alone: others may hold a neighbour.
            start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
            if start < end:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _clean_maps() -> list[tuple[int, int]]:
    """First and last address of each map of a file that holds what the file does."""
    try:
        lines = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return []
    maps: list[tuple[int, int]] = []
    for line in lines:
        if found := _RANGE.match(line):
            first, last, inode = int(found[1], 16), int(found[2], 16), int(found[3])
        elif inode and line.split() == ["Anonymous:", "0", "kB"]:
            maps.append((first, last))
    return maps
