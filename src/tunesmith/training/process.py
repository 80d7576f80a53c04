"""The trainer as a process: one per run folder, no longer alive than its parent, alive only while it works."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.rundir import PARENT_PID

_PR_SET_PDEATHSIG = 1
"""prctl(2)"""
_PARENT_WATCH_S = 0.5
_BEAT_S = 0.5


class AlreadyRunning(Exception):
    """Another trainer holds the run folder."""


@contextmanager
def only_trainer(lock: Path) -> Iterator[None]:
    """Holds the lock file of a run folder; the kernel lets go of it however the process ends. Raises AlreadyRunning."""
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise AlreadyRunning(f"another trainer works in {lock.parent}") from error
        yield


def die_with_parent() -> None:
    """From now on this process is killed when its parent ends, be that by kill -9.

    On Linux the kernel does it, and does so too when only the *thread* that started this process ends. Elsewhere, or if
    a parent died before this call came, a thread notices that the parent is not the one that PARENT_PID names.
    """
    parent = int(os.environ.get(PARENT_PID, os.getppid()))
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(_PARENT_WATCH_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="parent watch", daemon=True).start()


def stop_on_sigterm() -> Callable[[], bool]:
    """Whether SIGTERM has come since; it no longer ends the process by itself."""
    asked = threading.Event()
    signal.signal(signal.SIGTERM, lambda _number, _frame: asked.set())
    return asked.is_set


class Heartbeat:
    """Touches a file while work goes on, at most every half second; a loop that stalls stops touching."""

    def __init__(self, path: Path, clock: Callable[[], float]) -> None:
        self._path = path
        self._clock = clock
        self._touched_at = -float("inf")

    def __call__(self) -> None:
        """Says that work goes on."""
        now = self._clock()
        if now - self._touched_at >= _BEAT_S:
            self._path.touch()
            self._touched_at = now
