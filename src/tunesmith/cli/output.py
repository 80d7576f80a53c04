"""What a command shows: colour and tables on a terminal, plain lines in a log, JSON for machines."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from dataclasses import dataclass
from typing import Any, Literal, TextIO

from tunesmith.errors import TunesmithError

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells count."""

COPIED = ("tunesmith ", "> ", "export ")
"""How lines begin that are to be pasted into a shell."""

Format = Literal["table", "csv", "json"]

_UNSEEN = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class UsageError(TunesmithError):
    """The command line itself is at fault: a file that cannot be read, flags that contradict each other."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where and how to show things; decided once, at the start."""

    machine: bool
    """JSON and nothing else on standard output."""
    terminal: bool
    """Somebody is watching: colour and movement are welcome."""
    format: Format | None = None
    """How a list is to come; None leaves it to the command."""

    def show(self, value: Any) -> None:
        """An API object, as the published command line shows it: indented JSON, ASCII only."""
        print(json.dumps(value, indent=2), flush=True)

    def record(self, value: Any) -> None:
        """One line of a stream of JSON values."""
        print(json.dumps(value), flush=True)

    def say(self, text: str = "", *, lead: str = "", colour: int | None = None) -> None:
        """A sentence for people; machines do not hear it. `lead` comes first, in a colour where there are colours."""
        if self.machine:
            return
        whole = visible(lead + text)
        whole = wrapped(whole, sys.stdout) if self.terminal else whole
        if colour is not None and self.terminal:
            end = len(visible(lead)) if text else len(whole)
            whole = f"\033[{colour}m{whole[:end]}\033[0m{whole[end:]}"
        print(whole, flush=True)

    def aside(self, text: str) -> None:
        """A sentence about what is shown, which is no part of it: on standard error."""
        sys.stderr.write(wrapped(visible(text), sys.stderr) + "\n")

    def failure(self, error: TunesmithError) -> None:
        """The error, on standard error."""
        status: int | None = getattr(error, "status", None)
        if self.machine:
            fields = {"message": error.message, "param": error.param, "code": error.code, "status": status}
            sys.stderr.write(json.dumps({"error": fields}) + "\n")
            return
        red, plain = ("\033[91m", "\033[0m") if takes_colour(sys.stderr) else ("", "")
        known = "" if status is None else f" (HTTP status code: {status})"
        sentence = wrapped(visible(f"Error: {error.message}{known}"), sys.stderr)
        sys.stderr.write(f"{red}Error:{plain}{sentence.removeprefix('Error:')}\n")


def output_for(*, json_asked: bool, asked: Format | None) -> Output:
    """What the flags and the terminal of this process make of it. Raises UsageError for flags that contradict."""
    if json_asked and asked not in (None, "json"):
        raise UsageError(f"--json and -o {asked} contradict each other. Leave one of them out.")
    machine = json_asked or asked == "json"
    watched = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return Output(machine=machine, terminal=watched and not machine, format="json" if machine else asked)


def visible(text: str) -> str:
    r"""`text` with control characters spelt out, as `\x1b`: file names and data must not steer the terminal."""
    return text.translate(_UNSEEN)


def wrapped(text: str, stream: TextIO) -> str:
    """Lines that end between words, where a terminal would break them anywhere. What is for copying stays as it is."""
    if not stream.isatty():
        return text
    columns = shutil.get_terminal_size().columns
    return "\n".join(_filled(line, columns) for line in text.split("\n"))


def _filled(line: str, columns: int) -> str:
    begun = line.lstrip()
    if len(line) <= columns or begun.startswith(COPIED):
        return line
    indent = " " * (len(line) - len(begun) + 2 * begun.startswith("- "))
    return textwrap.fill(
        line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, tabsize=1
    )


def takes_colour(stream: TextIO) -> bool:
    """Whether escape sequences are welcome there. Source of NO_COLOR: https://no-color.org."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
