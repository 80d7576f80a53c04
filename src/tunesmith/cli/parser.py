"""The whole command line, without an import beyond the standard library: help answers in a few hundredths of a second.

Why argparse and not a library: docs/design/decisions/cli.md.
"""

from __future__ import annotations

import argparse

from tunesmith import __version__
from tunesmith.cli.flags.api import add_api
from tunesmith.cli.flags.data import add_doctor, add_prepare
from tunesmith.cli.flags.importing import add_import
from tunesmith.cli.flags.jobs import add_complete, add_completion, add_jobs, add_plan
from tunesmith.cli.flags.models import add_models
from tunesmith.cli.flags.server import add_demo, add_keys, add_serve
from tunesmith.cli.flags.tracking import add_export, add_wandb

EXIT_CODES = "exit codes: 0 done, 1 the server refused or the job failed, 2 wrong usage, 130 interrupted"


def build_parser() -> argparse.ArgumentParser:
    """Global flags, and every command in the order in which help shows them."""
    parser = argparse.ArgumentParser(
        prog="tunesmith",
        description="Fine-tune and serve language models on your own machine, behind OpenAI's API.",
        epilog=EXIT_CODES,
    )
    parser.set_defaults(run=None, group=parser, format=None)
    parser.add_argument("-V", "--version", action="version", version=f"%(prog)s {__version__}")
    parser.add_argument(
        "-v", "--verbose", action="count", dest="verbosity", default=0, help="Log more; twice for everything."
    )
    parser.add_argument(
        "-b",
        "--api-base",
        help="Base URL of the server, with /v1. Otherwise the first that is set of TUNESMITH_BASE_URL, "
        "OPENAI_BASE_URL and OPENAI_API_BASE; otherwise http://127.0.0.1:8000/v1.",
    )
    parser.add_argument(
        "-k",
        "--api-key",
        help="API key. Otherwise that in the file which OPENAI_API_KEY_PATH names; otherwise OPENAI_API_KEY; "
        "otherwise, for a server on this machine, the owner key in its home folder (TUNESMITH_HOME, or ~/.tunesmith). "
        "That key is never sent to another machine.",
    )
    parser.add_argument(
        "-p",
        "--proxy",
        nargs="+",
        default=[],
        help="HTTP proxies to reach the server through; one that starts with https is for https servers. Another flag "
        "has to follow, as with the published command line, since this one takes every word after it.",
    )
    parser.add_argument(
        "-o", "--organization", help="Sent along as the OpenAI-Organization header. Otherwise OPENAI_ORGANIZATION."
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="JSON on standard output, and nothing else. May also come after the command.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (
        add_serve,
        add_demo,
        add_prepare,
        add_doctor,
        add_plan,
        add_jobs,
        add_complete,
        add_models,
        add_export,
        add_import,
        add_wandb,
        add_keys,
        add_completion,
        add_api,
    ):
        add(commands)
    return parser
