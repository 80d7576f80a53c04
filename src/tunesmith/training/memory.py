"""How many tokens one forward pass may take: half as many each time memory runs out. Knows errors, no model.

How rows are cut into micro-batches changes a step by rounding alone, so a run goes on where a smaller part still fits.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from tunesmith.rundir import RunDir
from tunesmith.training.packing import MICRO_BATCH_TOKENS

logger = logging.getLogger(__name__)

LEAST_TOKENS = 32
"""Below this a forward pass is hardly smaller: what it needs is the model itself, or one long row."""

T = TypeVar("T")


class Room:
    """The room for micro-batches of one run, remembered in its folder: a trainer started again does not try in vain."""

    def __init__(self, run_dir: RunDir, most_tokens: int = MICRO_BATCH_TOKENS) -> None:
        self._run_dir = run_dir
        self._most_tokens = most_tokens

    @property
    def tokens(self) -> int:
        """Of one micro-batch, at most."""
        return max(LEAST_TOKENS, self._most_tokens >> self._run_dir.count_shortages())

    def fit(self, work: Callable[[int], T]) -> T:
        """`work(tokens)`, done again with fewer tokens as often as memory runs out; so it must leave nothing half done.

        Raises what `work` raised where there is too little memory for the least as well.
        """
        while True:
            tokens = self.tokens
            try:
                return work(tokens)
            except (MemoryError, RuntimeError) as error:
                if not is_shortage(error) or tokens == LEAST_TOKENS:
                    raise
                self._run_dir.note_shortage()
                logger.warning("memory ran out at %d tokens, trying %d: %s", tokens, self.tokens, error)


def is_lost(error: BaseException) -> bool:
    """Whether a GPU has failed a process, which can do nothing with it any more."""
    return isinstance(error, torch.AcceleratorError) and not is_shortage(error)


def is_shortage(error: BaseException) -> bool:
    """Whether memory ran out, on the processor or on a GPU."""
    # On the processor torch has no type of its own for it, and of a GPU not only torch says so.
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(each in str(error) for each in words)
