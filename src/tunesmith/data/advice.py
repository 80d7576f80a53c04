"""What to do with prepared rows: the command to run, what it will count, cost and take. Pure."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from tunesmith.data.doctor_classes import Encode
from tunesmith.data.facts import Facts, Lengths
from tunesmith.data.rows import Batch

MAX_EXACT_BYTES = 16 << 20
"""Of larger files the tokens of a part are counted, unless all are asked for."""
SAMPLED_BYTES = 1 << 18
"""How much of them."""
AT_ONCE_ROWS = 512
"""Counted in one call: a call has its price."""


class TokenMeter:
    """Counts the tokens of rows: of all, or of every so-manieth."""

    def __init__(self, lengths: Lengths, size_bytes: int, *, exact: bool) -> None:
        """`size_bytes` is about how much there will be."""
        self._lengths = lengths
        self._stride = 1 if exact or size_bytes <= MAX_EXACT_BYTES else -(-size_bytes // SAMPLED_BYTES)
        self._rows = self._tokens = 0
        self._waiting: list[tuple[str, str]] = []
        self._sampled_rows = 0

    def add(self, batch: Batch) -> None:
        """The next rows."""
        some = slice(-self._rows % self._stride, None, self._stride)
        pairs = list(zip(batch.prompts[some], batch.completions[some], strict=True))
        self._waiting += pairs
        if len(self._waiting) >= AT_ONCE_ROWS:
            self._count()
        self._sampled_rows += len(pairs)
        self._rows += len(batch)

    def result(self) -> Tokens:
        """The count so far."""
        self._count()
        if self._stride == 1:
            return Tokens(self._tokens, exact=True)
        return Tokens(round(self._tokens * self._rows / max(1, self._sampled_rows)), exact=False)

    def _count(self) -> None:
        if self._waiting:
            self._tokens += sum(self._lengths.count_tokens(self._waiting))
            self._waiting = []


@dataclass(frozen=True, slots=True)
class Tokens:
    """How many tokens one pass over the rows has."""

    count: int
    exact: bool
    """Counted in every row, or estimated from some."""


def begin_alike(facts: Facts, encode: Encode) -> list[str]:
    """Classes that begin with the token of another: by it metrics tell classes apart, and so not these."""
    names = [name for name, _ in facts.classes]
    firsts = [ids[:1] for ids in encode(names)]
    counts = Counter(map(tuple, firsts))
    return [name for name, first in zip(names, firsts, strict=True) if counts[tuple(first)] > 1]


def metrics_flags(facts: Facts, alike: Sequence[str] = ()) -> list[str]:
    """The flags that have classification measured, for rows as they were written; `alike` are as of `begin_alike`.

    Two classes get both flags: `--classification_positive_class` alone implies two for us, but not everywhere. None are
    given where a job that asked for metrics would be refused or fail: for one class, and where classes begin alike.
    """
    if facts.distinct_completions < 2 or alike:
        return []
    flags = ["--compute_classification_metrics", "--classification_n_classes", str(facts.distinct_completions)]
    if facts.distinct_completions == 2 and facts.classes:
        flags += ["--classification_positive_class", facts.classes[0][0]]
    return flags


def quoted(words: Sequence[str]) -> str:
    r"""Words as one line for a shell: in double quotes what is not a plain word, as the published command does.

    What a terminal would take for a command to itself is spelt out, as bash and its kind read it: `$'a\x1b.csv'`.
    """
    return " ".join(word if _plain(word) else _in_quotes(word) for word in words)


def duration(seconds: float) -> str:
    """For people: `41 seconds`, `2.5 minutes`."""
    for size_s, name, until_s in ((1, "seconds", 60), (60, "minutes", 3_600), (3_600, "hours", 86_400)):
        if seconds < until_s:
            return f"{seconds / size_s:.2g} {name}" if seconds / size_s < 10 else f"{seconds / size_s:.0f} {name}"
    return f"{seconds / 86_400:.1f} days"


def _plain(word: str) -> bool:
    return bool(word) and all(letter.isalnum() or letter in "-_." for letter in word) and word.isascii()


def _in_quotes(word: str) -> str:
    if all(letter.isprintable() or letter == "\n" for letter in word):
        return f'"{_escaped(word)}"'
    spelt = (
        f"\\x{byte:02x}" if byte < 0x20 or byte in b"'\\" or byte >= 0x7F else chr(byte) for byte in os.fsencode(word)
    )
    return f"$'{''.join(spelt)}'"


def _escaped(word: str) -> str:
    for letter in '\\"$`':
        word = word.replace(letter, "\\" + letter)
    return word
