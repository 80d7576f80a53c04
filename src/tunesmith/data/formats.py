"""Training data as text: JSON Lines <-> Example. Knows lines and fields; no files, no tokens.

A file is read as it arrives, in flat memory: one line is held at a time, and none longer than MAX_LINE_BYTES.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from tunesmith.errors import InvalidRequest

MAX_LINE_BYTES = 1 << 20
"""Hundreds of times what a model reads as one example; a longer line is a file of another kind."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FIELDS = ("prompt", "completion")
MESSAGES = "messages"
CHAT_FIELDS = (MESSAGES, "parallel_tool_calls")
"""The second is written by exports of today's service; it says nothing where there are no tools."""

_EXPECTED = 'Each line holds one JSON object such as {"prompt": "...", "completion": "..."}.'


@dataclass(frozen=True, slots=True)
class Example:
    """One row of training data. The prompt may be empty, the completion is not."""

    prompt: str
    completion: str
    marked: bool = False
    """Whether the prompt holds whatever begins a text for the model, as those of chat templates do."""


Chat = Callable[[dict[str, Any]], Iterable[Example]]
"""The examples of a row with `messages`. Raises ValueError with the reason if there is nothing to learn in it."""


class LineSplitter:
    r"""Chunks in, lines out; lines end with `\n`, and a `\r` before it belongs to the ending."""

    def __init__(self) -> None:
        self._rest = bytearray()
        self._lines = 0

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The lines that end in `chunk`. Raises InvalidRequest for a line longer than MAX_LINE_BYTES."""
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._keep(chunk, start, end)
            yield self._take()
            start = end + 1
        self._keep(chunk, start, len(chunk))

    def end(self) -> Iterator[bytes]:
        """The last line, if it has no ending."""
        if self._rest:
            yield self._take()

    def _keep(self, chunk: bytes, start: int, end: int) -> None:
        if len(self._rest) + end - start > MAX_LINE_BYTES:
            _refuse(
                self._lines + 1,
                f"is longer than {MAX_LINE_BYTES} bytes. {_EXPECTED} Is this a JSONL file, one object a line?",
            )
        self._rest += memoryview(chunk)[start:end]

    def _take(self) -> bytes:
        line = bytes(self._rest)
        self._rest.clear()
        self._lines += 1
        return line.removesuffix(b"\r")


class ExampleParser:
    """Lines in, examples out. Keeps count, to name the line that is wrong."""

    def __init__(self, chat: Chat | None = None) -> None:
        """Without `chat` conversations are refused."""
        self._chat = chat
        self._line = 0
        self._blank_line: int | None = None
        self.examples = 0
        """How many have been read."""

    def read(self, line: bytes) -> list[Example]:
        """The examples of the next line, without its ending: one, or those of a conversation.

        None are in a blank line, which may only follow the last. Raises InvalidRequest with param `file`, naming line
        and fault.
        """
        self._line += 1
        if self._line == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        if not line.strip():
            self._blank_line = self._blank_line or self._line
            return []
        if self._blank_line is not None:
            _refuse(self._blank_line, "is blank. Remove it; blank lines may only stand at the end.")
        row = _object(self._line, line)
        if self._chat is not None and MESSAGES in row:
            examples = _conversation(self._line, row, self._chat)
        else:
            examples = [_example(self._line, row)]
        self.examples += len(examples)
        return examples

    def end(self) -> None:
        """Raises InvalidRequest if there was no example at all."""
        if not self.examples:
            raise InvalidRequest(f"The file is empty: it holds no example. {_EXPECTED}", param="file")


def split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """The lines of a file that comes in chunks of any size; raises as `LineSplitter.feed`."""
    splitter = LineSplitter()
    for chunk in chunks:
        yield from splitter.feed(chunk)
    yield from splitter.end()


def read_examples(lines: Iterable[bytes], chat: Chat | None = None) -> Iterator[Example]:
    """The examples of a JSONL file: UTF-8, one object a line with the strings `prompt` and `completion`.

    With `chat`, also conversations, objects with `messages`.
    A byte order mark before and blank lines after are passed over. Raises InvalidRequest with param `file`, naming
    the line, counted from 1, and its fault; also for a file without any example.
    """
    parser = ExampleParser(chat)
    for line in lines:
        yield from parser.read(line)
    parser.end()


def write_jsonl(examples: Iterable[Example]) -> Iterator[bytes]:
    """The lines of a JSONL file, endings included: `prompt` first, no blanks between, non-ASCII as it is."""
    for example in examples:
        row = {"prompt": example.prompt, "completion": example.completion}
        yield json.dumps(row, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def _conversation(number: int, row: dict[str, Any], chat: Chat) -> list[Example]:
    for name in row:
        if name not in CHAT_FIELDS:
            _refuse(number, f"has a field {name[:40]!r} beside `messages`, which is not read. Remove it.")
    try:
        examples = list(chat(row))
        for example in examples:
            (example.prompt + example.completion).encode()
    except UnicodeEncodeError:
        _refuse(number, "has half a character in `messages`. Write it as a surrogate pair or as UTF-8.")
    except ValueError as error:
        _refuse(number, f"is no conversation to train on: {error}.")
    return examples


def _example(number: int, row: dict[str, Any]) -> Example:
    for name in FIELDS:
        if name not in row:
            _refuse(number, f"has no field `{name}`. {_EXPECTED}")
    for name, value in row.items():
        if name not in FIELDS:
            _refuse(number, f"has a field {name[:40]!r}, which is not read. Remove it: only `prompt` and `completion`.")
        if not isinstance(value, str):
            _refuse(number, f"has a `{name}` that is {_kind(value)}, not a string. Put it in quotes.")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(value[error.start]):04x}"
            _refuse(number, f"has half a character, {half}, in `{name}`. Write it as a surrogate pair or as UTF-8.")
    if not row["completion"]:
        _refuse(number, "has an empty `completion`. Remove the line, or say what the model should answer.")
    return Example(prompt=row["prompt"], completion=row["completion"])


def _object(number: int, line: bytes) -> dict[str, Any]:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        _refuse(number, f"is not UTF-8 at byte {error.start + 1}. Save the file as UTF-8.")
    if "\0" in text:
        _refuse(number, "holds a NUL byte. Save the file as plain UTF-8 text, one JSON object a line.")
    try:
        row = json.loads(text, object_pairs_hook=_pairs)
    except _Repeated as repeated:
        _refuse(number, f"has the field {repeated.name[:40]!r} twice. Keep one.")
    except json.JSONDecodeError as error:
        _refuse(number, f"is not JSON: {error.msg} at character {error.pos + 1}. {_EXPECTED}")
    except (ValueError, RecursionError):  # a number of thousands of digits; brackets nested thousands deep
        _refuse(number, f"is not JSON that can be read. {_EXPECTED}")
    if not isinstance(row, dict):
        _refuse(number, f"is {_kind(row)}, not an object. {_EXPECTED}")
    return row


class _Repeated(Exception):
    def __init__(self, name: str) -> None:
        self.name = name


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, value in pairs:
        if name in row:
            raise _Repeated(name)
        row[name] = value
    return row


def _refuse(number: int, fault: str) -> NoReturn:
    raise InvalidRequest(f"Line {number} of the file {fault}", param="file")


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"
