"""The command line as such: help is quick, every command leads somewhere, every flag is in the reference."""

from __future__ import annotations

import argparse
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tunesmith.cli.flags.api import REFUSED
from tunesmith.cli.parser import build_parser
from tunesmith.cli.reference import reference

REFERENCE = Path(__file__).parents[2] / "docs" / "cli.md"
MOST_MODULES = 120
"""Loaded for a help text, beyond what the interpreter starts with: it was 87, and 0.05 s of a quiet machine."""
HEAVY = {"asyncio", "email", "http.client", "multiprocessing", "sqlite3", "ssl", "unittest", "urllib.request"}
"""What of the standard library takes about as long as all of those together."""


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and all those of its commands."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


ALL = list(parsers(build_parser()))
COMMANDS = [parser for parser in ALL if parser.get_default("run") is not None]


@pytest.mark.parametrize("parser", COMMANDS, ids=lambda parser: parser.prog)
def test_every_command_leads_to_a_documented_function(parser: argparse.ArgumentParser) -> None:
    command = pkgutil.resolve_name(parser.get_default("run"))
    assert callable(command)
    assert command.__doc__


def test_the_reference_is_what_the_parser_says() -> None:
    told = "docs/cli.md is old: python -m tunesmith.cli.reference > docs/cli.md"
    assert REFERENCE.read_text() == reference(), told


def test_the_reference_has_every_command_and_flag() -> None:
    text = REFERENCE.read_text()
    for parser in COMMANDS:
        if parser.add_help:  # those that are refused are not shown
            section = text.split(f"### `{parser.prog}`\n")[1].split("\n###")[0]
            flags = [flag for action in parser._actions for flag in action.option_strings]
            assert not [flag for flag in flags if flag not in ("-h", "--help", "--json") and f"`{flag}`" not in section]


def test_the_guide_names_every_verb_that_is_refused() -> None:
    text = REFERENCE.with_name("command-line.md").read_text()
    assert [row for verb, why in REFUSED.items() if (row := f"| `{verb}` | {why} |") not in text] == []


@pytest.mark.parametrize(
    "words", [["--help"], ["api", "--help"], ["api", "fine_tunes.create", "--help"], ["keys", "--help"]], ids=" ".join
)
def test_help_is_there_at_once(words: list[str]) -> None:
    """It loads nothing but a little of the standard library: how long that takes is the machine's affair."""
    program = (
        "import sys\n"
        "begun_with = set(sys.modules)\n"
        "from tunesmith.cli.main import main\n"
        f"try: main({words!r})\n"
        "except SystemExit: pass\n"
        "print(*set(sys.modules) - begun_with, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = done.stderr.split()
    assert f"usage: tunesmith {' '.join(words[:-1])}".rstrip() in done.stdout
    assert {name.partition(".")[0] for name in loaded} <= {"tunesmith", *sys.stdlib_module_names}
    assert not HEAVY & set(loaded)
    assert len(loaded) <= MOST_MODULES


def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["api", "files.get"])
    assert caught.value.code == 2
    assert "-i/--id" in capsys.readouterr().err
