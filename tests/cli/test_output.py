"""Lines on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from tunesmith.cli.output import takes_colour, wrapped


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
