"""The first rows of a training file, for the doctor to look at while somebody waits. Bounded in time and memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tunesmith.data.formats import Example
from tunesmith.data.json_rows import Shape
from tunesmith.data.rows import COMPLETION, PROMPT, Batch, Columns, Wanted
from tunesmith.data.source import Format, Source
from tunesmith.data.verdict import Part

SAMPLED_CHARACTERS = 1 << 20
"""Half a second of one core; with as much of a validation file at most two."""
AT_ONCE_ROWS = 256
"""Looked at in one call: other threads of a server get their turn in between."""

_COLUMNS = Columns((PROMPT, COMPLETION), PROMPT, COMPLETION)


class Sample:
    """Takes the first SAMPLED_CHARACTERS of a file that was accepted as training data; whole rows, one at least."""

    def __init__(self) -> None:
        self._examples: list[Example] = []
        self._left = SAMPLED_CHARACTERS
        self.rows = 0
        """Of the whole file, as far as it has been read."""

    @property
    def whole(self) -> bool:
        """Whether all rows were taken."""
        return len(self._examples) == self.rows

    @property
    def taken(self) -> int:
        """How many rows were taken."""
        return len(self._examples)

    def add(self, example: Example) -> None:
        """The next row."""
        self.rows += 1
        if self._left > 0:
            self._left -= len(example.prompt) + len(example.completion)
            self._examples.append(example)

    def take(self, examples: Iterable[Example]) -> None:
        """The next rows."""
        for example in examples:
            self.add(example)

    def of(self, examples: Iterable[Example]) -> Iterator[Example]:
        """Passes rows on and takes the first of them."""
        for example in examples:
            self.add(example)
            yield example

    def part(self) -> Part:
        """What was taken, as the doctor reads it."""
        source = Source(Path("data.jsonl"), Format.JSONL, "utf-8", _COLUMNS, Wanted(), shape=Shape.LINES)
        return Part(source, lambda: _batches(self._examples))


def _batches(examples: Sequence[Example]) -> Iterator[Batch]:
    for start in range(0, len(examples), AT_ONCE_ROWS):
        some = examples[start : start + AT_ONCE_ROWS]
        yield Batch(start + 1, [one.prompt for one in some], [one.completion for one in some], 0)
