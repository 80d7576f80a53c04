"""docs/cli.md, written from the flags: `python -m tunesmith.cli.reference > docs/cli.md`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from tunesmith.cli.parser import build_parser

HEAD = """\
# Every command and flag

Written from the command line itself by `python -m tunesmith.cli.reference > docs/cli.md`. How the commands belong
together, what they show and how they end: [the command line](command-line.md).
"""


def reference() -> str:
    """The whole page."""
    top = build_parser()
    return "\n".join([HEAD, "## Before the command", "", *_flags(top), *_commands(top)]).rstrip() + "\n"


def _commands(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help for choice in action._choices_actions}
            for name, child in action.choices.items():
                if name in helps:  # one without help is not shown
                    yield from _command(child, helps[name] or "")
                    yield from _commands(child)


def _command(parser: argparse.ArgumentParser, text: str) -> Iterator[str]:
    if parser.get_default("run") is None:
        return
    yield from ("", f"### `{parser.prog}`", "", _cell(parser.description or text))
    rows = list(_flags(parser))
    if len(rows) > 2:
        yield from ("", *rows)


def _flags(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield from ("| flag | meaning |", "| --- | --- |")
    for action in parser._actions:
        known = isinstance(action, argparse._HelpAction | argparse._SubParsersAction) or action.dest == "json"
        if action.help == argparse.SUPPRESS or (known and parser.prog.count(" ")):
            continue  # every command has them
        if isinstance(action, argparse._SubParsersAction):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
        choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
        required = " Required." if action.option_strings and action.required else ""
        yield f"| {names} | {_cell(action.help or '')}{choices}{required} |"


def _cell(text: str) -> str:
    """Text that Markdown shows as it is: no HTML, no column ends."""
    return text.replace("%%", "%").replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    print(reference(), end="")
