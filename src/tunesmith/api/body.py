"""JSON bodies: read whole and bounded, then taken apart field by field. Knows kinds and ranges, no endpoint.

An explicit null is the same as a field left out, everywhere: the published command lines send every flag, set or not.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from starlette.requests import Request

from tunesmith.errors import InvalidRequest, UnsupportedMedia

MAX_JSON_BYTES = 16 * 1024 * 1024
"""As much as the longest list of the longest prompts. A body is held in memory, and the parser stops everybody else:
for a second or two at this size, measured."""
MAX_INTEGER = 2**63 - 1
"""Larger ones are valid JSON that no database column holds."""
MAX_INTEGER_DIGITS = len(str(MAX_INTEGER))


async def read_json(request: Request) -> Fields:
    """The fields of a JSON object. Raises InvalidRequest, or UnsupportedMedia for a body declared to be no JSON."""
    declared = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if declared != "application/json" and not declared.endswith("+json"):
        raise UnsupportedMedia(
            f"This endpoint reads JSON; the body was sent as {declared}. Send it with the header "
            "Content-Type: application/json."
        )
    packed = request.headers.get("content-encoding", "identity").strip().lower()
    if packed != "identity":
        raise UnsupportedMedia(
            f"This endpoint reads bodies as they are; this one was sent as {packed}. Send it without the header "
            "Content-Encoding."
        )
    content = bytearray()
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_JSON_BYTES:
            raise InvalidRequest(
                f"The body is larger than the {MAX_JSON_BYTES} bytes that a JSON request may have. Send less in each "
                "request."
            )
    return Fields(parse_json(bytes(content)))


def whole_number(text: str) -> int | None:
    """The number that a query or a header writes in ASCII digits; None for anything else, or one beyond 64 bits."""
    if not (text.isascii() and text.isdecimal() and len(text) <= MAX_INTEGER_DIGITS):
        return None
    number = int(text)
    return number if number <= MAX_INTEGER else None


def parse_json(content: bytes) -> dict[str, Any]:
    """A JSON object of well-formed text and finite numbers. Raises InvalidRequest telling what is wrong, and where."""
    try:
        value = json.loads(content, parse_constant=_no_constant)
        if b"\\u" in content:  # half of a surrogate pair is valid JSON, yet no text
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeError:
        raise InvalidRequest("The body of the request is not valid Unicode text; send it as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(
            f"We could not parse the JSON body of your request ({error}). It must be one JSON object, such as "
            '{"model": "ada"}.'
        ) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"The body of the request must be a JSON object; it is {_kind(value)}.")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


class Fields:
    """The fields of one request. Each is taken once, by kind; `done` refuses by name what nobody took."""

    def __init__(self, values: dict[str, Any], within: str = "") -> None:
        self._left = {name: value for name, value in values.items() if value is not None}
        self._known: list[str] = []
        self.names = tuple(values)
        """Of all fields sent, in their order."""
        self._within = within

    def take(self, name: str) -> Any:
        """The value as sent; None if it is absent or null."""
        self._known.append(name)
        return self._left.pop(name, None)

    def text(self, name: str) -> str | None:
        """A string without NUL, which not every database takes."""
        value: str | None = self._of_kind(name, str, "a string")
        if value is not None and "\0" in value:
            raise self.wrong(name, "a string without NUL characters", value)
        return value

    def required_text(self, name: str) -> str:
        """A string that must be there and not be empty."""
        value = self.text(name)
        if not value:
            raise InvalidRequest(f"You must provide the field '{self._within}{name}'.", param=self._within + name)
        return value

    def flag(self, name: str) -> bool | None:
        """Either true or false."""
        value: bool | None = self._of_kind(name, bool, "true or false")
        return value

    def integer(self, name: str, low: int | None = None, high: int | None = None) -> int | None:
        """A whole number from `low` to `high`, both included."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MAX_INTEGER:
            raise self.wrong(name, "an integer of at most 63 bits and a sign", value)
        self._check_range(name, value, low, high)
        return value

    def number(self, name: str, low: float | None = None, high: float | None = None) -> float | None:
        """A number from `low` to `high`, both included."""
        value = self.take(name)
        if value is None:
            return None
        self._check_number(name, value)
        self._check_range(name, value, low, high)
        return float(value)

    def numbers(self, name: str) -> tuple[float, ...] | None:
        """A list of numbers."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.wrong(name, "a list of numbers", value)
        for item in value:
            self._check_number(name, item)
        return tuple(float(item) for item in value)

    def texts(self, name: str) -> tuple[str, ...] | None:
        """A list of strings."""
        value = self.take(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, str) for item in value)):
            raise self.wrong(name, "a list of strings", value)
        return None if value is None else tuple(value)

    def nested(self, name: str) -> Fields:
        """The fields of an object within; none if it is absent."""
        return Fields(self._of_kind(name, dict, "an object") or {}, within=f"{self._within}{name}.")

    def strings(self, name: str) -> dict[str, str]:
        """An object of strings; empty if it is absent."""
        value = self._of_kind(name, dict, "an object of strings") or {}
        for key, text in value.items():
            if not isinstance(text, str) or "\0" in key + text:
                raise self.wrong(name, "an object of strings without NUL characters", value)
        return dict(value)

    def without(self, word: str) -> Fields:
        """The same, fields whose value is `word` being absent: it stands for the default."""
        self._left = {name: value for name, value in self._left.items() if value != word}
        return self

    def each(self, name: str) -> list[Fields]:
        """The fields of each object in a list; none if it is absent."""
        value = self.take(name)
        if value is not None and not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            raise self.wrong(name, "a list of objects", value)
        return [Fields(item, within=f"{self._within}{name}[{at}].") for at, item in enumerate(value or [])]

    def path(self, name: str) -> str:
        """A field's whole name, as errors call it."""
        return self._within + name

    def done(self) -> None:
        """Raises InvalidRequest for a field that this endpoint does not have."""
        unknown = next((name for name in self.names if name not in self._known), None)
        if unknown is not None:
            raise InvalidRequest(
                f"Unrecognized request argument supplied: {self._within}{unknown}. Leave it out; the arguments here "
                f"are: {', '.join(self._known)}.",
                param=self._within + unknown,
            )

    def wrong(self, name: str, wanted: str, value: Any) -> InvalidRequest:
        """The error for a value that is not what was wanted."""
        if isinstance(value, int) and abs(value) > MAX_INTEGER:  # thousands of digits, perhaps
            shown = f"an integer of {value.bit_length()} bits"
        else:
            shown = str(value) if isinstance(value, int | float) else _kind(value)
        return InvalidRequest(
            f"'{self._within}{name}' must be {wanted}; it is {shown}.",
            param=self._within + name,
        )

    def _of_kind(self, name: str, kind: type, wanted: str) -> Any:
        value = self.take(name)
        if value is not None and not isinstance(value, kind):
            raise self.wrong(name, wanted, value)
        return value

    def _check_number(self, name: str, value: Any) -> None:
        # An integer beyond the range of floats is valid JSON.
        if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
            raise self.wrong(name, "a number", value)

    def _check_range(self, name: str, value: float, low: float | None, high: float | None) -> None:
        if low is not None and value < low:
            raise self.wrong(name, f"at least {low}", value)
        if high is not None and value > high:
            raise self.wrong(name, f"at most {high}", value)


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _kind(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return f"the string {value[:40]!r}"
        case list():
            return "a list"
        case _:
            return "an object"
