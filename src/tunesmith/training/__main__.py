"""`python -m tunesmith.training <run folder>`: trains, then writes `outcome.json`, last. See `tunesmith.rundir`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.errors import TunesmithError
from tunesmith.rundir import BROKEN_DISK, NO_ROOM, Outcome, RunDir
from tunesmith.training.process import AlreadyRunning, die_with_parent, only_trainer, stop_on_sigterm

logger = logging.getLogger("tunesmith.training")

UNEXPECTED = "The trainer met an unexpected error. The operator of this server finds it in the log of the run."
NO_ROOM_LEFT = "There is no room on the server's disk for checkpoints and results: free some, and fine-tune again."
DISK_BROKEN = "The server's disk can only be read, or gives errors: it has to be mended; then fine-tune again."
NO_MEMORY = (
    "The server has too little memory for this model: make some free, or take a smaller one, and fine-tune again."
)
"""Last words of the log: what the user is told if starting again was in vain too often."""
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: start it again and it goes on."""


def main(arguments: list[str]) -> int:
    """Exit status: 0 with an outcome written, 75 when stopped with a checkpoint, 1 if another trainer is at work.

    Raises SystemExit (status 1) with a sentence for the user where disk or memory fail.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    (folder,) = arguments
    run_dir = RunDir(Path(folder))
    die_with_parent()
    stop_asked = stop_on_sigterm()
    try:
        with only_trainer(run_dir.lock):
            if run_dir.read_outcome() is not None:
                return 0
            # Here and not above: torch takes seconds to load, and the parent may die, or SIGTERM come, in them.
            from tunesmith.training.loop import train

            logger.info("training starts run=%s", run_dir.path.name)
            try:
                with dying_with_the_machine(run_dir):
                    outcome = train(run_dir, stop_asked=stop_asked)
            except TunesmithError as error:
                logger.info("training failed run=%s", run_dir.path.name, exc_info=True)
                outcome = Outcome("failed", error=error.message)
            except Exception:
                logger.exception("training failed run=%s", run_dir.path.name)
                outcome = Outcome("failed", error=UNEXPECTED)
            if outcome is None:
                logger.info("training stopped run=%s", run_dir.path.name)
                return EXIT_STOPPED
            with dying_with_the_machine(run_dir):
                run_dir.write_outcome(outcome)
            logger.info("training ended run=%s status=%s", run_dir.path.name, outcome.status)
            return 0
    except AlreadyRunning as error:
        logger.error("%s", error)
        return 1


@contextmanager
def dying_with_the_machine(run_dir: RunDir) -> Iterator[None]:
    """Ends the process where disk or memory fail: that is no outcome, and the run goes on when it is started again."""
    try:
        yield
    except (OSError, MemoryError, RuntimeError) as error:
        last_words = _last_words(error)
        if last_words is None:
            raise
        if last_words is NO_MEMORY:
            run_dir.note_shortage()
        logger.exception("training met a fault of the machine")
        raise SystemExit(last_words) from error


def _last_words(error: Exception) -> str | None:
    """What to say of a fault of the machine; None for any other error."""
    from tunesmith.training.memory import is_shortage  # torch, by then loaded

    if isinstance(error, OSError):
        return NO_ROOM_LEFT if error.errno in NO_ROOM else DISK_BROKEN if error.errno in BROKEN_DISK else None
    return NO_MEMORY if is_shortage(error) else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
