from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.engine.base import GenerateRequest, SampledToken, SamplingParams
from tunesmith.engine.messages import Event, Generate, Load, Loaded, Produced
from tunesmith.engine.worker import Worker

TOKENS = 10


@pytest.mark.parametrize(
    ("clock", "messages"),
    [(lambda: 0.0, 1), (map(float, itertools.count()).__next__, TOKENS)],
    ids=["short steps", "long steps"],
)
def test_tokens_of_short_steps_are_passed_on_together(
    tiny_base: Path, clock: Callable[[], float], messages: int
) -> None:
    came: queue.SimpleQueue[list[Event]] = queue.SimpleQueue()
    worker = Worker(threads=1, emit=came.put, clock=clock)
    thread = threading.Thread(target=worker.run)
    thread.start()
    try:
        worker.put(Load(1, "base", str(tiny_base), None))
        assert came.get(timeout=60) == [Loaded(1)]
        worker.put(Generate(2, GenerateRequest("base", (5, 6, 7), SamplingParams(max_tokens=TOKENS, temperature=0))))
        batches = [came.get(timeout=60) for _ in range(messages)]
    finally:
        worker.stop()
        thread.join()

    outputs = [event.output for batch in batches for event in batch if isinstance(event, Produced)]
    assert len(outputs) == TOKENS
    assert isinstance(outputs[-1], SampledToken)
    assert outputs[-1].finish == "length"
    assert came.empty()
