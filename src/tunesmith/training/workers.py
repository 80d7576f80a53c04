"""Threads that each take a share of the work. Knows how work is shared out, not what it is.

Each thread runs its rows through the whole model by itself. Threads that shared each product instead would meet
hundreds of times a step: for a small model that costs more than it saves, and far more on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

import torch

S = TypeVar("S")
T = TypeVar("T")


class Workers:
    """Threads of a trainer. To be closed (`with`). What they return depends on their number, never on their timing."""

    def __init__(self, threads: int) -> None:
        """`threads` at most work at a time."""
        self.threads = threads
        torch.set_num_threads(threads)  # a setting of each thread, this one included
        self._pool = ThreadPoolExecutor(threads, "worker")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    def at_once(self, device: torch.device) -> int:
        """How many loads go side by side, at most: a device other than the processor has threads of its own."""
        return self.threads if device.type == "cpu" else 1

    def each(self, work: Callable[[S], T], loads: Sequence[S], *, sharing: bool = True) -> list[T]:
        """`work` of each load, on a thread of its own as far as there are.

        With `sharing`, threads beyond that take part in the products of a load: which kernels those use, and so the
        last digits, depends on the number of loads.
        """
        helpers = max(1, self.threads // max(1, len(loads))) if sharing else 1

        def run(load: S) -> T:
            torch.set_num_threads(helpers)
            return work(load)

        return list(self._pool.map(run, loads))


def deal(sizes: Sequence[int], n_shares: int) -> list[list[int]]:
    """Indices of `sizes` in `n_shares` parts of about the same sum; none is empty if there are enough."""
    shares: list[list[int]] = [[] for _ in range(n_shares)]
    sums = [0] * n_shares
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        lightest = sums.index(min(sums))
        shares[lightest].append(index)
        sums[lightest] += sizes[index]
    return shares
