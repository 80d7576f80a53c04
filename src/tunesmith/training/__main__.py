"""`python -m tunesmith.training <run folder>`: trains, then writes `outcome.json`, last. See `tunesmith.rundir`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunesmith.errors import TunesmithError
from tunesmith.rundir import NO_ROOM, Outcome, RunDir
from tunesmith.training.process import AlreadyRunning, die_with_parent, only_trainer, stop_on_sigterm

logger = logging.getLogger("tunesmith.training")

UNEXPECTED = "The trainer met an unexpected error. The operator of this server finds it in the log of the run."
NO_ROOM_LEFT = "There is no room on the server's disk for checkpoints and results: free some, and fine-tune again."
"""Last words of the log: what the user is told if starting again was in vain too often."""
EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: start it again and it goes on."""


def main(arguments: list[str]) -> int:
    """Exit status: 0 with an outcome written, 75 when stopped with a checkpoint, 1 if another trainer is at work.

    Raises SystemExit (status 1) with a sentence for the user where the disk has no room.
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
                with dying_of_a_full_disk():
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
            with dying_of_a_full_disk():
                run_dir.write_outcome(outcome)
            logger.info("training ended run=%s status=%s", run_dir.path.name, outcome.status)
            return 0
    except AlreadyRunning as error:
        logger.error("%s", error)
        return 1


@contextmanager
def dying_of_a_full_disk() -> Iterator[None]:
    """Ends the process where the disk has no room: that is no outcome, and the run goes on when it is started again."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        logger.exception("training met a full disk")
        raise SystemExit(NO_ROOM_LEFT) from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
