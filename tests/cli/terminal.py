"""Commands at a terminal: a pseudo-terminal of a given size, what is written to it, and keys pressed at it."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|[=>])")
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-9]|4[0-9]|9[0-9])[0-9;]*m")
PROGRAM = [sys.executable, "-m", "tunesmith"]
ENDS_WITHIN_S = 60.0


class Terminal:
    """A process whose standard input, output and error are a terminal."""

    def __init__(self, process: subprocess.Popen[bytes], master: int) -> None:
        self.process = process
        self._master = master
        self._written = b""

    @property
    def written(self) -> str:
        """Everything so far, escape sequences and all."""
        return self._written.decode(errors="replace")

    @property
    def text(self) -> str:
        """The same without escape sequences."""
        return ESCAPE.sub("", self.written).replace("\r\n", "\n")

    @property
    def last_frame(self) -> str:
        """What was written since something was last overwritten."""
        return ESCAPE.sub("", re.split(r"\x1b\[\d*[AK]", self.written)[-1]).replace("\r\n", "\n")

    def wait_for(self, text: str) -> None:
        """Reads until `text` has been written."""
        self._read(lambda: text in self.text)
        assert text in self.text, self.text

    def press(self, keys: str) -> None:
        """As a person would; Ctrl-C is "\\x03"."""
        os.write(self._master, keys.encode())

    def end(self) -> int:
        """The exit code; everything has been read then."""
        self._read(lambda: False)
        return self.process.wait(ENDS_WITHIN_S)

    def _read(self, enough: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + ENDS_WITHIN_S
        while not enough():
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline_s - time.monotonic()))
            assert ready, f"nothing came any more:\n{self.text}"
            try:
                piece = os.read(self._master, 65_536)
            except OSError:  # Linux: the last process with the terminal open is gone
                return
            if not piece:
                return
            self._written += piece


@contextmanager
def at_terminal(
    words: Sequence[str], environment: Mapping[str, str], folder: Path, *, columns: int = 80, rows: int = 24
) -> Iterator[Terminal]:
    """`tunesmith WORDS` at a terminal of this size; killed if it has not ended by then."""
    kept = {name: value for name, value in environment.items() if name not in ("COLUMNS", "LINES")}
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(
        [*PROGRAM, *words],
        env={**kept, "TERM": "xterm-256color"},
        cwd=folder,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
    )
    os.close(slave)
    try:
        yield Terminal(process, master)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()
        os.close(master)
