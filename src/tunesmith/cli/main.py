"""From the arguments to an exit code: 0 done, 1 refused or failed, 2 wrong usage, 130 interrupted."""

from __future__ import annotations

import logging
import os
import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from tunesmith.cli.output import Output, UsageError
from tunesmith.cli.parser import build_parser
from tunesmith.errors import TunesmithError

if TYPE_CHECKING:
    import argparse

Command = Callable[["argparse.Namespace", Output], int]

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130
"""128 + SIGINT, as shells count."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. Wrong flags raise SystemExit(2), help SystemExit(0)."""
    args = build_parser().parse_args(argv)
    output = Output(machine=args.json, terminal=sys.stdout.isatty() and not args.json)
    logging.basicConfig(
        level=[logging.WARNING, logging.INFO, logging.DEBUG][min(args.verbosity, 2)],
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
    )
    # Named, not imported: a command's imports (HTTP client, tables, the server) are paid for by that command alone.
    command: Command = pkgutil.resolve_name(args.run)
    try:
        return command(args, output)
    except UsageError as error:
        output.failure(error)
        return EXIT_USAGE
    except TunesmithError as error:
        output.failure(error)
        return EXIT_FAILED
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough; Python must not complain again when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
