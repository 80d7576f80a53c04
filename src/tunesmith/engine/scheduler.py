"""Which tokens of which sequences go into the next step. Knows counts, not tensors.

A sequence is admitted when its place in the key/value cache is free to its very end, so a running sequence never has
to be thrown out to make room. Each step takes one token of every sequence that is generating, then as much of the
prompts, oldest first, as the step has room for: a long prompt goes through in chunks and stalls nobody.
"""

from __future__ import annotations

import heapq
from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from tunesmith.engine.base import GenerateRequest, TokenScore

BLOCK_TOKENS = 32
"""Tokens of one block of the key/value cache."""


class BlockPool:
    """The free blocks of one cache. The lowest numbers go first, so that a cache grows no larger than it has to."""

    def __init__(self, blocks: int) -> None:
        self.blocks = blocks
        self._free = list(range(blocks))

    def take(self, count: int) -> list[int] | None:
        """`count` block numbers, or None if there are not so many."""
        if count > len(self._free):
            return None
        return [heapq.heappop(self._free) for _ in range(count)]

    def give(self, blocks: Iterable[int]) -> None:
        """Back again."""
        for block in blocks:
            heapq.heappush(self._free, block)


class Placed(Protocol):
    """What the scheduler asks of a model: where its sequences keep their keys and values."""

    @property
    def pool(self) -> BlockPool:
        """Shared by all models of one base."""


ModelT = TypeVar("ModelT", bound=Placed)


@dataclass(slots=True, eq=False)
class Sequence(Generic[ModelT]):
    """One request under way."""

    number: int
    request: GenerateRequest
    model: ModelT
    token_ids: list[int]
    """Prompt, then what was generated."""
    cached: int = 0
    """How many of them have their keys and values in the cache."""
    blocks: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token was generated, for penalties."""
    prompt_scores: list[TokenScore] = field(default_factory=list)

    @classmethod
    def begin(cls, number: int, request: GenerateRequest, model: ModelT) -> Sequence[ModelT]:
        """A request that has not run yet."""
        return cls(number, request, model, list(request.prompt_ids))

    @property
    def generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet: what is left of the prompt, or the token sampled last."""
        return len(self.token_ids) - self.cached

    @property
    def blocks_needed(self) -> int:
        """To its end. The last token is never fed back, but one to spare costs nothing."""
        return -(-(len(self.request.prompt_ids) + self.request.sampling.max_tokens) // BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Chunk(Generic[ModelT]):
    """The next `length` pending tokens of a sequence."""

    sequence: Sequence[ModelT]
    length: int

    @property
    def start(self) -> int:
        """Position of the first token."""
        return self.sequence.cached

    @property
    def end(self) -> int:
        """One after the position of the last token."""
        return self.sequence.cached + self.length

    @property
    def blocks(self) -> list[int]:
        """Where the sequence keeps its keys and values."""
        return self.sequence.blocks

    @property
    def completes(self) -> bool:
        """Whether nothing is pending afterwards, so that the next token can be sampled."""
        return self.length == self.sequence.pending


class Scheduler(Generic[ModelT]):
    """The waiting and the running sequences of an engine."""

    def __init__(self, *, max_running: int, step_tokens: int) -> None:
        """`step_tokens` bounds the work of a step and is at least `max_running`."""
        assert step_tokens >= max_running
        self._max_running = max_running
        self._step_tokens = step_tokens
        self._waiting: deque[Sequence[ModelT]] = deque()
        self._running: dict[int, Sequence[ModelT]] = {}  # in order of admission

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self._waiting or self._running)

    @property
    def running(self) -> list[Sequence[ModelT]]:
        """In order of admission."""
        return list(self._running.values())

    def add(self, sequence: Sequence[ModelT]) -> None:
        """Behind those that wait already. Its `blocks_needed` must not exceed the pool."""
        assert sequence.blocks_needed <= sequence.model.pool.blocks
        self._waiting.append(sequence)

    def remove(self, number: int) -> None:
        """Ends a sequence, wherever it is, and frees its place. Unknown numbers pass."""
        if sequence := self._running.pop(number, None):
            sequence.model.pool.give(sequence.blocks)
        else:
            self._waiting = deque(waiting for waiting in self._waiting if waiting.number != number)

    def next_step(self) -> list[Chunk[ModelT]]:
        """What to compute now; empty only if not `busy`."""
        self._admit()
        budget = self._step_tokens
        generating = [sequence for sequence in self._running.values() if sequence.pending == 1]
        chunks = [Chunk(sequence, 1) for sequence in generating]
        budget -= len(chunks)
        for sequence in self._running.values():
            if budget and sequence.pending > 1:
                chunks.append(Chunk(sequence, min(budget, sequence.pending)))
                budget -= chunks[-1].length
        return chunks

    def _admit(self) -> None:
        """Takes from the waiting in their order; one that finds no room holds back only those for the same cache."""
        full: list[BlockPool] = []
        still: deque[Sequence[ModelT]] = deque()
        while self._waiting and len(self._running) < self._max_running:
            sequence = self._waiting.popleft()
            pool = sequence.model.pool
            blocks = None if pool in full else pool.take(sequence.blocks_needed)
            if blocks is None:
                full.append(pool)
                still.append(sequence)
            else:
                sequence.blocks = blocks
                self._running[sequence.number] = sequence
        self._waiting.extendleft(reversed(still))
