"""Which tokens of which sequences go into the next step. Knows counts, not tensors.

A sequence is admitted when there is place in the key/value cache for its tokens so far, and takes more as it grows:
what a request without a limit might come to holds up nobody. Where the cache is full, the sequence that was admitted
last gives its place up and waits at the head of its line; its tokens are computed again, as far as their blocks are
gone by then, and it goes on where it was. The oldest always finds room, so all come to their end.

Each step takes one token of every sequence that is generating, then as much of the prompts, oldest first, as the step
has room for: a long prompt goes through in chunks and stalls nobody. Those who wait are admitted in turns, one of each
payer, so that a thousand requests of one hold up no other; where one has all places, whoever has none is given one.

Blocks at the head of a prompt that an earlier sequence of the same model has computed are taken from the cache. One
whose next block is being computed by another waits for it: many that begin alike compute their beginning once.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from tunesmith.engine.base import GenerateRequest, TokenScore
from tunesmith.engine.blocks import BLOCK_TOKENS, BlockPool, prefix_keys


class Placed(Protocol):
    """What the scheduler asks of a model: where its sequences keep their keys and values."""

    @property
    def pool(self) -> BlockPool:
        """Shared by all models of one base."""

    @property
    def identity(self) -> str:
        """Models of the same identity give the same tokens the same keys and values."""


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
    keys: list[bytes] = field(default_factory=list)
    """Of its full blocks, as far as their tokens are known."""
    shown: int = 0
    """How many of its full blocks others may use."""
    counts: Counter[int] = field(default_factory=Counter)
    """How often each token was generated, for penalties."""
    prompt_scores: list[TokenScore] = field(default_factory=list)

    @classmethod
    def begin(cls, number: int, request: GenerateRequest, model: ModelT) -> Sequence[ModelT]:
        """A request that has not run yet."""
        keys = prefix_keys(model.identity, request.prompt_ids)
        return cls(number, request, model, list(request.prompt_ids), keys=keys)

    @property
    def generated(self) -> int:
        """Tokens sampled so far."""
        return len(self.token_ids) - len(self.request.prompt_ids)

    @property
    def pending(self) -> int:
        """Tokens that are not in the cache yet: what is left of the prompt, or the token sampled last."""
        return len(self.token_ids) - self.cached

    @property
    def reusable_keys(self) -> list[bytes]:
        """Of the blocks that need not be computed: the last token must be, and all of a prompt that is to be scored."""
        if self.request.score_prompt and self.generated == 0:
            return []
        return self.keys[: (len(self.token_ids) - 1) // BLOCK_TOKENS]

    @property
    def blocks_now(self) -> int:
        """For its tokens so far."""
        return -(-len(self.token_ids) // BLOCK_TOKENS)

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
        self._waiting: dict[str, deque[Sequence[ModelT]]] = {}  # by payer, in the order of their turns
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
        self._waiting.setdefault(sequence.request.payer, deque()).append(sequence)

    def remove(self, number: int) -> None:
        """Ends a sequence, wherever it is, and frees its place. Unknown numbers pass."""
        if sequence := self._running.pop(number, None):
            _give_back(sequence)
        else:
            self._keep({p: deque(one for one in line if one.number != number) for p, line in self._waiting.items()})

    def next_step(self) -> list[Chunk[ModelT]]:
        """What to compute now; empty only if not `busy`."""
        self._make_way()
        self._admit()
        budget = self._step_tokens
        generating = [sequence for sequence in self._running.values() if sequence.pending == 1]
        chunks = [Chunk(sequence, 1) for sequence in generating]
        budget -= len(chunks)
        for sequence in self._running.values():
            if budget and sequence.pending > 1:
                chunks.append(Chunk(sequence, min(budget, sequence.pending)))
                budget -= chunks[-1].length
        for sequence in self.running:
            self._grow(sequence)
        return [chunk for chunk in chunks if chunk.sequence.number in self._running]

    def computed(self, chunk: Chunk[ModelT]) -> None:
        """The keys and values of `chunk` are in the cache: blocks that it has filled are there for others too."""
        sequence, pool = chunk.sequence, chunk.sequence.model.pool
        sequence.cached += chunk.length
        full = sequence.cached // BLOCK_TOKENS
        if full > len(sequence.keys):  # with tokens that were generated
            sequence.keys = prefix_keys(sequence.model.identity, sequence.token_ids[: full * BLOCK_TOKENS])
        for index in range(sequence.shown, full):
            pool.show(sequence.keys[index], sequence.blocks[index])
        pool.unannounce(sequence.keys[sequence.shown : full])
        sequence.shown = full

    def _grow(self, sequence: Sequence[ModelT]) -> None:
        """Gives a running sequence blocks for its tokens so far, at the cost of the one admitted last, if need be."""
        pool = sequence.model.pool
        while sequence.number in self._running and len(sequence.blocks) < sequence.blocks_now:
            if (more := pool.take(sequence.blocks_now - len(sequence.blocks))) is not None:
                sequence.blocks += more
            else:
                self._put_off(next(one for one in reversed(self._running.values()) if one.model.pool is pool))

    def _put_off(self, sequence: Sequence[ModelT]) -> None:
        del self._running[sequence.number]
        _give_back(sequence)
        sequence.blocks, sequence.shown, sequence.cached = [], 0, 0
        if sequence.generated == 0:
            sequence.prompt_scores.clear()
        self._waiting.setdefault(sequence.request.payer, deque()).appendleft(sequence)

    def _make_way(self) -> None:
        """Where all places are taken, whoever has most gives one to each payer who waits without any."""
        if len(self._running) < self._max_running:
            return
        places = Counter(one.request.payer for one in self._running.values())
        without = [payer for payer in self._waiting if not places[payer]]
        if not without:
            return
        for _ in without:
            (greedy, most), *_ = places.most_common(1)
            if most == 1:
                break
            places[greedy] -= 1
            self._put_off(next(one for one in reversed(self._running.values()) if one.request.payer == greedy))
        # It is their turn: or the places would be taken back.
        self._waiting = {payer: self._waiting[payer] for payer in [*without, *self._waiting]}

    def _admit(self) -> None:
        """Takes from the waiting in turns; one that finds no room holds back only those for the same cache."""
        full: list[BlockPool] = []
        still: dict[str, deque[Sequence[ModelT]]] = {payer: deque() for payer in self._waiting}
        while any(self._waiting.values()) and len(self._running) < self._max_running:
            for payer, line in list(self._waiting.items()):
                if not line or len(self._running) == self._max_running:
                    continue
                sequence = line.popleft()
                if sequence.model.pool not in full and self._place(sequence, full):
                    self._running[sequence.number] = sequence
                    # Whoever was served goes to the end of the turns.
                    self._waiting[payer] = self._waiting.pop(payer)
                else:
                    still[payer].append(sequence)
        self._keep({payer: still[payer] + line for payer, line in self._waiting.items()})

    def _place(self, sequence: Sequence[ModelT], full: list[BlockPool]) -> bool:
        """Gives a sequence its blocks, if it can have them now; a pool without room is noted in `full`."""
        pool, keys = sequence.model.pool, sequence.reusable_keys
        shared = pool.share(keys)
        if len(shared) < len(keys) and pool.is_announced(keys[len(shared)]):
            pool.give(shared)
            return False
        # One block each for those that will grow: who is let in should not be the next to be put off.
        growing = sum(one.model.pool is pool and len(one.blocks) < one.blocks_needed for one in self._running.values())
        missing = sequence.blocks_now - len(shared)
        own = pool.take(missing) if pool.room >= missing + growing else None
        if own is None:
            pool.give(shared)
            full.append(pool)
            return False
        sequence.blocks = shared + own
        sequence.shown = len(shared)
        sequence.cached = len(shared) * BLOCK_TOKENS
        pool.announce(sequence.keys[sequence.shown :])
        return True

    def _keep(self, waiting: dict[str, deque[Sequence[ModelT]]]) -> None:
        self._waiting = {payer: line for payer, line in waiting.items() if line}


def _give_back(sequence: Sequence[ModelT]) -> None:
    sequence.model.pool.unannounce(sequence.keys[sequence.shown :])
    sequence.model.pool.give(sequence.blocks)
