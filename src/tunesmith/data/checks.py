"""What a training file holds, as far as a job depends on it. Pure functions over examples; no files, no printing.

Rows are counted from 1; in a file without a header they are its lines.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tunesmith.data.formats import Example

SHOWN_OVER_LONG = 5
"""A survey ends at this many over-long rows: enough to show, and counting tokens is the slow part."""
OPENING_TOKENS = 4
"""A tokenizer puts no more than this before a text. See `vocabulary.py`."""


@dataclass(frozen=True, slots=True)
class OverLong:
    """A row that is longer than a model reads."""

    row: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Survey:
    """The facts of one file."""

    examples: int
    """How many rows were read: all, unless there are SHOWN_OVER_LONG over-long ones."""
    over_long: tuple[OverLong, ...]
    """The first few."""
    completions: Mapping[str, int] = field(default_factory=dict)
    """Distinct completions in order of appearance, each with its first row; at most `max_completions` of them."""


def survey(
    examples: Iterable[Example],
    *,
    count_tokens: Callable[[Example], int],
    limit_tokens: int,
    max_completions: int,
) -> Survey:
    """Read all rows once.

    `count_tokens` is called only for rows with so many bytes that they could exceed `limit_tokens`: a token stands for
    at least one byte. At most `max_completions` distinct completions are remembered; 0 remembers none.
    """
    row = 0
    over_long: list[OverLong] = []
    completions: dict[str, int] = {}
    for row, example in enumerate(examples, 1):
        if most_tokens(example) > limit_tokens and (tokens := count_tokens(example)) > limit_tokens:
            over_long.append(OverLong(row, tokens))
            if len(over_long) == SHOWN_OVER_LONG:
                break
        if len(completions) < max_completions:
            completions.setdefault(example.completion, row)
    return Survey(row, tuple(over_long), completions)


def most_tokens(example: Example) -> int:
    """No tokenizer makes more of this row: one token a byte, and a few that begin a text."""
    return len(example.prompt.encode()) + len(example.completion.encode()) + OPENING_TOKENS
