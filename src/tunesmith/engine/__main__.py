"""`python -m tunesmith.engine <socket> <threads> <parent> <log level> <precision> <device>`: see `remote.py`.

Reads commands and writes events, a line of JSON each; the first line says that it is ready. Ends with its parent.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
import threading
from typing import cast

import torch

from tunesmith.engine.base import Precision
from tunesmith.engine.messages import Event, command_from_line, events_to_line
from tunesmith.engine.worker import Worker

PR_SET_PDEATHSIG = 1
THREAD_SWITCH_S = 0.0002
"""How long steps wait for the interpreter while a model is read beside them: at Python's 0.005 reading forty adapters a
second made prompts of a small model 13 % slower, and now 5 %."""


def main(socket_number: int, threads: int, parent: int, log_level: int, precision: Precision, device: str) -> None:
    """Serves until the parent closes the socket or dies. Raises SystemExit, with a sentence, for want of a `device`."""
    _die_with(parent)
    if device != "cpu":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (torch.device(device).index or 0) >= found:
            sys.exit(
                f"TUNESMITH_ENGINE_DEVICE={device}: torch {torch.__version__} finds {found} of CUDA. Set it to cpu."
            )
        torch.set_float32_matmul_precision("highest")
    for number in (signal.SIGINT, signal.SIGTERM):
        # Ctrl-C and service managers reach the whole group; the parent, finishing its answers, decides when to end.
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(level=log_level, format="%(asctime)s engine %(levelname)s %(message)s")
    with socket.socket(fileno=socket_number) as connection:

        def emit(events: list[Event]) -> None:
            connection.sendall(events_to_line(events))

        worker = Worker(threads=threads, precision=precision, device=device, emit=emit)
        threading.Thread(target=_read, args=(connection, worker), name="commands", daemon=True).start()
        emit([])
        # What has been imported stays: looking through it for garbage took a twentieth of the time of small models.
        gc.freeze()
        sys.setswitchinterval(THREAD_SWITCH_S)
        worker.run()


def _read(connection: socket.socket, worker: Worker) -> None:
    with connection.makefile("rb") as lines:
        for line in lines:
            worker.put(command_from_line(line))
    os._exit(0)  # the parent is gone or done with us: nothing here is worth finishing


def _die_with(parent: int) -> None:
    """Ends this process when the parent dies, even in the midst of a long step (Linux; elsewhere `_read` does)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before that was set
        sys.exit(0)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:5]]
    main(numbers[0], numbers[1], numbers[2], numbers[3], cast(Precision, sys.argv[5]), sys.argv[6])
