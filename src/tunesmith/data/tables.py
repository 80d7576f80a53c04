"""Reading CSV and TSV: cells with line ends and quotes in them, short and long rows, quotes that never close."""

from __future__ import annotations

import csv
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tunesmith.data.encoding import MAX_LINE_CHARACTERS, lines_before, lines_in, text_blocks
from tunesmith.data.rows import BATCH_ROWS, Batch, Broken, Columns, Wanted
from tunesmith.errors import InvalidRequest

MOST_OPEN_CHARACTERS = 2 * MAX_LINE_CHARACTERS
"""A cell that is open for so long is left to the parser, which says what is wrong with it."""
FEW_ROWS = 1_000
"""With fewer to a block, a cell may be longer than any may be."""

_END = _QUOTED = "\0"
"""Stands after the last line, and for a cell in quotes. No text file holds it: if it is swallowed, a quote was open."""
_LINE_END = re.compile(r"\r\n|\r|\n")

Cells = list[str]


def table_columns(path: Path, encoding: str, separator: str, wanted: Wanted) -> Columns:
    """The columns by their heading. Raises InvalidRequest without one, and as `Wanted.choose`."""
    for rows, _, _ in _cells(text_blocks(path, encoding), separator):
        for cells in rows:
            if not _blank(cells):
                return wanted.choose(unique_names(cells))
    raise InvalidRequest("The file is empty: it has no heading and no row.", param="file", code="empty_file")


def table_batches(path: Path, encoding: str, separator: str, columns: Columns) -> Iterator[Batch]:
    """The rows below the heading. Short rows are filled with empty cells, blank lines are passed over.

    Raises InvalidRequest naming lines whose rows have more cells than the heading, and for quotes that never close.
    """
    reading = _Reading(separator, columns)
    blocks = text_blocks(path, encoding)
    rest, read_bytes, taken = "", 0, 0
    while len(rest) <= MOST_OPEN_CHARACTERS and (block := next(blocks, None)) is not None:
        text, read_bytes = block
        if rest and not text and not rest.endswith(("\n", "\r")):
            text = "\n"  # the last line may lack its end
        rest += text
        end = rest.rfind("\n") + 1
        if end:
            batch, doubt = reading.plain_rows(rest[:end], read_bytes)
            taken += end - len(doubt)
            rest = doubt + rest[end:]
            if batch is not None:
                yield batch
            # Every quote opens or closes a cell, or is one of two: with an odd number of them a cell goes on.
            if doubt and doubt.count('"') % 2 == 0:
                break
    if rest or not taken:
        line = 1 + lines_before(path, encoding, taken)
        yield from reading.rows(itertools.chain([(rest, read_bytes)], blocks), line)


class _Reading:
    """Reads rows in three ways: simple and plain ones by the block, any by the parser of the standard library."""

    def __init__(self, separator: str, columns: Columns) -> None:
        self._separator = separator
        self._width = len(columns.names)
        self._prompt, self._completion = map(columns.names.index, (columns.prompt, columns.completion))
        self._number = 1
        self._heading = self._simple = True
        # `*+` never gives back what it took: nothing that it could give back would make another row of it.
        cell = f'(?:"([^"]*+(?:""[^"]*+)*+)"|([^"{separator}\r\n]*+))'
        # What is no row of this width takes all the rest, as the last group.
        self._plain = re.compile(separator.join([cell] * self._width) + r"\r?\n|([\s\S]+)")

    def plain_rows(self, text: str, read_bytes: int) -> tuple[Batch | None, str]:
        """Rows of whole lines, and the text from the first on that is not plain: short, long, blank, oddly quoted.

        Twice as fast as the parser, which goes character by character; four times where no cell has a quote in it.
        """
        columns, doubt = self._simple_columns(text) if self._simple else None, ""
        if columns is None:
            columns, doubt = self._plain_columns(text)
        prompts, completions = columns[self._prompt], columns[self._completion]
        if self._heading:
            prompts, completions = prompts[1:], completions[1:]
        if not prompts:
            self._heading = self._heading and doubt == text
            return None, doubt
        if len(prompts) <= FEW_ROWS and any(len(text) > MAX_LINE_CHARACTERS for text in (*prompts, *completions)):
            return None, text  # the parser says what is wrong
        first = self._number
        self._number += len(prompts)
        self._heading = False
        return Batch(first, prompts, completions, read_bytes), doubt

    def _simple_columns(self, text: str) -> list[list[str]] | None:
        """The columns where each row has this width and no cell a quote in it; None where that is not plain to see.

        What is quoted is taken out, so that the rest can be cut at its separators.
        """
        parts = text.split('"')
        if not len(parts) % 2:  # the last cell goes on in the next block
            return None
        quoted, rest = parts[1::2], _QUOTED.join(parts[::2]).replace("\r\n", "\n")
        cells = rest.replace("\n", "\n" + self._separator).split(self._separator)[:-1]
        last, rows = "".join(cells[self._width - 1 :: self._width]), rest.count("\n")
        if len(cells) == rows * self._width and last.count("\n") == rows and "\r" not in rest:
            cells[self._width - 1 :: self._width] = last.split("\n")[:-1]
            columns = [cells[n :: self._width] for n in range(self._width)]
            counts = [column.count(_QUOTED) for column in columns]
            if sum(counts) == len(quoted):  # else some are a part of a cell
                return _filled(columns, counts, quoted)
        self._simple = False
        return None

    def _plain_columns(self, text: str) -> tuple[list[list[str]], str]:
        """The columns up to the first row that is not plain, and the text from there on."""
        cells = self._plain.findall(text)
        doubt = cells.pop()[-1] if cells and cells[-1][-1] else ""
        if not cells:
            return [[]] * self._width, doubt
        columns = list(zip(*cells, strict=True))
        return [_column(*columns[2 * n : 2 * n + 2]) for n in range(self._width)], doubt

    def rows(self, blocks: Iterable[tuple[str, int]], first_line: int) -> Iterator[Batch]:
        """All that is left, from that line on."""
        broken = Broken("Line")
        for rows, line, read_bytes in _cells(blocks, self._separator, first_line):
            if self._heading or set(map(len, rows)) != {self._width}:
                kept = _regular(rows, line, self._width, broken, heading=self._heading)
                self._heading = self._heading and all(map(_blank, rows))
            else:
                kept = rows
            if kept:
                prompts, completions = ([row[n] for row in kept] for n in (self._prompt, self._completion))
                yield Batch(self._number, prompts, completions, read_bytes)
                self._number += len(kept)
        broken.end()


def _filled(columns: list[list[str]], counts: list[int], quoted: list[str]) -> list[list[str]]:
    """The columns with what was quoted in its places, which are counted by column."""
    rows, several = len(columns[0]), sum(map(bool, counts))
    if all(count in (0, rows) for count in counts):
        starts = itertools.count()
        return [quoted[next(starts) :: several] if n else column for column, n in zip(columns, counts, strict=True)]
    inside = iter(quoted)
    by_row = [[next(inside) if cell == _QUOTED else cell for cell in row] for row in zip(*columns, strict=True)]
    return [list(column) for column in zip(*by_row, strict=True)]


def _column(quoted: Sequence[str], plain: Sequence[str]) -> list[str]:
    """The cells of a column, each of which is empty in one of the two."""
    if '"' in "".join(quoted):  # much faster than to look for two of them
        quoted = [cell.replace('""', '"') for cell in quoted]
    if any(plain):
        return [one or other for one, other in zip(quoted, plain, strict=True)]
    return list(quoted)


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


def _cells(blocks: Iterable[tuple[str, int]], separator: str, first: int = 1) -> Iterator[tuple[list[Cells], int, int]]:
    """Rows as lists of cells, the line on which the first of them begins, and how far the file has been read.

    `first` is the number of the first line of the blocks.
    """
    reached = 0

    def texts() -> Iterator[list[str]]:
        nonlocal reached
        for lines in lines_in(blocks, first):
            reached = lines.read_bytes
            yield lines.texts
        yield [_END]

    # The limit belongs to the whole process; ours is the larger one, and a row that size is refused anyway.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_LINE_CHARACTERS))
    reader = csv.reader(itertools.chain.from_iterable(texts()), delimiter=separator)
    line = first
    while True:
        try:
            rows = list(itertools.islice(reader, BATCH_ROWS))
        except csv.Error as error:
            raise InvalidRequest(
                f"Line {first - 1 + reader.line_num:,} of the file lies in a cell of more than {MAX_LINE_CHARACTERS:,} "
                "characters. Most likely a quote that opens before it is never closed; a quote within a cell is "
                "doubled.",
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
        line = first + reader.line_num
