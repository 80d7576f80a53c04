"""Where an engine's randomness comes from: numbers that depend on a seed and a step, and on nothing else.

A generator with hidden state would make a sequence's tokens depend on what else is drawn; a hash of both cannot.
"""

from __future__ import annotations

import hashlib


def uniform(seed: int, step: int) -> float:
    """A number in [0, 1) for one step of one sequence; the same on every machine."""
    return (_hash(seed, step) >> 11) * 2.0**-53


def derive(seed: int, *parts: int) -> int:
    """A seed in [0, 2**63) for a part of what `seed` stands for, such as sample 3 of prompt 0."""
    return _hash(seed, *parts) >> 1


def _hash(*numbers: int) -> int:
    text = ":".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
