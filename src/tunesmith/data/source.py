"""A local file of prompts and completions, of any format: what it is, and its rows as often as they are asked for.

Knows every reader. Rows are read again for each pass, so that a file may be larger than memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

from tunesmith.data.encoding import WrongEncoding, lines_of, sniff
from tunesmith.data.formats import read_examples
from tunesmith.data.json_rows import NewColumns, Shape, json_batches, json_columns, json_shape
from tunesmith.data.rows import COMPLETION, PROMPT, Batch, Columns, Wanted
from tunesmith.data.sheets import sheet_batches, sheet_columns, sheet_names
from tunesmith.data.tables import table_batches, table_columns
from tunesmith.errors import InvalidRequest


class Format(Enum):
    """The file formats that are read, by the ending of the name."""

    CSV = "csv"
    TSV = "tsv"
    XLSX = "xlsx"
    TXT = "txt"
    JSON = "json"
    JSONL = "jsonl"


_SEPARATORS = {Format.CSV: ",", Format.TSV: "\t"}


class Changed(Exception):
    """The file turns out to be read otherwise than thought: begin again with `source`."""

    def __init__(self, source: Source) -> None:
        super().__init__(source)
        self.source = source


@dataclass(frozen=True, slots=True)
class Source:
    """A file that has been opened once and looked at."""

    path: Path
    format: Format
    encoding: str | None
    """None for a workbook, which says it itself."""
    columns: Columns
    wanted: Wanted
    shape: Shape | None = None
    """Of a JSON file."""
    sheets: tuple[str, ...] = ()
    """Of a workbook."""
    sheet: str | None = None
    """The one that is read."""
    identity: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Device, inode, size and time of change: the same on every pass, or the file was changed meanwhile."""

    @property
    def size_bytes(self) -> int:
        """Of the file when it was opened."""
        return self.identity[2]

    def batches(self) -> Iterator[Batch]:
        """All rows, from the beginning.

        Raises Changed if the file has to be read otherwise, InvalidRequest for rows that are broken, and if it is not
        the same file any more.
        """
        self.check_unchanged()
        try:
            yield from self._read()
        except WrongEncoding as wrong:
            raise Changed(replace(self, encoding=wrong.instead)) from wrong
        except NewColumns as new:
            raise Changed(replace(self, columns=new.columns)) from new

    def check_unchanged(self) -> None:
        """Raises InvalidRequest if the file is not the same any more."""
        if _identity(self.path) != self.identity:
            raise InvalidRequest(f"{self.path} was changed meanwhile. Run this again.", param="file")

    def _read(self) -> Iterator[Batch]:
        if self.sheet is not None:
            return sheet_batches(self.path, self.sheet, self.columns)
        assert self.encoding is not None
        if self.shape is not None:
            return json_batches(self.path, self.encoding, self.shape, self.columns, self.wanted)
        if self.format is Format.TXT:
            return _text_batches(self.path, self.encoding)
        return table_batches(self.path, self.encoding, _SEPARATORS[self.format], self.columns)


def open_source(path: Path, wanted: Wanted, sheet: str | None = None) -> Source:
    """Looks at the beginning of a file. Raises InvalidRequest naming what is wrong with it."""
    format_ = _format(path)
    try:
        identity = _identity(path)
        if format_ is Format.XLSX:
            sheets = sheet_names(path)
            if sheet is not None and sheet not in sheets:
                raise InvalidRequest(f"There is no sheet {sheet!r}; there are: {', '.join(sheets)}.", param="sheet")
            read = sheets[0] if sheet is None else sheet
            columns = sheet_columns(path, read, wanted)
            return Source(path, format_, None, columns, wanted, sheets=sheets, sheet=read, identity=identity)
        if sheet is not None:
            raise InvalidRequest(f"Sheets are there in XLSX files only; {path.name} is none.", param="sheet")
        encoding = sniff(path)
        while True:
            try:
                return _look(path, format_, encoding, wanted, identity)
            except WrongEncoding as wrong:
                encoding = wrong.instead
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}.", param="file") from error


def refusal(source: Source) -> str | None:
    """Why the file as it lies would not be taken as training data; None if it would."""
    if source.format is not Format.JSONL:
        return f"{source.path} is no JSONL file. Training data is JSONL, one object a line."
    try:
        with source.path.open("rb") as file:
            for _ in read_examples(line.rstrip(b"\r\n") for line in file):
                pass
    except InvalidRequest as error:
        return error.message
    return None


def _look(path: Path, format_: Format, encoding: str, wanted: Wanted, identity: tuple[int, int, int, int]) -> Source:
    shape = None
    match format_:
        case Format.JSON | Format.JSONL:
            shape = json_shape(path, encoding)
            columns = json_columns(path, encoding, shape, wanted)
        case Format.TXT:
            columns = Columns((PROMPT, COMPLETION), PROMPT, COMPLETION)
        case _:
            columns = table_columns(path, encoding, _SEPARATORS[format_], wanted)
    return Source(path, format_, encoding, columns, wanted, shape=shape, identity=identity)


def _format(path: Path) -> Format:
    if not path.is_file():
        what = "does not exist" if not path.exists() else "is no file, but a folder or a device"
        raise InvalidRequest(f"{path} {what}.", param="file", code="no_file")
    try:
        return Format(path.suffix.lower().removeprefix("."))
    except ValueError as error:
        ending = f"ends with `{path.suffix}`" if path.suffix else "has no ending"
        raise InvalidRequest(
            f"{path} {ending}. The ending says how a file is read; it is one of "
            f"{', '.join(f'.{known.value}' for known in Format)}.",
            param="file",
            code="unknown_format",
        ) from error


def _identity(path: Path) -> tuple[int, int, int, int]:
    about = path.stat()
    return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns


def _text_batches(path: Path, encoding: str) -> Iterator[Batch]:
    """Every line is a completion without a prompt, also an empty one after the last line end."""
    number, reached, ended = 1, 0, True
    for lines in lines_of(path, encoding):
        texts = [line.rstrip("\r\n") for line in lines.texts]
        yield Batch(number, [""] * len(texts), texts, lines.read_bytes)
        number, reached, ended = number + len(texts), lines.read_bytes, lines.texts[-1].endswith(("\n", "\r"))
    if ended:
        yield Batch(number, [""], [""], reached)
