"""From the arguments to an exit code: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import io
import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tunesmith.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, Output, UsageError, output_for
from tunesmith.cli.parser import build_parser
from tunesmith.errors import TunesmithError

if TYPE_CHECKING:
    import argparse

Command = Callable[["argparse.Namespace", Output], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Wrong flags raise SystemExit(2), help SystemExit(0)."""
    _make_writable()
    try:
        return _run(argv)
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough
        _drop_output()
        return 0


def _drop_output() -> None:
    """Python must not complain again when it flushes at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _make_writable() -> None:
    """Neither an output that was closed (`>&-`) nor a terminal of a small encoding is a reason to fail."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", closefd=False))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    if "_ARGCOMPLETE" in os.environ:  # a shell asks what could come next
        from tunesmith.cli.completion import complete

        complete(parser)
    args = parser.parse_args(argv)
    if args.run is None:
        args.group.print_help()
        return 0
    output = Output(machine=args.json, terminal=False)
    try:
        output = output_for(json_asked=args.json, asked=args.format)
        logging.basicConfig(
            level=[logging.WARNING, logging.INFO, logging.DEBUG][min(args.verbosity, 2)],
            format="%(asctime)s %(levelname)s %(name)s %(message)s",
        )
        # Named, not imported: a command's imports (HTTP client, tables, the server) are paid for by that command alone.
        command: Command = pkgutil.resolve_name(args.run)
        code = command(args, output)
        sys.stdout.flush()  # here, where what goes wrong is told in words: files and pipes are written to at the end
        return code
    except UsageError as error:
        output.failure(error)
        return EXIT_USAGE
    except TunesmithError as error:
        output.failure(error)
        return EXIT_FAILED
    except BrokenPipeError:
        raise
    except OSError as error:  # a full disk behind standard output, say; what commands expect, they say better
        what = "" if error.filename is None else f"{error.filename}: "
        output.failure(TunesmithError(f"The system refuses to go on: {what}{error.strerror or error}."))
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return EXIT_FAILED
