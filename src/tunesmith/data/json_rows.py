"""Reading JSON: one object a line, a list of objects, or one object of columns; told apart by how a file begins."""

from __future__ import annotations

import json
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, cast

import msgspec

from tunesmith.data.encoding import MAX_LINE_CHARACTERS, Lines, line_blocks, lines_of, text_blocks
from tunesmith.data.rows import BATCH_ROWS, COMPLETION, MAX_COLUMNS, PROMPT, Batch, Broken, Columns, Wanted
from tunesmith.errors import InvalidRequest

MAX_COLUMNS_BYTES = 64 << 20
"""An object of columns is read whole; larger ones are refused."""

_SCAN = cast(
    "Callable[[str, int], tuple[Any, int]]",
    json.JSONDecoder(strict=False, parse_constant=lambda _: None).scan_once,  # type: ignore[attr-defined]
)
_BOTH = operator.itemgetter(PROMPT), operator.itemgetter(COMPLETION)
_SINGLE = frozenset({str, int, float, bool, type(None)})
_HALVES = "\\ud", "\\uD"
"""How the escape of a half begins; two of them make a whole character."""
_BLANK = re.compile(r"[ \t\r\n]*")
_BETWEEN = re.compile(r"[ \t\r\n,]*")


class Shape(Enum):
    """How the rows of a JSON file are written down."""

    LINES = "one object a line"
    LIST = "a list of objects"
    COLUMNS = "an object of columns"


class NewColumns(Exception):
    """A later row has a key that changes which columns are read: begin again with these."""

    def __init__(self, columns: Columns) -> None:
        super().__init__(columns)
        self.columns = columns


def json_shape(path: Path, encoding: str) -> Shape:
    """How the rows are written down. Raises InvalidRequest for an empty file and one that cannot be JSON."""
    text = next((stripped for block, _ in text_blocks(path, encoding) if (stripped := block.lstrip(" \t\r\n"))), "")
    if not text:
        raise InvalidRequest("The file is empty: it holds no row.", param="file", code="empty_file")
    if text[0] == "[":
        return Shape.LIST
    try:
        first, end = _SCAN(text, 0)
    except (StopIteration, ValueError, RecursionError):
        line = text.partition("\n")[0]
        return Shape.LINES if len(line) < len(text) and not _opens_over_lines(line) else Shape.COLUMNS
    alone = _BLANK.fullmatch(text, end) is not None
    if alone and isinstance(first, dict) and first and all(isinstance(value, (dict, list)) for value in first.values()):
        return Shape.COLUMNS
    return Shape.LIST if "\n" in text[:end].rstrip() else Shape.LINES


def json_columns(path: Path, encoding: str, shape: Shape, wanted: Wanted) -> Columns:
    """The columns as far as the first rows show them. Raises InvalidRequest as `Wanted.choose`."""
    names: dict[str, None] = {}
    broken = Broken(_counted(shape))
    for rows, _, _ in _objects(path, encoding, shape, broken):
        for row in rows:
            names.update(dict.fromkeys(row))
        break
    if not names:
        broken.end()
    return wanted.choose(names)


def json_batches(path: Path, encoding: str, shape: Shape, columns: Columns, wanted: Wanted) -> Iterator[Batch]:
    """The rows. A key that is missing, and null, is an empty text; other values are written as text.

    Raises NewColumns when a key comes up that should be read instead, InvalidRequest naming lines that are no objects.
    """
    known = dict.fromkeys(columns.names)
    broken = Broken(_counted(shape))
    first = 1
    for found in (
        _from_plain_lines(path, columns, broken)
        if _plain(encoding, shape, columns)
        else (_objects(path, encoding, shape, broken))
    ):
        if isinstance(found, Batch):
            yield replace(found, first=first)
            first += len(found)
            continue
        rows, _, read_bytes = found
        for row in rows if _other_keys(rows, known) else ():
            if not row.keys() <= known.keys():
                known.update(dict.fromkeys(row))
                if len(known) > MAX_COLUMNS or wanted.choose(known) != Columns(
                    tuple(known), columns.prompt, columns.completion
                ):
                    raise NewColumns(wanted.choose(known))
        prompts = _texts(rows, columns.prompt)
        completions = _texts(rows, columns.completion)
        if rows:
            yield Batch(first, prompts, completions, read_bytes)
            first += len(rows)
    broken.end()
    if tuple(known) != columns.names:
        raise NewColumns(wanted.choose(known))


def _counted(shape: Shape) -> str:
    return "Line" if shape is Shape.LINES else "Object"


def _other_keys(rows: list[dict[str, Any]], known: dict[str, None]) -> bool:
    """Whether some row could have a key that is not known: not if all have two, and those are there in each."""
    if len(known) != 2 or set(map(len, rows)) != {2}:
        return True
    one, other = known
    try:
        for _ in map(operator.itemgetter(one, other), rows):
            pass
    except KeyError:
        return True
    return False


def _opens_over_lines(line: str) -> bool:
    """Whether a line could begin an object that goes on in the next."""
    return line.rstrip()[-1:] in ("{", ",", "[", ":")


def _texts(rows: list[dict[str, Any]], name: str) -> list[str]:
    values = [row.get(name) for row in rows]
    return cast("list[str]", values) if set(map(type, values)) <= {str} else list(map(_text, values))


def _text(value: Any) -> str:
    match value:
        case None:
            return ""
        case str():
            return value
        case bool() | int() | float():
            return str(value)
        case _:
            return json.dumps(value, ensure_ascii=False)


def _half_character(text: str, value: Any) -> str | None:
    """What is wrong with a value that `text` spells, if it holds half a surrogate pair, else None."""
    if not any(half in text for half in _HALVES):
        return None
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        return f"holds half a character, \\u{ord(error.object[error.start]):04x}"
    return None


Objects = tuple[list[dict[str, Any]], int, int]
"""Rows, the number of the first, and how far the file has been read."""


def _objects(path: Path, encoding: str, shape: Shape, broken: Broken) -> Iterator[Objects]:
    match shape:
        case Shape.LINES:
            return _from_lines(path, encoding, broken)
        case Shape.LIST:
            return _from_list(path, encoding, broken)
        case Shape.COLUMNS:
            return _from_columns(path, encoding)


def _from_lines(path: Path, encoding: str, broken: Broken) -> Iterator[Objects]:
    for lines in lines_of(path, encoding):
        yield from _parsed(lines, broken)


def _plain(encoding: str, shape: Shape, columns: Columns) -> bool:
    """Whether rows may be no more than a prompt and a completion a line, in the encoding that JSON is written in."""
    return shape is Shape.LINES and encoding == "utf-8" and len(columns.names) == 2


def _from_plain_lines(path: Path, columns: Columns, broken: Broken) -> Iterator[Batch | Objects]:
    """Lines as `_from_lines` reads them, ten times as fast where each is an object of two texts and nothing else.

    Any doubt, and the lines of that block are parsed one by one.
    """
    row_type = msgspec.defstruct(
        "Row",
        [(PROMPT, str), (COMPLETION, str)],
        rename={PROMPT: columns.prompt, COMPLETION: columns.completion},
        forbid_unknown_fields=True,
        gc=False,
    )
    decode = msgspec.json.Decoder(row_type).decode_lines
    for block in line_blocks(path):
        try:
            rows: list[Any] = decode(block.content)
        except (ValueError, msgspec.MsgspecError):
            rows = []
        # Each line begins an object, and there are no others: so each line is one.
        if len(rows) == block.count == block.content.count(b"\n{") + block.content.startswith(b"{"):
            yield Batch(0, [row.prompt for row in rows], [row.completion for row in rows], block.read_bytes)
            continue
        yield from _parsed(block.lines(), broken)


def _parsed(lines: Lines, broken: Broken) -> Iterator[Objects]:
    for start in range(0, len(lines.texts), BATCH_ROWS):
        number, texts = lines.first + start, lines.texts[start : start + BATCH_ROWS]
        rows = _plain_rows(texts)
        if rows is not None:
            yield rows, number, lines.read_bytes
            continue
        rows = []
        for place, text in enumerate(texts):
            line = text.strip()
            if not line:
                continue
            try:
                row, end = _SCAN(line, 0)
            except StopIteration:
                broken.add(number + place, "is not JSON")
            except json.JSONDecodeError as error:
                broken.add(number + place, f"is not JSON: {error.msg} at character {error.pos + 1}")
            except (ValueError, RecursionError):  # a number of thousands of digits; brackets nested thousands deep
                broken.add(number + place, "is not JSON that can be read")
            else:
                if end != len(line):
                    broken.add(number + place, f"holds more than one JSON value, from character {end + 1} on")
                elif type(row) is not dict:
                    broken.add(number + place, 'is no object such as {"prompt": "...", "completion": "..."}')
                elif fault := _half_character(line, row):
                    broken.add(number + place, fault)
                else:
                    rows.append(row)
        yield rows, number, lines.read_bytes


def _plain_rows(texts: list[str]) -> list[dict[str, Any]] | None:
    """The rows of lines that are all simple objects, parsed at once: several times faster. None for any other lines.

    A line end that lies within an object would have to lie within a list or an object in it, since each line begins
    with a brace; so lines stand for rows if there are as many of either and no row holds anything but single values.
    """
    joined = ",".join(texts)
    if not joined.startswith("{") or joined.count("\n,{") != len(texts) - 1:
        return None
    if any(half in joined for half in _HALVES):
        return None
    try:
        rows: list[dict[str, Any]] = json.loads(f"[{joined}]", parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return None
    single = all(type(value) in _SINGLE for row in rows for value in row.values()) if _mixed(rows) else True
    return rows if single and len(rows) == len(texts) else None


def _mixed(rows: list[dict[str, Any]]) -> bool:
    """Whether rows could hold more than a text each for prompt and completion."""
    if set(map(len, rows)) != {2}:
        return True
    try:
        return set(map(type, map(_BOTH[0], rows))) != {str} or set(map(type, map(_BOTH[1], rows))) != {str}
    except KeyError:
        return True


def _from_list(path: Path, encoding: str, broken: Broken) -> Iterator[Objects]:
    """Objects one after another, in brackets and with commas between or without."""
    number, rest, begun = 1, "", False
    for text, read_bytes in text_blocks(path, encoding):
        rest += text
        place = _BLANK.match(rest, 0).end()  # type: ignore[union-attr]  # matches the empty text too
        if not begun and place < len(rest):
            begun = True
            place += rest[place] == "["
        rows: list[dict[str, Any]] = []
        while (place := _BETWEEN.match(rest, place).end()) < len(rest):  # type: ignore[union-attr]
            if rest[place] == "]" and not rest[place + 1 :].strip(" \t\r\n"):
                place = len(rest)
                break
            try:
                row, end = _SCAN(rest, place)
            except (StopIteration, ValueError, RecursionError) as error:
                if not text or len(rest) - place > 2 * MAX_LINE_CHARACTERS:
                    raise InvalidRequest(
                        f"Object {number + len(rows):,} of the file is not JSON that can be read, or has no end. Is "
                        "the file whole?",
                        param="file",
                    ) from error
                break  # the rest of it is in the next block
            if type(row) is not dict:
                raise InvalidRequest(
                    f"Value {number + len(rows):,} of the list is no object such as "
                    '{"prompt": "...", "completion": "..."}.',
                    param=PROMPT,
                )
            if fault := _half_character(rest[place:end], row):
                broken.add(number + len(rows), fault)
            if end - place > MAX_LINE_CHARACTERS:
                _check_size(rest[place:end], number + len(rows))
            rows.append(row)
            place = end
        rest = rest[place:]
        for start in range(0, len(rows), BATCH_ROWS):
            yield rows[start : start + BATCH_ROWS], number + start, read_bytes
        number += len(rows)


def _from_columns(path: Path, encoding: str) -> Iterator[Objects]:
    size_bytes = path.stat().st_size
    if size_bytes > MAX_COLUMNS_BYTES:
        raise InvalidRequest(
            f"The file is one JSON object of {size_bytes:,} bytes; up to {MAX_COLUMNS_BYTES:,} are read at once. Write "
            "one object a line (JSONL), which can be of any size.",
            param="file",
        )
    try:
        text = "".join(text for text, _ in text_blocks(path, encoding))
        columns = json.loads(text, strict=False)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The file is not JSON: {error}. Is it whole?", param="file") from error
    if not isinstance(columns, dict):
        raise InvalidRequest("The file holds no objects, but a single value.", param="file")
    if fault := _half_character(text, columns):
        raise InvalidRequest(f"The file {fault}. Mend it, then run this again.", param="file")
    if not any(isinstance(values, (dict, list)) for values in columns.values()):
        _check_size(text, 1)
        yield [columns], 1, size_bytes  # a single row, over several lines
        return
    keyed = {
        name: values if isinstance(values, dict) else dict(enumerate(values)) if isinstance(values, list) else {}
        for name, values in columns.items()
    }
    index = list(dict.fromkeys(key for values in keyed.values() for key in values))
    rows = [{name: values.get(key) for name, values in keyed.items()} for key in index]
    for number, row in enumerate(rows, 1):
        for value in row.values():
            if isinstance(value, str):
                _check_size(value, number)
    for start in range(0, len(rows), BATCH_ROWS):
        yield rows[start : start + BATCH_ROWS], start + 1, size_bytes


def _check_size(text: str, number: int) -> None:
    if len(text) > MAX_LINE_CHARACTERS:
        raise InvalidRequest(
            f"Object {number:,} of the file is longer than {MAX_LINE_CHARACTERS:,} characters, more than any model "
            "reads as one example.",
            param="file",
        )
