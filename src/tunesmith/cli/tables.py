"""Rows of text under headings: a drawn table on a terminal, padded columns in a log."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tunesmith.cli.output import Output


def show_table(output: Output, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Every cell whole, however narrow the terminal."""
    if output.terminal:
        table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a cell are no markup
        Console().print(table)
        return
    widths = [max(len(cell) for cell in column) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        output.say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
