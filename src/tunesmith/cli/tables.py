"""Rows of text under headings: a drawn table on a terminal, padded columns in a log, CSV for spreadsheets."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from tunesmith.cli.output import Output, visible

NARROW_COLUMNS = 60
"""On a narrower terminal a row is shown as lines of `heading  cell`: ids must stay whole to be copied."""

Value = str | int | float | None


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a list of API objects."""

    heading: str
    value: Callable[[Any], Value]
    """Of an object, for machines; None is an empty cell."""
    shown: Callable[[Any], str] = str
    """Of a value that is there, for people."""
    number: bool = False
    """Numbers stand to the right."""


def show_list(output: Output, objects: Sequence[Any], columns: Sequence[Column]) -> None:
    """The objects as JSON, or their columns as CSV or as a table: whatever the flags ask for."""
    if output.machine:
        output.show(list(objects))
        return
    rows = [[column.value(one) for column in columns] for one in objects]
    if output.format == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow([column.heading.replace(" ", "_") for column in columns])
        writer.writerows(rows)
        return
    shown = [
        ["" if value is None else column.shown(value) for column, value in zip(columns, row, strict=True)]
        for row in rows
    ]
    numbers = frozenset(column.heading for column in columns if column.number)
    show_table(output, [column.heading for column in columns], shown, numbers=numbers)


def show_record(output: Output, value: Any, about: Mapping[str, str | None]) -> None:
    """One object as JSON, or what is worth knowing of it, a line each; None is left out."""
    if output.machine:
        output.show(value)
        return
    widest = max(map(len, about))
    console = Console(highlight=False) if output.terminal else None
    for name, text in about.items():
        if text is None:
            continue
        if console is None:
            output.say(f"{name:<{widest}}  {text}")
        else:
            _print_line(console, name.ljust(widest), text)


def time_column(heading: str, unix: Callable[[Any], int | None]) -> Column:
    """Times: UTC for machines, local minutes for people."""

    def value(one: Any) -> str | None:
        at = unix(one)
        return None if at is None else datetime.fromtimestamp(at, UTC).isoformat()

    return Column(heading, value, lambda text: f"{datetime.fromisoformat(text).astimezone():%Y-%m-%d %H:%M}")


def show_table(
    output: Output, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: frozenset[str] = frozenset()
) -> None:
    """Every cell whole, however narrow the terminal, the first on one line; `numbers` stand to the right."""
    if not output.terminal:
        _show_plain(output, columns, rows, numbers)
        return
    rows = [[visible(cell) for cell in row] for row in rows]
    console = Console(highlight=False)
    if console.width < NARROW_COLUMNS:
        _show_blocks(console, columns, rows)
        return
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    for number, column in enumerate(columns):  # the first names its row, and is copied
        justify: JustifyMethod = "right" if column in numbers else "left"
        table.add_column(column, overflow="fold", justify=justify, no_wrap=number == 0)
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a cell are no markup
    console.print(table)


def _show_blocks(console: Console, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widest = max(map(len, columns))
    for number, row in enumerate(rows):
        if number:
            console.print()
        for column, cell in zip(columns, row, strict=True):
            if cell:
                _print_line(console, column.ljust(widest), cell)


def _print_line(console: Console, name: str, text: str) -> None:
    """An id that is longer than the line is left to the terminal, which lets it be copied whole."""
    console.print(Text.assemble((name, "bold"), "  ", text), soft_wrap=" " not in text)


def _show_plain(output: Output, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: frozenset[str]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = zip(columns, row, widths, strict=True)
        padded = (cell.rjust(width) if column in numbers else cell.ljust(width) for column, cell, width in cells)
        output.say("  ".join(padded).rstrip())
