"""An engine that takes its time over one job's rows keeps nobody else waiting."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.runs.platform import Platform, Watched, finish
from tests.waiting import until
from tunesmith.core.jobs import Job, JobStatus
from tunesmith.rundir import RunDir, RunSpec
from tunesmith.runs.dispatcher import Dispatcher
from tunesmith.runs.executor import RunState


@dataclass
class SlowGate:
    """Says nothing until it is opened."""

    opened: threading.Event = field(default_factory=threading.Event)
    asked: list[str] = field(default_factory=list)

    def __call__(self, run_dir: RunDir, spec: RunSpec) -> str | None:
        self.asked.append(spec.job_id)
        assert self.opened.wait(60.0)
        return None


@pytest.fixture
def gate(platform: Platform) -> Iterator[SlowGate]:
    gate = SlowGate()
    platform.parity = gate
    yield gate
    gate.opened.set()


@pytest.fixture
def executor() -> Watched:
    return Watched()


@pytest.fixture
def dispatcher(platform: Platform, executor: Watched, gate: SlowGate) -> Iterator[Dispatcher]:
    with ThreadPoolExecutor(1) as pool:
        yield platform.dispatcher(executor, ask=pool.submit)
        gate.opened.set()


def _train(platform: Platform, executor: Watched, dispatcher: Dispatcher, job: Job) -> None:
    """Starts the job whose turn it is, which is to be this one, and lets its trainer end."""
    dispatcher.tick()
    (path,) = (path for path in _folders(platform) if RunDir(path).read_spec().job_id == job.id)
    finish(path)
    executor.states = dict.fromkeys(executor.states, RunState.EXITED)
    dispatcher.tick()


def _folders(platform: Platform) -> list[Path]:
    return [path for path in (platform.home / "runs").iterdir() if RunDir(path).spec.exists()]


def test_the_next_job_trains_meanwhile_and_waits_for_the_gate_in_turn(
    platform: Platform, executor: Watched, dispatcher: Dispatcher, gate: SlowGate
) -> None:
    first, second, third = (platform.create() for _ in range(3))
    _train(platform, executor, dispatcher, first)
    assert gate.asked == [first.id]
    assert platform.get(second).status is JobStatus.RUNNING
    _train(platform, executor, dispatcher, second)
    assert [platform.get(job).status for job in (first, second, third)] == [JobStatus.RUNNING] * 3
    assert gate.asked == [first.id], "two at a time"

    gate.opened.set()

    def both_ended() -> bool:
        dispatcher.tick()
        return all(platform.get(job).status is JobStatus.SUCCEEDED for job in (first, second))

    assert until(both_ended)
    assert gate.asked == [first.id, second.id]


def test_cancelling_takes_effect_in_the_next_round_at_the_gate_and_beside_it(
    platform: Platform, executor: Watched, dispatcher: Dispatcher, gate: SlowGate
) -> None:
    first, second = platform.create(), platform.create()
    _train(platform, executor, dispatcher, first)
    dispatcher.tick()
    running = [handle for handle, state in executor.states.items() if state is RunState.RUNNING]
    for job in (first, second):
        platform.jobs.cancel(platform.caller, job.id)
    dispatcher.tick()

    assert [(handle, 0.0) for handle in running] == executor.stopped[-1:]
    gate.opened.set()
    dispatcher.drain()
    dispatcher.tick()
    for job in (first, second):
        assert platform.get(job).status is JobStatus.CANCELLED
        assert not platform.get(job).result_files
    assert len(platform.models.list(platform.caller)) == len(platform.bases.list())


def test_a_job_paused_at_the_gate_succeeds(
    platform: Platform, executor: Watched, dispatcher: Dispatcher, gate: SlowGate
) -> None:
    job = platform.create()
    _train(platform, executor, dispatcher, job)
    platform.jobs.pause(platform.caller, job.id)
    dispatcher.tick()
    gate.opened.set()

    def ended() -> bool:
        dispatcher.tick()
        return platform.get(job).status is JobStatus.SUCCEEDED

    assert until(ended)
    assert gate.asked == [job.id]


def test_stopping_waits_for_the_engine_and_the_next_dispatcher_asks_again(
    platform: Platform, executor: Watched, dispatcher: Dispatcher, gate: SlowGate
) -> None:
    job = platform.create()
    _train(platform, executor, dispatcher, job)
    draining = threading.Thread(target=dispatcher.drain)
    draining.start()
    draining.join(0.1)
    assert draining.is_alive(), "gone while the engine was at work for it"
    gate.opened.set()
    draining.join(60.0)
    assert platform.get(job).status is JobStatus.RUNNING

    successor = platform.dispatcher(executor)
    for _ in range(2):
        successor.tick()
    assert platform.get(job).status is JobStatus.SUCCEEDED
    assert gate.asked == [job.id] * 2


def test_an_engine_that_fails_is_asked_again(
    platform: Platform, executor: Watched, dispatcher: Dispatcher, gate: SlowGate
) -> None:
    def failing(run_dir: RunDir, spec: RunSpec) -> str | None:
        gate.asked.append(spec.job_id)
        if len(gate.asked) == 1:
            raise RuntimeError("the engine died")
        return None

    platform.parity = failing
    job = platform.create()
    _train(platform, executor, dispatcher, job)

    def ended() -> bool:
        platform.clock.now += 5
        dispatcher.tick()
        return platform.get(job).status is JobStatus.SUCCEEDED

    assert until(ended)
    assert gate.asked == [job.id] * 2
