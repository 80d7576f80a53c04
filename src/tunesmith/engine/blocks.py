"""The blocks of a key/value cache: who uses them, and what is in those that others may use too. Knows no tensors.

A block is full of keys and values of some tokens after some others under some model; a key stands for all of that. The
block of a key may be shared. Where nobody uses it, it stays until its place is needed, the least recently used going
first.
"""

from __future__ import annotations

import hashlib
import heapq
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence

BLOCK_TOKENS = 32
"""Tokens of one block of the key/value cache."""
KEPT_SHARE = 0.5
"""Of a pool, at most: blocks that nobody uses. A cache then grows no further than its sequences ask for, twice over."""


def prefix_keys(identity: str, token_ids: Sequence[int]) -> list[bytes]:
    """The key of each full block of `token_ids`: a digest of all tokens up to its end, and of the model's identity."""
    digest = hashlib.blake2b(identity.encode(), digest_size=16)
    keys = []
    for start in range(0, len(token_ids) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
        digest.update(array("q", token_ids[start : start + BLOCK_TOKENS]).tobytes())
        keys.append(digest.digest())
    return keys


class BlockPool:
    """The blocks of one cache. The lowest numbers go first, so that a cache grows no larger than it has to."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks))
        self._users = [0] * blocks
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._kept: OrderedDict[int, None] = OrderedDict()  # shown, used by nobody; least recently used first
        self._announced: Counter[bytes] = Counter()

    @property
    def room(self) -> int:
        """Blocks that can be taken."""
        return len(self._free) + len(self._kept)

    def take(self, count: int) -> list[int] | None:
        """`count` block numbers for one user, or None if there are not so many."""
        if count > self.room:
            return None
        while len(self._free) < count:
            self._forget()
        taken = [heapq.heappop(self._free) for _ in range(count)]
        for block in taken:
            self._users[block] = 1
        return taken

    def give(self, blocks: Iterable[int]) -> None:
        """Back again, by one of their users."""
        for block in blocks:
            self._users[block] -= 1
            if self._users[block] == 0:
                if block in self._key_of:
                    self._kept[block] = None
                else:
                    heapq.heappush(self._free, block)
        while len(self._kept) > self.blocks * KEPT_SHARE:
            self._forget()

    def share(self, keys: Sequence[bytes]) -> list[int]:
        """The blocks of the first of `keys`, as far as they are there, for one more user."""
        found = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            self._kept.pop(block, None)
            self._users[block] += 1
            found.append(block)
        return found

    def show(self, key: bytes, block: int) -> None:
        """`block` is full and stays as it is: others may use it. Of two with the same content the first is shared."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def announce(self, keys: Iterable[bytes]) -> None:
        """Somebody is about to compute these."""
        self._announced.update(keys)

    def unannounce(self, keys: Iterable[bytes]) -> None:
        """They are there, or will not be."""
        for key in keys:
            self._announced[key] -= 1
            if self._announced[key] <= 0:
                del self._announced[key]

    def is_announced(self, key: bytes) -> bool:
        """Whether it is worth waiting for."""
        return key in self._announced

    def _forget(self) -> None:
        block, _ = self._kept.popitem(last=False)
        del self._block_of[self._key_of.pop(block)]
        heapq.heappush(self._free, block)
