"""Reading XLSX: a child process opens the workbook within a bound of memory and hands over rows of text.

A workbook is a compressed archive, and what it holds may be thousands of times its size or claim to reach to the last
cell of the sheet. Whatever happens, it happens to the child. `python -m tunesmith.data.sheets FILE [SHEET]` writes one
JSON value a line: first {"sheets": [...], "read": NAME}, then lists of rows, or {"error": SENTENCE}.
"""

from __future__ import annotations

import datetime
import json
import resource
import subprocess
import sys
import zipfile
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from tunesmith.data.encoding import MAX_LINE_CHARACTERS
from tunesmith.data.rows import BATCH_ROWS, MAX_COLUMNS, Batch, Columns, Wanted
from tunesmith.data.tables import unique_names
from tunesmith.errors import InvalidRequest

MAX_UNPACKED_BYTES = 1 << 30
"""A sheet filled to its last row is about half of that."""
CHILD_MEMORY_BYTES = 2 << 30
CHILD_CPU_S = 600

_ADVICE = "Save the sheet as CSV; that can be of any size."

Cells = list[str]


def sheet_names(path: Path) -> tuple[str, ...]:
    """The sheets of a workbook. Raises InvalidRequest for a file that is no workbook, or too large as one."""
    with closing(_child(path, None)) as said:
        return tuple(next(said)["sheets"])


def sheet_columns(path: Path, sheet: str, wanted: Wanted) -> Columns:
    """The columns by the first row. Raises InvalidRequest for an empty sheet, and as `Wanted.choose`."""
    with closing(_child(path, sheet)) as said:
        next(said)
        for rows in said:
            return wanted.choose(unique_names(rows[0]))
    raise InvalidRequest(
        f"The sheet `{sheet}` is empty: it has no heading and no row.", param="file", code="empty_file"
    )


def sheet_batches(path: Path, sheet: str, columns: Columns) -> Iterator[Batch]:
    """The rows below the heading; numbers, dates and truth values as text, formulas by their stored result."""
    prompt, completion = map(columns.names.index, (columns.prompt, columns.completion))
    size_bytes = path.stat().st_size
    number, heading = 1, 1
    with closing(_child(path, sheet)) as said:
        next(said)
        for rows in said:
            kept = rows[heading:]
            heading = 0
            if kept:
                yield Batch(number, [row[prompt] for row in kept], [row[completion] for row in kept], size_bytes)
                number += len(kept)


def _child(path: Path, sheet: str | None) -> Generator[Any, None, None]:
    """What the child says, value by value. Raises InvalidRequest for what it says is wrong, and if it dies."""
    command = [sys.executable, "-m", __name__, str(path.absolute()), *([] if sheet is None else [sheet])]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL
    ) as child:
        assert child.stdout is not None
        try:
            ended = False
            for line in child.stdout:
                value = json.loads(line)
                if value is None:
                    ended = True
                    break
                if isinstance(value, dict) and "error" in value:
                    raise InvalidRequest(value["error"], param="file")
                yield value
            if not ended:
                raise InvalidRequest(
                    f"The workbook needs more than {CHILD_MEMORY_BYTES >> 20:,} MB of memory or {CHILD_CPU_S} s to be "
                    f"opened, or is damaged. {_ADVICE}",
                    param="file",
                )
        finally:
            child.kill()


def _serve(path: Path, sheet: str | None) -> None:
    """The child: everything it says goes to standard output."""
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_MEMORY_BYTES, CHILD_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CHILD_CPU_S, CHILD_CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        for value in _values(path, sheet):
            sys.stdout.write(json.dumps(value) + "\n")
    except InvalidRequest as error:
        sys.stdout.write(json.dumps({"error": error.message}) + "\n")
    sys.stdout.write("null\n")


def _values(path: Path, sheet: str | None) -> Iterator[Any]:
    # Only the child loads the library that parses the file.
    from python_calamine import CalamineError, PasswordError, load_workbook

    try:
        with zipfile.ZipFile(path) as archive:
            unpacked_bytes = sum(member.file_size for member in archive.infolist())
    except zipfile.BadZipFile as error:
        raise InvalidRequest(f"The file is no XLSX workbook: {error}. {_ADVICE}") from error
    if unpacked_bytes > MAX_UNPACKED_BYTES:
        raise InvalidRequest(
            f"The workbook unpacks to {unpacked_bytes:,} bytes, and up to {MAX_UNPACKED_BYTES:,} are opened. {_ADVICE}"
        )
    try:
        with load_workbook(str(path)) as workbook:
            names = workbook.sheet_names
            if not names:
                raise InvalidRequest("The workbook has no sheet.")
            read = names[0] if sheet is None else sheet
            if read not in names:
                raise InvalidRequest(f"There is no sheet {read!r}; there are: {', '.join(map(repr, names))}.")
            yield {"sheets": names, "read": read}
            if sheet is None:
                return
            table = workbook.get_sheet_by_name(sheet)
            if table.width > MAX_COLUMNS:
                raise InvalidRequest(
                    f"The sheet is {table.width:,} columns wide; up to {MAX_COLUMNS:,} are read. {_ADVICE}"
                )
            yield from _bounded([_text(cell) for cell in row] for row in table.iter_rows())
    except PasswordError as error:
        raise InvalidRequest(f"The workbook is protected by a password. {_ADVICE}") from error
    except CalamineError as error:
        raise InvalidRequest(f"The file is no XLSX workbook that can be read: {error}. {_ADVICE}") from error


def _bounded(rows: Iterator[Cells]) -> Iterator[list[Cells]]:
    """Rows in lists of BATCH_ROWS at most, and of not much more text than one cell may have."""
    batch: list[Cells] = []
    characters = 0
    for number, row in enumerate(rows, 1):
        longest = max(map(len, row), default=0)
        if longest > MAX_LINE_CHARACTERS:
            raise InvalidRequest(
                f"Row {number:,} of the sheet has a cell of {longest:,} characters, more than any model reads as one "
                "example."
            )
        batch.append(row)
        characters += sum(map(len, row))
        if len(batch) == BATCH_ROWS or characters > MAX_LINE_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _text(cell: Any) -> str:
    """A cell as text: whole numbers without a point, days with midnight as spreadsheets store them."""
    match cell:
        case float() if cell.is_integer():
            return str(int(cell))
        case datetime.datetime():
            return str(cell)
        case datetime.date():
            return f"{cell} 00:00:00"
        case _:
            return str(cell)


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
