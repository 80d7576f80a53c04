"""The runs of one trainer process: taken up, advanced a step at a time, let go of. Knows folders, files and ends.

All runs take their steps together, and each goes its own way: what happens to one is no other's, but for a fault of the
machine, which ends the process and with it all of them, for a while.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Callable, Generator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tunesmith.errors import TunesmithError
from tunesmith.rundir import BROKEN_DISK, NO_ROOM, Outcome, RunDir
from tunesmith.training.loop import lessons
from tunesmith.training.memory import is_lost, is_shortage
from tunesmith.training.metrics import Tally
from tunesmith.training.orders import Orders
from tunesmith.training.process import AlreadyRunning, only_trainer
from tunesmith.training.together import Shared, Wanted

logger = logging.getLogger("tunesmith.training")

UNEXPECTED = "The trainer met an unexpected error. The operator of this server finds it in the log of the run."
NO_ROOM_LEFT = "There is no room on the server's disk for checkpoints and results: free some, and fine-tune again."
DISK_BROKEN = "The server's disk can only be read, or gives errors: it has to be mended; then fine-tune again."
DEVICE_LOST = "The GPU of the server fails: its log says how; then fine-tune again."
NO_MEMORY = (
    "The server has too little memory for this model: make some free, or take a smaller one, and fine-tune again."
)
"""Last words of the log: what the user is told if starting again was in vain too often."""


class _Dropped(Exception):
    """The run at work is to be let go of."""


@dataclass(slots=True)
class _Run:
    run_dir: RunDir
    lock: ExitStack
    beside: bool
    """Whether the output of this process goes to another run's log."""
    steps: Generator[Wanted, Tally | None, Outcome | None]
    wanted: Wanted | None = None
    """None before its first step."""
    saving: bool = False
    dropped: bool = False


class Host:
    """`stop_asked` is whether all runs are to write a checkpoint and end; `orders` come while it works, if at all."""

    def __init__(self, shared: Shared, stop_asked: Callable[[], bool], orders: Orders | None) -> None:
        self._shared, self._stop_asked, self._orders = shared, stop_asked, orders
        self._runs: dict[Path, _Run] = {}
        self._at_work: _Run | None = None
        self._arriving: list[RunDir] = []
        self._following = threading.Lock()
        self.left = 0
        """Runs without an outcome that were let go of."""
        shared.check = self._check

    @property
    def working(self) -> bool:
        """Whether there is a run."""
        return bool(self._runs or self._arriving)

    def take(self, run_dir: RunDir, *, beside: bool = False) -> None:
        """Begins with a run. Raises AlreadyRunning; SystemExit where disk or memory fail."""
        lock = ExitStack()
        lock.enter_context(only_trainer(run_dir.lock))
        if run_dir.read_outcome() is not None:
            lock.close()
            return
        logger.info("training starts run=%s", run_dir.path.name)
        run: _Run

        def stop_asked() -> bool:
            self._follow()
            return run.saving or self._stop_asked()

        run = _Run(run_dir, lock, beside, lessons(run_dir, self._shared, stop_asked=stop_asked))
        self._runs[run_dir.path] = run
        self._advance(run, None)

    def step(self) -> None:
        """One step of every run. Raises SystemExit where disk or memory fail."""
        self._follow()
        for run in [run for run in self._runs.values() if run.dropped]:
            self._release(run)
        while self._arriving:
            self._take_beside(self._arriving.pop(0))
        runs = [run for run in self._runs.values() if run.wanted is not None]
        found = self._shared.learn([run.wanted for run in runs if run.wanted is not None])
        for run, tally in zip(runs, found, strict=True):
            if not run.dropped:  # from now on nothing more is written
                self._advance(run, tally)

    def _advance(self, run: _Run, found: Tally | Exception | None) -> None:
        self._at_work = run
        try:
            run.wanted = run.steps.throw(found) if isinstance(found, Exception) else run.steps.send(found)
        except StopIteration as end:
            self._end(run, end.value)
        except _Dropped:
            self._release(run)
        except Exception as error:
            if run.beside:
                with run.run_dir.log.open("a") as log:
                    traceback.print_exc(file=log)
            self._end(run, failure(run.run_dir, error))
        finally:
            self._at_work = None

    def _end(self, run: _Run, outcome: Outcome | None) -> None:
        if outcome is None:
            logger.info("training stopped run=%s", run.run_dir.path.name)
            self._release(run)
            return
        try:
            run.run_dir.write_outcome(outcome)
        except OSError as error:
            failure(run.run_dir, error)
            raise
        logger.info("training ended run=%s status=%s", run.run_dir.path.name, outcome.status)
        self._forget(run)

    def _release(self, run: _Run) -> None:
        self.left += 1
        run.steps.close()
        self._forget(run)
        run.run_dir.released.touch()

    def _forget(self, run: _Run) -> None:
        del self._runs[run.run_dir.path]
        self._shared.forget(run.run_dir)
        run.lock.close()

    def _take_beside(self, run_dir: RunDir) -> None:
        try:
            self.take(run_dir, beside=True)
        except AlreadyRunning as error:
            logger.error("%s", error)
            run_dir.released.touch()

    def _follow(self) -> None:
        """Notes what is ordered. A new run is begun, and one that is there let go of, where no other is at work."""
        if self._orders is None or not self._following.acquire(blocking=False):
            return
        try:
            for order in self._orders.new():
                run, run_dir = self._runs.get(order.folder), RunDir(order.folder)
                if order.verb == "take":
                    self._arriving.append(run_dir)
                elif run_dir in self._arriving:
                    self._arriving.remove(run_dir)
                    run_dir.released.touch()
                elif run is not None and order.verb == "save":
                    run.saving = True
                elif run is not None:
                    run.dropped = True
        finally:
            self._following.release()

    def _check(self) -> None:
        """What a beat looks after: a run that measures for minutes is let go of all the same."""
        self._follow()
        if self._at_work is not None and self._at_work.dropped:
            raise _Dropped


def failure(run_dir: RunDir, error: Exception) -> Outcome:
    """What the user is told of a run that raised `error`.

    Raises SystemExit with a sentence where disk, memory or GPU fail: that is no outcome, and all runs go on when they
    are started again.
    """
    if isinstance(error, OSError):
        last_words = NO_ROOM_LEFT if error.errno in NO_ROOM else DISK_BROKEN if error.errno in BROKEN_DISK else None
    else:
        last_words = NO_MEMORY if is_shortage(error) else DEVICE_LOST if is_lost(error) else None
    if last_words is not None:
        if last_words is NO_MEMORY:
            run_dir.note_shortage()
        logger.error("training met a fault of the machine run=%s", run_dir.path.name, exc_info=error)
        raise SystemExit(last_words) from error
    if isinstance(error, TunesmithError):
        logger.info("training failed run=%s", run_dir.path.name, exc_info=error)
        return Outcome("failed", error=error.message)
    logger.error("training failed run=%s", run_dir.path.name, exc_info=error)
    return Outcome("failed", error=UNEXPECTED)
