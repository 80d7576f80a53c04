"""Where runs are executed, as the dispatcher sees it. Knows run folders and handles, nothing of jobs or training.

Every executor passes the same suite, `tests/contracts/test_executor.py`.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from tunesmith.rundir import RunDir


class RunState(StrEnum):
    """What an executor knows of a run. How it ended is in the run folder: no outcome there, no success."""

    RUNNING = "running"
    EXITED = "exited"
    """It was seen to end."""
    LOST = "lost"
    """It is not running and nobody saw how it ended: another process started it, or the machine did start again."""


def trainer_of(handle: str) -> str:
    """What the handles of runs have in common that one trainer trains together."""
    return handle.partition("/")[0]


class Executor(Protocol):
    """Executes runs. Starting the same folder again after a run has ended goes on from its last checkpoint."""

    def start(self, run_dir: Path, beside: str | None = None) -> str:
        """Begin the run in `run_dir`; return a handle that outlives this process.

        With `beside`, the handle of a run of the same base, it joins the trainer of that run, if that is still there.
        """

    def state(self, handle: str) -> RunState:
        """Never raises for a handle once returned: a lost run is `RunState.LOST`."""

    def stop(self, handle: str, grace_s: float) -> None:
        """Ask the run to end, and no other. Idempotent; returns before it has ended; a run that is gone passes.

        Called again later than `grace_s` seconds after the first time, it ends the run by force; 0 does so at once.
        """


class InlineExecutor:
    """Runs each folder to its end within `start`, in this process: for tests, and to step through a run.

    `train` gets the run folder and stands for the trainer process. What it raises is written to the folder's log, as
    the traceback of a dying process would be.
    """

    def __init__(self, train: Callable[[Path], None]) -> None:
        self._train = train
        self._count = itertools.count(1)
        self._started: set[str] = set()

    def start(self, run_dir: Path, beside: str | None = None) -> str:
        """See `Executor`. The run has ended when this returns."""
        handle = f"inline:{next(self._count)}"
        self._started.add(handle)
        try:
            self._train(run_dir)
        except Exception:  # stands for the end of a process, which the process that started it survives
            with RunDir(run_dir).log.open("a") as log:
                traceback.print_exc(file=log)
        return handle

    def state(self, handle: str) -> RunState:
        """See `Executor`."""
        return RunState.EXITED if handle in self._started else RunState.LOST

    def stop(self, handle: str, grace_s: float) -> None:
        """See `Executor`. There is never anything left to end."""
