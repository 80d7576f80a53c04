from __future__ import annotations

from dataclasses import dataclass, replace

from hypothesis import given
from hypothesis import strategies as st

from tunesmith.engine.base import GenerateRequest, SamplingParams
from tunesmith.engine.blocks import BLOCK_TOKENS, BlockPool, prefix_keys
from tunesmith.engine.scheduler import Chunk, Scheduler, Sequence


@dataclass(eq=False)
class Model:
    pool: BlockPool
    identity: str = "model"


def sequence(number: int, model: Model, prompt: int, max_tokens: int, *, like: int | None = None) -> Sequence[Model]:
    """`like`: prompts of the same value are alike as far as they go; each is another by default."""
    token = 1_000 + number if like is None else like
    request = GenerateRequest("model", (token,) * prompt, SamplingParams(max_tokens=max_tokens))
    return Sequence.begin(number, request, model)


def advance(scheduler: Scheduler[Model], chunk: Chunk[Model]) -> None:
    """What the runner does with a chunk: cache it, sample if it completes the pending tokens."""
    one = chunk.sequence
    scheduler.computed(chunk)
    if one.pending == 0:
        one.token_ids.append(2)
        if one.generated == one.request.sampling.max_tokens:
            scheduler.remove(one.number)


@given(
    asked=st.lists(
        st.tuples(st.integers(1, 100), st.integers(1, 40), st.integers(0, 1), st.integers(0, 2)),
        min_size=1,
        max_size=15,
    ),
    max_running=st.integers(1, 5),
    step_tokens=st.integers(5, 40),
)
def test_everything_runs_to_its_end_within_the_bounds(
    asked: list[tuple[int, int, int, int]], max_running: int, step_tokens: int
) -> None:
    models = [Model(BlockPool(5)), Model(BlockPool(7))]
    scheduler: Scheduler[Model] = Scheduler(max_running=max_running, step_tokens=step_tokens)
    everything = [
        sequence(i, models[m], prompt, tokens, like=like) for i, (prompt, tokens, m, like) in enumerate(asked)
    ]
    written: dict[tuple[int, int], list[int]] = {}
    for one in everything:
        scheduler.add(one)
    for _ in range(10_000):
        if not scheduler.busy:
            break
        waiting_to_generate = [one for one in scheduler.running if one.pending == 1]
        chunks = scheduler.next_step()
        assert 0 < sum(chunk.length for chunk in chunks) <= step_tokens
        assert len({chunk.sequence.number for chunk in chunks}) == len(chunks) <= max_running
        still_running = {one.number for one in scheduler.running}  # the youngest may have been put off
        assert {one.number for one in waiting_to_generate} & still_running <= {c.sequence.number for c in chunks}
        for chunk in chunks:
            assert len(chunk.blocks) * BLOCK_TOKENS >= chunk.end
            ids, pool = chunk.sequence.token_ids, models.index(chunk.sequence.model)
            for position in range(chunk.start, chunk.end):
                written[pool, chunk.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS] = [
                    *ids[: position + 1]
                ]
        for chunk in chunks:  # what a sequence sees in its blocks was made of its own tokens, by whomever
            ids, pool = chunk.sequence.token_ids, models.index(chunk.sequence.model)
            for position in range(chunk.end):
                place = chunk.blocks[position // BLOCK_TOKENS] * BLOCK_TOKENS + position % BLOCK_TOKENS
                assert written[pool, place] == ids[: position + 1]
        for chunk in chunks:
            advance(scheduler, chunk)
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


def test_what_requests_might_come_to_holds_up_nobody() -> None:
    model = Model(BlockPool(10))
    scheduler: Scheduler[Model] = Scheduler(max_running=8, step_tokens=512)
    endless = [sequence(number, model, 20, 9 * BLOCK_TOKENS) for number in range(5)]
    for one in endless:
        scheduler.add(one)
    scheduler.next_step()
    assert len(scheduler.running) == 5


def test_the_youngest_makes_room_and_goes_on_where_it_was() -> None:
    model = Model(BlockPool(5))
    scheduler: Scheduler[Model] = Scheduler(max_running=8, step_tokens=512)
    old, young = (sequence(number, model, BLOCK_TOKENS + 1, 2 * BLOCK_TOKENS) for number in range(2))
    order = []
    for one in (old, young):
        scheduler.add(one)
    put_off_at = 0
    while scheduler.busy:
        for chunk in scheduler.next_step():
            advance(scheduler, chunk)
            order.append(chunk.sequence.number)
        if young not in scheduler.running and old in scheduler.running and not put_off_at:
            put_off_at = young.generated
    assert put_off_at == BLOCK_TOKENS  # when both wanted a third block
    assert old.generated == young.generated == 2 * BLOCK_TOKENS
    assert order.index(1) < len(order) - order[::-1].index(0) - 1 < len(order) - 1
    assert model.pool.room == 5


def test_many_that_begin_alike_compute_their_beginning_once() -> None:
    model = Model(BlockPool(40))
    scheduler: Scheduler[Model] = Scheduler(max_running=8, step_tokens=512)
    prompt = 3 * BLOCK_TOKENS
    for number in range(5):
        scheduler.add(sequence(number, model, prompt, 4, like=7))
    scheduler.add(sequence(9, model, 50, 4))
    (first, other) = scheduler.next_step()
    assert (first.sequence.number, first.length, other.sequence.number) == (0, prompt, 9)
    for chunk in (first, other):
        advance(scheduler, chunk)
    chunks = scheduler.next_step()
    # The last token is computed again, to know what comes after it: so is the rest of its block.
    assert [(chunk.sequence.number, chunk.start) for chunk in chunks[2:]] == [
        (n, 2 * BLOCK_TOKENS) for n in range(1, 5)
    ]

    for chunk in chunks:
        advance(scheduler, chunk)
    while scheduler.busy:
        for chunk in scheduler.next_step():
            advance(scheduler, chunk)
    scheduler.add(sequence(10, Model(model.pool, "another"), prompt, 1, like=7))
    (alone,) = scheduler.next_step()
    assert alone.length == prompt


def test_one_that_waits_for_another_goes_on_when_that_is_cancelled() -> None:
    model = Model(BlockPool(40))
    scheduler: Scheduler[Model] = Scheduler(max_running=8, step_tokens=32)
    for number in range(2):
        scheduler.add(sequence(number, model, 100, 4, like=7))
    assert [chunk.sequence.number for chunk in scheduler.next_step()] == [0]
    scheduler.remove(0)
    (chunk,) = scheduler.next_step()
    assert (chunk.sequence.number, chunk.start) == (1, 0)


def test_payers_take_turns() -> None:
    model = Model(BlockPool(100))
    scheduler: Scheduler[Model] = Scheduler(max_running=2, step_tokens=512)
    for number in range(6):
        payer = "a" if number < 4 else f"b{number}"  # four of one, then one each of two others
        one = sequence(number, model, 10, 1)
        scheduler.add(replace(one, request=replace(one.request, payer=payer)))
    scheduler.remove(1)
    order = []
    while scheduler.busy:
        chunks = scheduler.next_step()
        order.append([chunk.sequence.number for chunk in chunks])
        for chunk in chunks:
            advance(scheduler, chunk)
    assert order == [[0, 4], [5, 2], [3]]


def test_who_has_no_place_is_given_one_of_whoever_has_most() -> None:
    model = Model(BlockPool(100))
    scheduler: Scheduler[Model] = Scheduler(max_running=4, step_tokens=512)

    def ask(number: int, payer: str, max_tokens: int) -> None:
        one = sequence(number, model, 10, max_tokens)
        scheduler.add(replace(one, request=replace(one.request, payer=payer)))

    def step() -> list[int]:
        chunks = scheduler.next_step()
        for chunk in chunks:
            advance(scheduler, chunk)
        return [chunk.sequence.number for chunk in chunks]

    for number in range(6):
        ask(number, "a", 20)
    assert step() == [0, 1, 2, 3]
    ask(6, "b", 3)
    ask(7, "b", 1)
    ask(8, "c", 1)
    assert step() == [0, 1, 6, 8]  # one each of those who had none, not all that they ask for
    assert step() == [0, 1, 6, 2]  # the rest goes in turns
    ask(9, "c", 1)
    assert 9 in step()
    while scheduler.busy:
        step()
    assert model.pool.room == 100


def test_who_has_one_place_keeps_it() -> None:
    model = Model(BlockPool(100))
    scheduler: Scheduler[Model] = Scheduler(max_running=2, step_tokens=512)
    for number in range(3):
        one = sequence(number, model, 10, 5)
        scheduler.add(replace(one, request=replace(one.request, payer=f"payer{number}")))
    for _ in range(3):
        chunks = scheduler.next_step()
        assert [chunk.sequence.number for chunk in chunks] == [0, 1]
        for chunk in chunks:
            advance(scheduler, chunk)


def test_what_is_scored_is_computed() -> None:
    model = Model(BlockPool(40))
    scheduler: Scheduler[Model] = Scheduler(max_running=8, step_tokens=512)
    sampling = SamplingParams(max_tokens=1)
    for number in range(2):
        request = GenerateRequest("model", (7,) * 100, sampling, top_logprobs=0, score_prompt=True)
        scheduler.add(Sequence.begin(number, request, model))
        (chunk,) = scheduler.next_step()
        assert chunk.length == 100
        advance(scheduler, chunk)


def test_keys_tell_tokens_places_and_models_apart() -> None:
    ids = list(range(3 * BLOCK_TOKENS))
    keys = prefix_keys("a", [*ids, 5])
    assert len(set(keys)) == 3
    assert prefix_keys("a", ids[: 2 * BLOCK_TOKENS]) == keys[:2]
    assert not set(keys) & set(prefix_keys("b", ids))
    assert not set(keys) & set(prefix_keys("a", ids[BLOCK_TOKENS:]))


def test_what_nobody_uses_makes_room_the_least_recently_used_first() -> None:
    pool = BlockPool(8)
    keys = prefix_keys("a", range(4 * BLOCK_TOKENS))
    blocks = pool.take(4) or []
    for key, block in zip(keys, blocks, strict=True):
        pool.show(key, block)
    pool.give(blocks)
    assert pool.share(keys[:1]) == blocks[:1]
    pool.give(blocks[:1])
    assert sorted(pool.take(6) or []) == [1, 2, *range(4, 8)]
    assert pool.share(keys) == blocks[:1]
    assert pool.take(2) is None
    assert pool.take(1) == [3]


def test_a_pool_gives_its_lowest_blocks_first() -> None:
    pool = BlockPool(6)
    assert pool.take(4) == [0, 1, 2, 3]
    assert pool.take(3) is None
    pool.give([2, 0])
    assert pool.take(3) == [0, 2, 4]
