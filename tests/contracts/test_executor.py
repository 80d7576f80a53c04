"""What every executor promises, whatever it runs on."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.waiting import until
from tunesmith.rundir import Outcome, RunDir
from tunesmith.runs.executor import Executor, InlineExecutor, RunState
from tunesmith.runs.local import LocalExecutor

TRAIN = """
import sys
from pathlib import Path
from tunesmith.rundir import Outcome, RunDir
folder = RunDir(Path(sys.argv[1]))
if (folder.path / "broken").exists():
    raise ValueError("these weights are not finite")
folder.write_outcome(Outcome("succeeded", steps=3))
"""


def _train(path: Path) -> None:
    if (path / "broken").exists():
        raise ValueError("these weights are not finite")
    RunDir(path).write_outcome(Outcome("succeeded", steps=3))


def _local() -> Executor:
    return LocalExecutor(threads=1, niceness=5, command=(sys.executable, "-c", TRAIN))


def _inline() -> Executor:
    return InlineExecutor(_train)


@pytest.fixture(params=[_local, _inline], ids=["local", "inline"])
def make(request: pytest.FixtureRequest) -> Callable[[], Executor]:
    make: Callable[[], Executor] = request.param
    return make


def _ended(executor: Executor, handle: str) -> RunState:
    return until(lambda: (state := executor.state(handle)) is not RunState.RUNNING and state)


def test_a_run_fills_its_folder_and_is_seen_to_end(make: Callable[[], Executor], tmp_path: Path) -> None:
    executor = make()
    handle = executor.start(tmp_path)
    assert _ended(executor, handle) is RunState.EXITED
    assert executor.state(handle) is RunState.EXITED  # asking again gives the same answer
    assert RunDir(tmp_path).read_outcome() == Outcome("succeeded", steps=3)


def test_a_run_that_dies_leaves_its_last_words_and_no_outcome(make: Callable[[], Executor], tmp_path: Path) -> None:
    executor = make()
    (tmp_path / "broken").touch()
    handle = executor.start(tmp_path)
    assert _ended(executor, handle) is RunState.EXITED
    assert RunDir(tmp_path).read_outcome() is None
    assert "these weights are not finite" in RunDir(tmp_path).log.read_text()


def test_the_same_folder_can_be_started_again(make: Callable[[], Executor], tmp_path: Path) -> None:
    executor = make()
    (tmp_path / "broken").touch()
    first = executor.start(tmp_path)
    _ended(executor, first)
    (tmp_path / "broken").unlink()
    second = executor.start(tmp_path)
    _ended(executor, second)
    assert first != second
    assert RunDir(tmp_path).read_outcome() is not None
    assert "these weights are not finite" in RunDir(tmp_path).log.read_text()  # the log goes on, it does not start anew


def test_a_handle_of_a_run_long_gone_is_lost(make: Callable[[], Executor], tmp_path: Path) -> None:
    executor = make()
    handle = executor.start(tmp_path)
    _ended(executor, handle)
    assert make().state(handle) is RunState.LOST


def test_stopping_is_idempotent_and_passes_for_runs_that_are_gone(make: Callable[[], Executor], tmp_path: Path) -> None:
    executor = make()
    handle = executor.start(tmp_path)
    begun = time.monotonic()
    executor.stop(handle, 60.0)
    executor.stop(handle, 60.0)
    assert time.monotonic() - begun < 5, "stop waits for the run to end"
    _ended(executor, handle)
    executor.stop(handle, 0.0)
    make().stop(handle, 0.0)
