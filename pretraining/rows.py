"""Which stretches of the token stream make a batch: rows from all over it, in an order that is fixed.

Half of the corpus' tokens stand in documents of more than 4,000. A batch read in one piece would be three or four of
them, and its gradient theirs: the next rows are taken from far apart instead.
"""

from __future__ import annotations

from math import gcd

import numpy as np
from numpy.typing import NDArray

_SPREAD = (5**0.5 - 1) / 2
"""The golden ratio's share: multiples of it, modulo 1, stay as far from each other as can be."""


def rows(stream: NDArray[np.uint16], first: int, count: int, length: int) -> NDArray[np.int64]:
    """Rows `first` to `first + count`, each with the token that follows it: [count, length + 1].

    The stream is cut into rows of `length`, and each is read once before any is read again. Raises ValueError if it is
    shorter than a row and the token after it.
    """
    there = (len(stream) - 1) // length
    if there < 1:
        raise ValueError(f"{len(stream)} tokens of data are fewer than a row of {length} and the token after it")
    step = max(1, round(there * _SPREAD))
    while gcd(step, there) > 1:
        step += 1
    begins = np.arange(first, first + count, dtype=np.int64) * step % there * length
    return stream[begins[:, None] + np.arange(length + 1)].astype(np.int64)
