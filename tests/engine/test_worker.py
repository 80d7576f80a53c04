from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import ANY

import pytest

from tunesmith.engine.base import GenerateRequest, SampledToken, SamplingParams
from tunesmith.engine.messages import Cancel, Ended, Event, Generate, Load, Loaded, Produced
from tunesmith.engine.worker import Worker

TOKENS = 10
REQUEST = GenerateRequest("base", (5, 6, 7), SamplingParams(max_tokens=TOKENS, temperature=0))


def long_steps() -> Callable[[], float]:
    """A clock by which a second passes between two looks at it."""
    return map(float, itertools.count()).__next__


@pytest.mark.parametrize(
    ("clock", "messages"),
    [(lambda: 0.0, 1), (long_steps(), TOKENS)],
    ids=["short steps", "long steps"],
)
def test_tokens_of_short_steps_are_passed_on_together(
    tiny_base: Path, clock: Callable[[], float], messages: int
) -> None:
    with _working(tiny_base, clock) as (worker, came):
        worker.put(Generate(2, REQUEST))
        batches = [came.get(timeout=60) for _ in range(messages)]

    outputs = [event.output for batch in batches for event in batch if isinstance(event, Produced)]
    assert len(outputs) == TOKENS
    assert isinstance(outputs[-1], SampledToken)
    assert outputs[-1].finish == "length"
    assert came.empty()


def test_outputs_that_nobody_waits_for_come_with_the_last_and_hold_up_no_others(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunesmith.engine.worker.MOST_HELD", 10_000)
    scored = replace(REQUEST, top_logprobs=1, score_prompt=True)
    with _working(tiny_base, long_steps()) as (worker, came):
        worker.put(Generate(2, scored))
        as_they_come = [event for _ in range(TOKENS) for event in came.get(timeout=60)]
        worker.put(Generate(3, replace(scored, together=True)))
        [*together] = came.get(timeout=60)
        worker.put(Generate(4, replace(REQUEST, together=True, sampling=SamplingParams(max_tokens=100_000))))
        assert came.get(timeout=60) == [Ended(4, "refused", ANY)]
        worker.put(Generate(5, replace(REQUEST, together=True, sampling=SamplingParams(max_tokens=2_000))))
        worker.put(Generate(6, REQUEST))
        beside = [event for _ in range(TOKENS) for event in came.get(timeout=60)]
        worker.put(Cancel(5))
        worker.put(Generate(7, replace(REQUEST, together=True)))
        last = came.get(timeout=60)

    assert len(as_they_come) == 1 + TOKENS
    assert together == [replace(event, number=3) for event in as_they_come if isinstance(event, Produced)]
    assert {event.number for event in beside} == {6}
    assert last == [replace(event, number=7) for event in beside if isinstance(event, Produced)]
    assert came.empty()


@contextmanager
def _working(base: Path, clock: Callable[[], float]) -> Iterator[tuple[Worker, queue.SimpleQueue[list[Event]]]]:
    """A worker that has loaded the base, and what it says."""
    came: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    worker = Worker(threads=1, emit=came.put, clock=clock)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        worker.put(Load(1, "base", str(base), None))
        assert came.get(timeout=60) == [Loaded(1)]
        yield worker, came
    finally:
        worker.stop()
        thread.join()
