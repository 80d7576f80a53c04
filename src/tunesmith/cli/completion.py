"""`tunesmith completion SHELL`, and what a shell is told then: commands, flags, and names from the server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator

import argcomplete
from argcomplete.shell_integration import shellcode

from tunesmith.cli.connection import connect
from tunesmith.cli.flags.api import REFUSED
from tunesmith.cli.output import Output
from tunesmith.errors import TunesmithError

PATIENCE_S = 1.0
"""A person who pressed TAB does not wait longer for names from the server; flags come without it."""

NAMED_BY = {"job": "fine-tunes", "model": "models", "file": "files"}
"""What an argument names, by the URL that lists it. Flags say which with `names`, see `flags/common.py`."""


def completion(args: argparse.Namespace, output: Output) -> int:
    """Prints a script that makes a shell complete."""
    script = shellcode(["tunesmith"], shell=args.shell)
    if output.machine:
        output.show({"shell": args.shell, "script": script})
    else:
        sys.stdout.write(script)
    return 0


def complete(parser: argparse.ArgumentParser) -> None:
    """Answers the shell that runs this process for its suggestions, and ends the process."""
    for one in _parsers(parser):
        for action in one._actions:
            if (what := getattr(action, "names", None)) is not None:
                action.completer = _names(NAMED_BY[what])  # type: ignore[attr-defined]
    argcomplete.autocomplete(parser, always_complete_options=False, exclude=REFUSED)


def _names(collection: str) -> Callable[..., list[str]]:
    def known(parsed_args: argparse.Namespace, **_: object) -> list[str]:
        """Ids of the server; none if it does not answer at once."""
        try:
            with connect(parsed_args, timeout_s=PATIENCE_S) as client:
                return [one["id"] for one in client.get(collection)["data"]]
        except (TunesmithError, ValueError):
            return []

    return known


def _parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from _parsers(child)
