from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.engine.base import GenerateRequest, SamplingParams
from tunesmith.engine.scheduler import BLOCK_TOKENS, BlockPool, Scheduler, Sequence


@dataclass(eq=False)
class Model:
    pool: BlockPool


def sequence(number: int, model: Model, prompt: int, max_tokens: int) -> Sequence[Model]:
    request = GenerateRequest("model", (1,) * prompt, SamplingParams(max_tokens=max_tokens))
    return Sequence.begin(number, request, model)


def advance(scheduler: Scheduler[Model], one: Sequence[Model], length: int) -> None:
    """What the runner does with a chunk: cache it, sample if it completes the pending tokens."""
    one.cached += length
    if one.pending == 0:
        one.token_ids.append(2)
        if one.generated == one.request.sampling.max_tokens:
            scheduler.remove(one.number)


@given(
    asked=st.lists(st.tuples(st.integers(1, 100), st.integers(1, 40), st.integers(0, 1)), min_size=1, max_size=15),
    max_running=st.integers(1, 5),
    step_tokens=st.integers(5, 40),
)
def test_everything_runs_to_its_end_within_the_bounds(
    asked: list[tuple[int, int, int]], max_running: int, step_tokens: int
) -> None:
    models = [Model(BlockPool(5)), Model(BlockPool(7))]
    scheduler: Scheduler[Model] = Scheduler(max_running=max_running, step_tokens=step_tokens)
    everything = [sequence(i, models[m], prompt, tokens) for i, (prompt, tokens, m) in enumerate(asked)]
    for one in everything:
        scheduler.add(one)
    for _ in range(10_000):
        if not scheduler.busy:
            break
        waiting_to_generate = [one for one in scheduler.running if one.pending == 1]
        chunks = scheduler.next_step()
        assert 0 < sum(chunk.length for chunk in chunks) <= step_tokens
        assert len({chunk.sequence.number for chunk in chunks}) == len(chunks) <= max_running
        assert {one.number for one in waiting_to_generate} <= {chunk.sequence.number for chunk in chunks}
        held = [block for one in scheduler.running if one.model is models[0] for block in one.blocks]
        assert len(set(held)) == len(held)  # no block belongs to two
        for chunk in chunks:
            assert len(chunk.blocks) * BLOCK_TOKENS >= chunk.end
            advance(scheduler, chunk.sequence, chunk.length)
    assert all(one.generated == one.request.sampling.max_tokens for one in everything)
    assert [sorted(model.pool.take(model.pool.blocks) or []) for model in models] == [list(range(5)), list(range(7))]


def test_one_that_needs_much_room_is_not_overtaken_for_ever() -> None:
    model, other = Model(BlockPool(4)), Model(BlockPool(4))
    scheduler: Scheduler[Model] = Scheduler(max_running=8, step_tokens=512)
    first, large, small = (sequence(i, model, n * BLOCK_TOKENS - 1, 1) for i, n in enumerate((2, 4, 1)))
    elsewhere = sequence(3, other, 10, 1)
    for one in (first, large, small, elsewhere):
        scheduler.add(one)
    assert [chunk.sequence for chunk in scheduler.next_step()] == [first, elsewhere]
    scheduler.remove(first.number)
    assert [chunk.sequence for chunk in scheduler.next_step()] == [elsewhere, large]
    scheduler.remove(large.number)
    assert small in [chunk.sequence for chunk in scheduler.next_step()]


def test_a_pool_gives_its_lowest_blocks_first() -> None:
    pool = BlockPool(6)
    assert pool.take(4) == [0, 1, 2, 3]
    assert pool.take(3) is None
    pool.give([2, 0])
    assert pool.take(3) == [0, 2, 4]
