"""What a command shows: colour and tables on a terminal, plain lines in a log, JSON for machines."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import TunesmithError


class UsageError(TunesmithError):
    """The command line itself is at fault: a file that cannot be read, flags that contradict each other."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where and how to show things; decided once, at the start."""

    machine: bool
    """JSON and nothing else on standard output."""
    terminal: bool
    """Somebody is watching: colour and movement are welcome."""

    def show(self, value: Any) -> None:
        """An API object, as the published command line shows it: indented JSON, ASCII only."""
        print(json.dumps(value, indent=2), flush=True)

    def record(self, value: Any) -> None:
        """One line of a stream of JSON values."""
        print(json.dumps(value), flush=True)

    def say(self, text: str = "") -> None:
        """A sentence for people; machines do not hear it."""
        if not self.machine:
            print(text, flush=True)

    def failure(self, error: TunesmithError) -> None:
        """The error, on standard error."""
        status: int | None = getattr(error, "status", None)
        if self.machine:
            fields = {"message": error.message, "param": error.param, "code": error.code, "status": status}
            sys.stderr.write(json.dumps({"error": fields}) + "\n")
            return
        red, plain = ("\033[91m", "\033[0m") if sys.stderr.isatty() else ("", "")
        known = "" if status is None else f" (HTTP status code: {status})"
        sys.stderr.write(f"{red}Error:{plain} {error.message}{known}\n")
