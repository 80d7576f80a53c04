"""`python -m tunesmith.training <run folder>...`: trains each until its `outcome.json`. See `tunesmith.rundir`."""

from __future__ import annotations

import gc
import logging
import sys
import time
from pathlib import Path

from tunesmith.rundir import ORDERS, RunDir
from tunesmith.training.process import AlreadyRunning, die_with_parent, stop_on_sigterm

logger = logging.getLogger("tunesmith.training")

EXIT_STOPPED = 75
"""EX_TEMPFAIL of sysexits.h: start it again and it goes on."""


def main(arguments: list[str]) -> int:
    """Exit status: 0 with all outcomes written, 75 when a run was let go of before, 1 if another trainer is at work.

    Raises SystemExit (status 1) with a sentence for the user where disk or memory fail.
    """
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    folders = [RunDir(Path(argument)) for argument in arguments if argument != ORDERS]
    die_with_parent()
    stop_asked = stop_on_sigterm()
    # Here and not above: torch takes seconds to load, and the parent may die, or SIGTERM come, in them.
    from tunesmith.training.host import Host
    from tunesmith.training.orders import Orders
    from tunesmith.training.together import Shared

    with Shared(time.monotonic) as shared:
        host = Host(shared, stop_asked, Orders(sys.stdin.fileno()) if ORDERS in arguments else None)
        try:
            for run_dir in folders:
                host.take(run_dir)
        except AlreadyRunning as error:
            logger.error("%s", error)
            return 1
        # What is there by now stays: looking through it for garbage took a twelfth of the time of small models.
        gc.freeze()
        while host.working:
            host.step()
    return EXIT_STOPPED if host.left else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
