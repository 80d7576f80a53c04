"""Waiting for what other processes do: polls, never longer than needed, and says what did not happen."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def until(condition: Callable[[], T], *, within_s: float = 30.0, every_s: float = 0.01) -> T:
    """The first true answer of `condition`. Raises TimeoutError after `within_s`."""
    deadline = time.monotonic() + within_s
    while not (answer := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {within_s} s; the last answer was {answer!r}")
        time.sleep(every_s)
    return answer
