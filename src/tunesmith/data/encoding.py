"""From bytes to lines of text in flat memory: which encoding, which line ends. Knows no format and no rows."""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tunesmith.data.formats import MAX_LINE_BYTES
from tunesmith.errors import InvalidRequest

BLOCK_BYTES = 1 << 20
"""Read at a time: with it, the lines of one block and what is made of them, memory is bounded."""
MAX_LINE_CHARACTERS = MAX_LINE_BYTES
"""No more fits into a line that may be uploaded."""
SNIFFED_BYTES = 1 << 12

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16, whose mark it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_WESTERN = ("cp1252", "latin-1")
"""What is tried where a file is not UTF-8. Latin-1 takes the five bytes that Windows-1252 leaves undefined."""


class WrongEncoding(Exception):
    """The file is not what its first bytes promised; `instead` is the next encoding to try."""

    def __init__(self, instead: str) -> None:
        super().__init__(instead)
        self.instead = instead


@dataclass(frozen=True, slots=True)
class Lines:
    """The lines that end in one block of a file."""

    first: int
    """Number of the first of them, counted from 1."""
    texts: list[str]
    """Each with its ending."""
    read_bytes: int
    """How far into the file this block reaches."""


def sniff(path: Path) -> str:
    """The encoding that the first bytes of a file speak for: a byte order mark, zeros of UTF-16, otherwise UTF-8."""
    with path.open("rb") as file:
        head = file.read(SNIFFED_BYTES)
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    even, odd = head[0::2], head[1::2]
    if odd and odd.count(0) > 0.4 * len(odd) and even.count(0) < 0.1 * len(even):
        return "utf-16-le"
    if even and even.count(0) > 0.4 * len(even) and odd.count(0) < 0.1 * len(odd):
        return "utf-16-be"
    return "utf-8"


def text_blocks(path: Path, encoding: str) -> Iterator[tuple[str, int]]:
    """The text of a file, and how many bytes have been read after each piece of it.

    Raises WrongEncoding where bytes are no text in `encoding` and another is left to try; InvalidRequest where none
    is, and for a NUL character, which no text file holds.
    """
    decoder = codecs.getincrementaldecoder(encoding)()
    read_bytes = characters = 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            text = _decode(decoder, block, encoding, final=False)
            read_bytes += len(block)
            if "\0" in text:
                _check_text(text, 1 + lines_before(path, encoding, characters))
            characters += len(text)
            yield text, read_bytes
    yield _decode(decoder, b"", encoding, final=True), read_bytes


def lines_before(path: Path, encoding: str, characters: int) -> int:
    r"""How many lines of a file end within so many characters from its start, with `\n`, `\r\n` or `\r`.

    Reads it again: who reads on names lines in errors alone, and counting in every block would slow all files.
    """
    ends, last = 0, ""
    with path.open(encoding=encoding, newline="") as file:
        while characters and (text := file.read(min(BLOCK_BYTES, characters))):
            characters -= len(text)
            both = text.count("\r\n") + (last == "\r" and text[0] == "\n")
            ends += text.count("\n") + text.count("\r") - both
            last = text[-1]
    return ends


def lines_of(path: Path, encoding: str) -> Iterator[Lines]:
    r"""The lines of a file, which end with `\n`, `\r\n` or `\r`, also mixed.

    Raises as `text_blocks`, and InvalidRequest for a line longer than MAX_LINE_CHARACTERS.
    """
    return lines_in(text_blocks(path, encoding))


def lines_in(blocks: Iterable[tuple[str, int]], first: int = 1) -> Iterator[Lines]:
    """The lines of text that comes as from `text_blocks`, the first of them with that number. Raises as `lines_of`."""
    number, rest = first, ""
    for text, read_bytes in blocks:
        rest += text
        if not text or not (rest.endswith("\n") or "\n" in text or "\r" in text):
            _check_length(rest, number)
            continue
        texts = io.StringIO(rest, newline="").readlines()
        # A last line without an end goes on in the next block; so may one that ends with \r, for \n may follow.
        rest = "" if texts[-1].endswith("\n") else texts.pop()
        if texts:
            _check_length(texts[0], number)  # the others lie within one block
            yield Lines(number, texts, read_bytes)
            number += len(texts)
        _check_length(rest, number)
    if rest:
        yield Lines(number, io.StringIO(rest, newline="").readlines(), read_bytes)


@dataclass(frozen=True, slots=True)
class LineBlock:
    """Whole lines of a UTF-8 file as they are, not yet decoded."""

    first: int
    """Number of the first of them, counted from 1."""
    content: bytes
    count: int
    """How many lines it is."""
    read_bytes: int

    def lines(self) -> Lines:
        """The lines as text. Raises as `lines_of`."""
        try:
            text = self.content.decode()
        except UnicodeDecodeError as error:
            raise WrongEncoding(_WESTERN[0]) from error
        _check_text(text, self.first)
        return Lines(self.first, io.StringIO(text, newline="").readlines(), self.read_bytes)


def line_blocks(path: Path) -> Iterator[LineBlock]:
    r"""The lines of a UTF-8 file by blocks, cut at `\n`. Raises InvalidRequest for a line longer than an upload's."""
    first, read_bytes, rest = 1, 0, b""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            read_bytes += len(block)
            end = block.rfind(b"\n") + 1
            if not end:
                rest += block
                _check_length(rest, first)
                continue
            content, rest = rest + block[:end], block[end:]
            _check_length(content[: content.find(b"\n")], first)  # the others lie within one block
            count = _count_lines(content)
            yield LineBlock(first, content, count, read_bytes)
            first += count
    if rest:
        yield LineBlock(first, rest, _count_lines(rest + b"\n"), read_bytes)


def _count_lines(content: bytes) -> int:
    if b"\r" not in content:
        return content.count(b"\n")
    return content.count(b"\n") + content.count(b"\r") - content.count(b"\r\n")


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, encoding: str, *, final: bool) -> str:
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        if encoding == "utf-8":
            raise WrongEncoding(_WESTERN[0]) from error
        if encoding == _WESTERN[0]:
            raise WrongEncoding(_WESTERN[1]) from error
        raise InvalidRequest(
            f"The file begins as {encoding.upper()} and holds bytes that are not ({error.reason}). Export it again as "
            "UTF-8.",
            param="file",
        ) from error


def _check_text(text: str, first: int) -> None:
    if "\0" in text:
        line = first + text.count("\n", 0, text.index("\0"))
        raise InvalidRequest(
            f"Line {line} of the file holds a NUL byte, so this is no text file, or a damaged one. Export it again as "
            "UTF-8 text.",
            param="file",
        )


def _check_length(line: str | bytes, number: int) -> None:
    if len(line) > MAX_LINE_CHARACTERS:
        units = "bytes" if isinstance(line, bytes) else "characters"
        raise InvalidRequest(
            f"Line {number} of the file is longer than {MAX_LINE_CHARACTERS:,} {units}, more than any model reads as "
            "one example. Is it of the format that its name says, with one row a line?",
            param="file",
        )
