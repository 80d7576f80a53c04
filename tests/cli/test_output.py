"""Lines on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from tunesmith.cli.output import Output, takes_colour, visible, wrapped


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("short", ["short"]),
        ("words that do not fit on a line", ["words that do not", "fit on a line"]),
        ("- an item that is too long", ["- an item that is", "  too long"]),
        ("  indented and rather long", ["  indented and", "  rather long"]),
        ("> tunesmith jobs create -t x", ["> tunesmith jobs create -t x"]),
        ("  tunesmith jobs watch ft-abcdefgh", ["  tunesmith jobs watch ft-abcdefgh"]),
        ("one-word-that-is-longer-than-that", ["one-word-that-is-longer-than-that"]),
        ("two\n\nlines", ["two", "", "lines"]),
    ],
)
def test_lines_end_between_words_on_a_terminal_alone(text: str, lines: list[str]) -> None:
    assert wrapped(text, Screen()).split("\n") == lines
    assert wrapped(text, io.StringIO()) == text


def test_control_characters_are_spelt_out_and_never_sent(capsys: pytest.CaptureFixture[str]) -> None:
    assert visible("a\tb\nc é 東\u00a0") == "a\tb\nc é 東\u00a0"
    assert visible("\x1b[2J\x07\r\x7f\x9b") == r"\x1b[2J\x07\x0d\x7f\x9b"
    Output(machine=False, terminal=False).say("\x1b[1mnot bold", lead="\x1b", colour=31)
    assert capsys.readouterr().out == r"\x1b\x1b[1mnot bold" + "\n"


def test_the_lead_of_a_line_is_coloured_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(machine=False, terminal=True)
    output.say(" of it", lead="some", colour=31)
    output.say(lead="all", colour=32)
    assert capsys.readouterr().out == "\033[31msome\033[0m of it\n\033[32mall\033[0m\n"


def test_where_colour_is_welcome(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    assert takes_colour(Screen())
    assert not takes_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "")  # set and empty is not set: https://no-color.org
    assert takes_colour(Screen())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not takes_colour(Screen())
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not takes_colour(Screen())
