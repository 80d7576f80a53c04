"""A process that has its libraries loaded and forks for each task: fresh memory for every measurement, one import.

Tasks come as JSON lines on stdin, results go as JSON lines to the stdout that the process began with; whatever a task
prints goes to stderr. Knows neither competitor.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Task = Mapping[str, Any]
Result = dict[str, Any]


def serve(perform: Callable[[Task], Result]) -> None:
    """Performs each task of stdin in a fork of its own until stdin ends. A task that raises gives {"error"}."""
    answers = os.dup(1)
    os.dup2(2, 1)
    gc.freeze()  # what has been imported stays, for everybody
    os.write(answers, b'{"ready": true}\n')
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            try:
                result = perform(json.loads(line))
            except BaseException as error:  # whatever it is, the parent is told, and goes on to the next cell
                traceback.print_exc()
                result = {"error": f"{type(error).__name__}: {error}".partition("\n")[0]}
            os.write(answers, json.dumps(result).encode() + b"\n")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status != 0:  # killed: for memory, most likely
            os.write(answers, json.dumps({"error": f"ended with status {status}"}).encode() + b"\n")


class Competitor:
    """The other end: `python -m <module>` in an environment of its own."""

    def __init__(self, python: Path, module: str, environment: Mapping[str, str], log: Path) -> None:
        self._command = [str(python), "-m", module]
        self._environment = dict(environment)
        self._log = log

    def __enter__(self) -> Self:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._read()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def perform(self, task: Task) -> Result:
        """The result of a task; {"error"} if it failed. Raises RuntimeError if the process is gone."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(task) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Result:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(self._command)} ended; its last words are in {self._log}")
        result: Result = json.loads(line)
        return result


def peak_rss_mib() -> float:
    """Of this process, since it was forked (Linux)."""
    return _status_kib("VmHWM:") / 1024


def _status_kib(field: str) -> int:
    lines: Sequence[str] = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
