"""Rows of text under headings: a drawn table on a terminal, padded columns in a log."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.cli.output import Output


def show_table(
    output: Output, columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: frozenset[str] = frozenset()
) -> None:
    """Every cell whole, however narrow the terminal; columns named in `numbers` stand to the right."""
    if output.terminal:
        table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold", justify="right" if column in numbers else "left")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a cell are no markup
        Console().print(table)
        return
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        cells = zip(columns, row, widths, strict=True)
        padded = (cell.rjust(width) if column in numbers else cell.ljust(width) for column, cell, width in cells)
        output.say("  ".join(padded).rstrip())
