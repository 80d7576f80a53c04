"""A server of a command's own: started, waited for, and gone when the command is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tunesmith.errors import TunesmithError

LONGEST_STOP_S = 30.0
LOG_TAIL_LINES = 15


class ServerDidNotStart(TunesmithError):
    """The server process ended before it listened."""


@contextmanager
def own_server(home: Path) -> Iterator[str]:
    """The base URL of a server on a free port with this home; on leaving, no process of it is left.

    Raises ServerDidNotStart with the end of its log, which is `<home>/serve.log`.
    """
    log = home / "serve.log"
    # The user's settings are for the user's server; this one has only its home.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
    command = [sys.executable, "-m", "tunesmith", "-v", "serve", "--home", str(home), "--port", "0", "--json"]
    with (
        log.open("ab") as log_file,
        # A session of its own: Ctrl-C reaches this process alone, which then ends the server in good order.
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=log_file, env=environment, start_new_session=True
        ) as process,
    ):
        try:
            assert process.stdout is not None
            announcement = process.stdout.readline()
            if not announcement:
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
                raise ServerDidNotStart(f"The server did not start. The end of {log}:\n{tail}")
            base_url: str = json.loads(announcement)["base_url"]
            yield base_url
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Asks, waits, and then leaves nothing: children are in the server's session."""
    process.terminate()
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(LONGEST_STOP_S)
    finally:  # a second Ctrl-C ends the waiting
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
