"""Reading CSV and TSV: cells with line ends and quotes in them, short and long rows, quotes that never close."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tunesmith.data.encoding import MAX_LINE_CHARACTERS, lines_of
from tunesmith.data.rows import BATCH_ROWS, Batch, Broken, Columns, Wanted
from tunesmith.errors import InvalidRequest

_END = "\0"
"""Stands after the last line. No text file holds it, so if it is swallowed, a quote was open."""
_LINE_END = re.compile(r"\r\n|\r|\n")

Cells = list[str]


def table_columns(path: Path, encoding: str, separator: str, wanted: Wanted) -> Columns:
    """The columns by their heading. Raises InvalidRequest without one, and as `Wanted.choose`."""
    for rows, _, _ in _cells(path, encoding, separator):
        for cells in rows:
            if not _blank(cells):
                return wanted.choose(unique_names(cells))
    raise InvalidRequest("The file is empty: it has no heading and no row.", param="file", code="empty_file")


def table_batches(path: Path, encoding: str, separator: str, columns: Columns) -> Iterator[Batch]:
    """The rows below the heading. Short rows are filled with empty cells, blank lines are passed over.

    Raises InvalidRequest naming lines whose rows have more cells than the heading, and for quotes that never close.
    """
    width, prompt, completion = len(columns.names), *map(columns.names.index, (columns.prompt, columns.completion))
    broken = Broken("Line")
    number, heading = 1, True
    for rows, line, read_bytes in _cells(path, encoding, separator):
        if set(map(len, rows)) != {width} or heading:
            kept = _regular(rows, line, width, broken, heading=heading)
            heading = heading and all(map(_blank, rows))
        else:
            kept = rows
        if kept:
            yield Batch(number, [row[prompt] for row in kept], [row[completion] for row in kept], read_bytes)
            number += len(kept)
    broken.end()


def unique_names(cells: Cells) -> list[str]:
    """Column names as they are told apart: a name that is there already gets a number, one that is empty a place."""
    names: dict[str, None] = {}
    copies: Counter[str] = Counter()
    for place, cell in enumerate(cells):
        name = cell or f"Unnamed: {place}"
        while name in names:
            copies[cell] += 1
            name = f"{cell}.{copies[cell]}"
        names[name] = None
    return list(names)


def _regular(rows: list[Cells], line: int, width: int, broken: Broken, *, heading: bool) -> list[Cells]:
    """Rows of the right width, without blank lines and without the heading if it is still to come."""
    kept: list[Cells] = []
    for row in rows:
        if not _blank(row):
            if heading:
                heading = False
            elif len(row) <= width or not any(row[width:]):
                kept.append([*row[:width], *[""] * (width - len(row))])
            else:
                broken.add(
                    line,
                    f"begins a row of {len(row)} cells where the heading has {width}; text with a separator "
                    "in it needs quotes around it",
                )
        line += 1 + sum(len(_LINE_END.findall(cell)) for cell in row)
    return kept


def _blank(cells: Cells) -> bool:
    return not cells or (len(cells) == 1 and cells[0].isspace())


def _cells(path: Path, encoding: str, separator: str) -> Iterator[tuple[list[Cells], int, int]]:
    """Rows as lists of cells, the line on which the first of them begins, and how far the file has been read."""
    reached = 0

    def texts() -> Iterator[list[str]]:
        nonlocal reached
        for lines in lines_of(path, encoding):
            reached = lines.read_bytes
            yield lines.texts
        yield [_END]

    # The limit belongs to the whole process; ours is the larger one, and a row that size is refused anyway.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_CHARACTERS))
    reader = csv.reader(itertools.chain.from_iterable(texts()), delimiter=separator)
    line = 1
    while True:
        try:
            rows = list(itertools.islice(reader, BATCH_ROWS))
        except csv.Error as error:
            raise InvalidRequest(
                f"Line {reader.line_num:,} of the file lies in a cell of more than {MAX_LINE_CHARACTERS:,} characters. "
                f"Most likely a quote that opens before it is never closed; a quote within a cell is doubled.",
                param="file",
            ) from error
        last = rows.pop() if rows and rows[-1] and rows[-1][-1].endswith(_END) else None
        yield rows, line, reached
        if last is not None:
            if last != [_END]:
                begins = line + sum(1 + sum(len(_LINE_END.findall(cell)) for cell in row) for row in rows)
                raise InvalidRequest(
                    f"Line {begins:,} of the file opens a quote that is never closed. Close it; a quote within a cell "
                    "is doubled.",
                    param="file",
                )
            return
        line = reader.line_num + 1
