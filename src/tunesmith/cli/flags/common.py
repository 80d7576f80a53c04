"""What the flags of several commands share. Each command names its function, "module:function"; `main` loads it."""

from __future__ import annotations

import argparse
from typing import Any, Literal, TypeAlias

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
"""What `add_subparsers` gives; argparse has no public name for it."""


def _everywhere() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False)
    # Without a default: the same flag before the command has one, and must not be undone here.
    parent.add_argument(
        "--json", action="store_true", default=argparse.SUPPRESS, help="JSON on standard output, and nothing else."
    )
    return parent


EVERYWHERE = _everywhere()
"""Parent of every command."""


def _listing() -> argparse.ArgumentParser:
    parent = argparse.ArgumentParser(add_help=False, parents=[EVERYWHERE])
    parent.add_argument(
        "-o",
        "--output",
        dest="format",
        choices=("table", "csv", "json"),
        help="A table for people, CSV with whole numbers and times in UTC, or the same JSON as --json.",
    )
    return parent


LISTING = _listing()
"""Parent of every command that shows a list."""


def add_group(commands: Commands, name: str, text: str, *, description: str | None = None) -> Commands:
    """A command that is followed by another one. Alone it shows its help."""
    group = commands.add_parser(name, help=text, description=description or text)
    group.set_defaults(run=None, group=group)
    return group.add_subparsers(title="commands", metavar="COMMAND")


def add_name(
    parser: argparse._ActionsContainer, *flags: str, of: Literal["job", "model", "file"], **options: Any
) -> argparse.Action:
    """An argument that names something on the server, which shells complete (see `cli/completion.py`)."""
    action = parser.add_argument(*flags, **options)
    action.names = of  # type: ignore[attr-defined]
    return action
