from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.waiting import until
from tunesmith.rundir import RunDir
from tunesmith.runs import local
from tunesmith.runs.executor import RunState
from tunesmith.runs.local import LocalExecutor, count_memory_kills

# Says it is ready; at SIGTERM exits with 75 as a trainer does, unless it was told to be deaf.
WAITING = """
import json, os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
signal.signal(signal.SIGTERM, signal.SIG_IGN if (folder / "deaf").exists() else lambda *_: os._exit(75))
facts = {"pid": os.getpid(), "group": os.getpgrp(), "session": os.getsid(0), "nice": os.nice(0)}
facts["environment"] = {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "HOME")}
(folder / "facts.tmp").write_text(json.dumps(facts))
(folder / "facts.tmp").rename(folder / "ready")
while True:
    time.sleep(60)
"""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def executor(clock: Clock) -> LocalExecutor:
    return LocalExecutor(threads=3, niceness=7, command=(sys.executable, "-c", WAITING), monotonic=clock)


def _start(executor: LocalExecutor, folder: Path) -> str:
    handle = executor.start(folder)
    until((folder / "ready").exists)
    return handle


def _end(executor: LocalExecutor, handle: str) -> None:
    executor.stop(handle, 0.0)
    until(lambda: executor.state(handle) is not RunState.RUNNING)


def test_a_run_is_a_process_group_of_low_priority_with_its_settings(executor: LocalExecutor, tmp_path: Path) -> None:
    handle = _start(executor, tmp_path)
    facts = json.loads((tmp_path / "ready").read_text())
    _end(executor, handle)
    assert handle.startswith(f"{facts['pid']}:")
    assert facts["group"] == facts["pid"]
    assert facts["session"] == os.getsid(0)
    assert facts["nice"] == 7
    assert facts["environment"] == {
        "OMP_NUM_THREADS": "3",
        "OMP_WAIT_POLICY": "passive",
        "HOME": os.environ.get("HOME"),
    }


def test_stop_asks_first_and_lets_the_run_exit(executor: LocalExecutor, tmp_path: Path) -> None:
    handle = _start(executor, tmp_path)
    assert executor.state(handle) is RunState.RUNNING
    executor.stop(handle, 10.0)
    until(lambda: executor.state(handle) is RunState.EXITED)
    assert RunDir(tmp_path).log.read_text().endswith("The trainer process exited with code 75.\n")


def test_a_run_deaf_to_the_request_is_killed_when_its_grace_is_over(
    executor: LocalExecutor, clock: Clock, tmp_path: Path
) -> None:
    (tmp_path / "deaf").touch()
    handle = _start(executor, tmp_path)
    executor.stop(handle, 10.0)
    clock.now += 9.9
    executor.stop(handle, 10.0)
    assert executor.state(handle) is RunState.RUNNING
    clock.now += 0.2
    executor.stop(handle, 10.0)
    until(lambda: executor.state(handle) is RunState.EXITED)
    assert RunDir(tmp_path).log.read_text().endswith("The trainer process was ended by SIGKILL.\n")


@pytest.mark.parametrize(("kills", "shortages"), [(1, 1), (0, 0)])
def test_a_run_that_the_kernel_killed_for_memory_takes_less_the_next_time(
    tmp_path: Path, kills: int, shortages: int
) -> None:
    counts = iter([5, 5 + kills])
    executor = LocalExecutor(
        threads=1, niceness=0, command=(sys.executable, "-c", WAITING), memory_kills=lambda: next(counts)
    )
    handle = _start(executor, tmp_path)
    os.kill(int(handle.split(":")[0]), signal.SIGKILL)
    until(lambda: executor.state(handle) is RunState.EXITED)
    assert RunDir(tmp_path).count_shortages() == shortages
    assert ("ran out of memory" in RunDir(tmp_path).log.read_text()) == bool(shortages)


def test_a_kill_of_our_own_is_no_shortage(tmp_path: Path) -> None:
    counts = iter([5, 6])
    executor = LocalExecutor(
        threads=1, niceness=0, command=(sys.executable, "-c", WAITING), memory_kills=lambda: next(counts)
    )
    _end(executor, _start(executor, tmp_path))
    assert RunDir(tmp_path).count_shortages() == 0


def test_kills_for_memory_are_counted_where_the_kernel_tells(tmp_path: Path) -> None:
    (tmp_path / "vmstat").write_text("nr_free_pages 12\noom_kill 3\n")
    assert count_memory_kills(tmp_path / "vmstat") == 3
    assert count_memory_kills(tmp_path / "nowhere") == 0


def test_a_frozen_run_can_be_killed(executor: LocalExecutor, tmp_path: Path) -> None:
    handle = _start(executor, tmp_path)
    os.kill(int(handle.split(":")[0]), signal.SIGSTOP)
    executor.stop(handle, 0.0)
    until(lambda: executor.state(handle) is RunState.EXITED)


def test_another_executor_takes_up_the_handle(executor: LocalExecutor, tmp_path: Path) -> None:
    handle = _start(executor, tmp_path)
    successor = LocalExecutor(threads=1, niceness=0)
    assert successor.state(handle) is RunState.RUNNING
    successor.stop(handle, 0.0)
    # Killed and not yet reaped by its parent: the process table still has it, but nobody is at work.
    until(lambda: successor.state(handle) is RunState.LOST)
    until(lambda: executor.state(handle) is RunState.EXITED)
    assert successor.state(handle) is RunState.LOST


def test_a_stranger_with_a_recycled_pid_is_neither_watched_nor_killed(executor: LocalExecutor, tmp_path: Path) -> None:
    handle = _start(executor, tmp_path)
    pid, _, started = handle.partition(":")
    stale = f"{pid}:{int(started) - 1}"
    successor = LocalExecutor(threads=1, niceness=0)
    assert successor.state(stale) is RunState.LOST
    successor.stop(stale, 0.0)
    assert executor.state(handle) is RunState.RUNNING
    _end(executor, handle)


@pytest.mark.parametrize("handle", ["", "inline:1", "x:y", "4194399:12"])
def test_what_is_no_handle_of_ours_is_lost(executor: LocalExecutor, handle: str) -> None:
    assert executor.state(handle) is RunState.LOST
    executor.stop(handle, 0.0)


def test_a_start_that_fails_says_so(tmp_path: Path) -> None:
    executor = LocalExecutor(threads=1, niceness=0, command=("/nonexistent/python",))
    with pytest.raises(FileNotFoundError):
        executor.start(tmp_path)


@pytest.mark.skipif(shutil.which("ps") is None, reason="needs ps")
def test_ps_and_proc_agree_on_who_is_alive() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        _, started = local._stat_by_ps(child.pid)
        assert started == local._stat_by_ps(child.pid)[1] != ""
        assert local._stat(child.pid)[1]
    finally:
        child.communicate(b"\n")
    with pytest.raises(ProcessLookupError):
        local._stat_by_ps(child.pid)
    with pytest.raises(ProcessLookupError):
        local._stat(child.pid)
