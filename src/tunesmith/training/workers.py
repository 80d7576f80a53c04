"""Threads that each take a share of the rows. Knows how work is shared out, not what it is.

Each thread runs its rows through the whole model by itself. Threads that shared each product instead would meet
hundreds of times a step: for a small model that costs more than it saves, and far more on a busy machine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Self, TypeVar

import torch

from tunesmith.training.batches import Row

T = TypeVar("T")


class Workers:
    """Threads of a run. To be closed (`with`). What they return depends on their number, never on their timing."""

    def __init__(self, threads: int, batch_size: int) -> None:
        """One worker a thread, as far as there are rows for them; threads beyond that share the work of products."""
        self.count = min(threads, batch_size)
        limit = partial(torch.set_num_threads, threads // self.count)
        limit()  # a setting of each thread, this one included
        self._pool = ThreadPoolExecutor(self.count, "worker", initializer=limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def run(self, work: Callable[[int, list[int]], T], rows: Sequence[Row]) -> list[T]:
        """`work(worker, indices)` for each worker's share of `rows`, on its thread; results by worker."""
        return list(self._pool.map(work, range(self.count), deal(rows, self.count)))


def deal(rows: Sequence[Row], n_shares: int) -> list[list[int]]:
    """Indices of `rows` in `n_shares` parts of about as many tokens; a part may be empty."""
    shares: list[list[int]] = [[] for _ in range(n_shares)]
    n_tokens = [0] * n_shares
    for index in sorted(range(len(rows)), key=lambda index: -len(rows[index].token_ids)):
        lightest = n_tokens.index(min(n_tokens))
        shares[lightest].append(index)
        n_tokens[lightest] += len(rows[index].token_ids)
    return shares
