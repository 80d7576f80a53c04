"""The process of an engine, begun: `python -m tunesmith.engine` and our end of the socket to it.

Imports next to nothing, so that a server can begin it before its own imports: the two take as long as each other.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from contextlib import ExitStack

logger = logging.getLogger(__name__)


class EngineProcess:
    """One process. It ends when `connection` is closed or this process dies."""

    def __init__(self, *, threads: int, precision: str = "float32", device: str = "cpu") -> None:
        """Begins it; `threads` are for the products inside a step, the others see `Settings.engine_precision`.

        Raises OSError if there can be no process.
        """
        self.connection, theirs = socket.socketpair()
        arguments = (theirs.fileno(), threads, os.getpid(), logger.getEffectiveLevel(), precision, device)
        with theirs, ExitStack() as undo:
            undo.callback(self.connection.close)
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith.engine", *map(str, arguments)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=os.environ | _thread_environment(threads),
            )
            undo.pop_all()


def _thread_environment(threads: int) -> dict[str, str]:
    """Read by the libraries when they are loaded. Waiting threads sleep: spinning ones starve the trainer beside us."""
    return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": "0"}
