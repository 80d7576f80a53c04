"""What a file holds, found in one pass over its rows and kept in little memory. Judges nothing."""

from __future__ import annotations

import itertools
import re
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.checks import OPENING_TOKENS
from tunesmith.data.keys import KeyLog
from tunesmith.data.rows import SHOWN_ROWS, Batch, RowList

ROWS_PER_CLASS = 3
"""With fewer rows for each distinct completion than this, completions are texts and not classes."""
MAX_CLASSES_NAMED = 10_000
NEW_LINE = "\n"
SEPARATORS = (" ->", "\n\n###\n\n", "\n\n===\n\n", "\n\n---\n\n", "\n\n===>\n\n", "\n\n--->\n\n")
"""What may mark the end of a prompt, the first that no prompt holds."""
ENDINGS = ("\n", ".", " END", "***", "+++", "&&&", "$$$", "@@@", "%%%")
"""What may mark the end of a completion, the first that no completion holds."""

LETTERS = 26
MOST_BYTES = 4
"""Of a character in UTF-8."""

_ASCII = re.compile(r"[\x00-\x7f]+")


class Task(Enum):
    """What a model is to be trained for, guessed from the rows."""

    OPEN_ENDED = "open-ended generation"
    CLASSIFICATION = "classification"
    CONDITIONAL = "conditional generation"


@dataclass(frozen=True, slots=True)
class Lengths:
    """What a base reads, and how its tokens are counted."""

    base: str
    limit_tokens: int
    count_tokens: Callable[[Sequence[tuple[str, str]]], list[int]]
    """Of each pair of prompt and completion, as training sees them."""

    @property
    def sure_bytes(self) -> int:
        """So many bytes are read whole: a token stands for at least one, but for those that open a text."""
        return self.limit_tokens - OPENING_TOKENS

    def fit(self, characters: int) -> bool:
        """Whether a row of so many characters is read whole, whatever they are."""
        return MOST_BYTES * characters <= self.sure_bytes


@dataclass(frozen=True, slots=True)
class ColumnFacts:
    """One column."""

    common_prefix: str
    common_suffix: str
    identical: bool
    """Every row has the same text, which is then prefix and suffix."""
    suffix_inside: bool
    """Some text holds the common suffix before its end too."""
    holds: frozenset[str]
    """Those of the marks that were looked for which some text holds."""
    upper: int
    lower: int
    """Letters of the column by case."""
    starts_with_space: bool
    """Every text does."""
    empty: bool
    """Every text is."""

    @property
    def mostly_upper(self) -> bool:
        """More than a third of the letters are upper case."""
        return self.upper * 2 > self.lower


@dataclass(frozen=True, slots=True)
class Facts:
    """A whole file. All but `rows` and `empty` is about the rows whose completion is not empty: the kept ones."""

    rows: int
    empty: RowList
    kept: int
    prompts: ColumnFacts
    completions: ColumnFacts
    distinct_completions: int
    classes: tuple[tuple[str, int], ...]
    """Completions with how often they come, the most frequent first; empty where they are over MAX_CLASSES_NAMED."""
    duplicates: RowList
    too_long: RowList
    longest_tokens: int
    """Of the rows that are too long; 0 without one."""
    most_characters: int
    """No row has more."""
    drop_duplicates: NDArray[np.bool_] = field(repr=False, compare=False)
    """For each kept row whether it repeats an earlier one."""
    drop_long: NDArray[np.bool_] = field(repr=False, compare=False)
    """For each kept row whether it is too long."""

    @property
    def task(self) -> Task:
        """What the file looks to be for."""
        if self.prompts.empty:
            return Task.OPEN_ENDED
        few = self.distinct_completions < self.kept / ROWS_PER_CLASS
        return Task.CLASSIFICATION if few else Task.CONDITIONAL


class ColumnFold:
    """Facts of a column, text by text. Without `marks`: whether it is empty or all the same, and its common suffix."""

    def __init__(self, marks: Sequence[str] | None) -> None:
        self._marks = set(marks or ())
        self._thorough = marks is not None
        self._holds: set[str] = set()
        self._first: str | None = None
        self._prefix = self._suffix = ""
        self._identical = self._space = self._empty = True
        self._inside = self._unsure = False
        self._upper = self._lower = 0

    def add(self, texts: Sequence[str]) -> None:
        """The next texts; at least one."""
        begun = self._first is not None
        if self._first is None:
            self._first = self._prefix = self._suffix = texts[0]
        self._identical = self._identical and texts.count(self._first) == len(texts)
        self._empty = self._empty and not any(texts)
        if self._suffix and not all(map(str.endswith, texts, itertools.repeat(self._suffix))):
            suffix = common_suffix(texts, self._suffix)
            self._unsure = self._unsure or (begun and suffix != self._suffix)
            self._suffix = suffix
        if self._thorough:
            self._look(texts)

    def result(self) -> ColumnFacts:
        """The facts so far."""
        return ColumnFacts(
            common_prefix=self._prefix,
            common_suffix=self._suffix,
            identical=self._identical,
            suffix_inside=self._inside,
            holds=frozenset(self._holds),
            upper=self._upper,
            lower=self._lower,
            starts_with_space=self._space and self._first is not None,
            empty=self._empty,
        )

    @property
    def unsure(self) -> bool:
        """Whether `suffix_inside` was looked for with a longer suffix in earlier texts: those need a second look."""
        return self._unsure and not self._inside and bool(self._suffix)

    def look_inside(self, texts: Sequence[str]) -> None:
        """The second look, with the suffix as it is now."""
        if not self._inside and self._suffix:
            # The suffix of each is one occurrence. Another before it makes one more, also if the two overlap others.
            self._inside = "\0".join(texts).count(self._suffix) > len(texts)

    def _look(self, texts: Sequence[str]) -> None:
        # One string for all, NUL between: what is asked of each text is asked of it at once, much faster.
        count, joined = len(texts), "\0".join(["", *texts, ""])
        if self._prefix and ("\0" in "".join(texts) or joined.count("\0" + self._prefix) < count):
            self._prefix = common_prefix(texts, self._prefix)
        if self._space:
            self._space = all(map(str.startswith, texts, itertools.repeat(" ")))
        # A character is looked for much faster than a word: most marks are missed by their last one.
        for mark in [mark for mark in self._marks if mark[-1] in joined and mark in joined]:
            self._marks.remove(mark)
            self._holds.add(mark)
        if not self._inside and self._suffix:
            self._inside = joined.count(self._suffix) > count
        upper, lower = count_case(joined)
        self._upper += upper
        self._lower += lower


class FileFold:
    """Facts of a file, batch by batch. A context: it keeps keys in a temporary file."""

    def __init__(self, lengths: Lengths | None, before: Facts | None = None) -> None:
        """With `before`, facts of the same rows as they were: task, classes and common suffixes alone."""
        thorough = before is None
        self._lengths = lengths
        self._thorough = thorough
        self.prompts = ColumnFold((NEW_LINE, *SEPARATORS) if thorough else None)
        self.completions = ColumnFold(ENDINGS if thorough else None)
        self._keys = KeyLog(2 if thorough else 1)
        many = before is not None and before.distinct_completions > MAX_CLASSES_NAMED
        self._classes: Counter[str] | None = None if many else Counter()
        self._rows = self._kept = self._longest = self._most_characters = 0
        self._empty = self._too_long = RowList()
        self._long_places: list[int] = []
        self._empty_rows = array("q")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._keys.__exit__(kind, error, at)

    def add(self, batch: Batch) -> None:
        """The next rows."""
        self._rows += len(batch)
        numbers: Sequence[int] = range(batch.first, batch.first + len(batch))
        prompts, completions = batch.prompts, batch.completions
        if "" in completions:
            empty = [n for n, text in zip(numbers, completions, strict=True) if not text]
            self._empty = self._empty.plus(empty)
            self._empty_rows.extend(empty)
            numbers = [n for n, text in zip(numbers, completions, strict=True) if text]
            prompts, completions = without_empty(prompts, completions)
        if not completions:
            return
        self.prompts.add(prompts)
        self.completions.add(completions)
        if self._thorough:
            self._keys.add(map(hash, prompts), map(hash, completions))
        elif self._classes is None:
            self._keys.add(map(hash, completions))
        if self._classes is not None:
            self._classes.update(completions)
            if self._thorough and len(self._classes) > MAX_CLASSES_NAMED:
                self._classes = None
        if self._thorough:
            self._measure(numbers, prompts, completions)
        self._kept += len(completions)

    def result(self) -> Facts:
        """The facts so far."""
        repeats = self._keys.repeats() if self._thorough else np.zeros(self._kept, dtype=np.bool_)
        long = np.zeros(self._kept, dtype=np.bool_)
        long[self._long_places] = True
        places = np.flatnonzero(repeats)
        return Facts(
            rows=self._rows,
            empty=self._empty,
            kept=self._kept,
            prompts=self.prompts.result(),
            completions=self.completions.result(),
            distinct_completions=self._keys.distinct(self._keys.width - 1)
            if self._classes is None
            else len(self._classes),
            classes=() if self._classes is None else tuple(self._classes.most_common()),
            duplicates=RowList(len(places), tuple(map(self._number, places[:SHOWN_ROWS].tolist()))),
            too_long=self._too_long,
            longest_tokens=self._longest,
            most_characters=self._most_characters,
            drop_duplicates=repeats,
            drop_long=long,
        )

    def contradictions(self) -> RowList:
        """Rows whose prompt comes with another completion too; such rows name each other. Empty prompts never do."""
        places = np.flatnonzero(self._keys.disputes(without=hash("")))
        return RowList(len(places), tuple(map(self._number, places[:SHOWN_ROWS].tolist())))

    def _number(self, place: int) -> int:
        """The row number of a kept row: as many rows before it as were kept, and the empty ones between."""
        number = place + 1
        for row in self._empty_rows:
            if row > number:
                break
            number += 1
        return number

    def _measure(self, numbers: Sequence[int], prompts: list[str], completions: list[str]) -> None:
        longest = max(map(len, prompts)) + max(map(len, completions))
        self._most_characters = max(self._most_characters, longest)
        if self._lengths is None or self._lengths.fit(longest):
            return
        over = over_long(prompts, completions, self._lengths)
        if over:
            self._too_long = self._too_long.plus([numbers[place] for place, _ in over])
            self._long_places += [self._kept + place for place, _ in over]
            self._longest = max(self._longest, *(count for _, count in over))


def over_long(prompts: Sequence[str], completions: Sequence[str], lengths: Lengths) -> list[tuple[int, int]]:
    """Places of the rows that a base cannot read whole, each with its tokens. They are counted where it is in doubt."""
    suspects = [
        place
        for place, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        if not lengths.fit(len(prompt) + len(completion))
        and len(prompt.encode()) + len(completion.encode()) > lengths.sure_bytes
    ]
    counts = lengths.count_tokens([(prompts[place], completions[place]) for place in suspects]) if suspects else []
    return [(place, count) for place, count in zip(suspects, counts, strict=True) if count > lengths.limit_tokens]


def without_empty(prompts: list[str], completions: list[str]) -> tuple[list[str], list[str]]:
    """The rows that have a completion."""
    return [prompt for prompt, text in zip(prompts, completions, strict=True) if text], [t for t in completions if t]


def common_prefix(texts: Sequence[str], prefix: str) -> str:
    """What `prefix` and all of `texts` begin with."""
    return _shared(_shared(prefix, min(texts)), max(texts))  # what these share, all between them share


def common_suffix(texts: Sequence[str], suffix: str) -> str:
    """What `suffix` and all of `texts` end with."""
    for text in texts:
        if not suffix:
            break
        if not text.endswith(suffix):
            suffix = _shared(suffix[::-1], text[: -len(suffix) - 1 : -1])[::-1]
    return suffix


def _shared(one: str, other: str) -> str:
    """What both begin with."""
    for place, (letter, another) in enumerate(zip(one, other, strict=False)):
        if letter != another:
            return one[:place]
    return min(one, other, key=len)


def count_case(text: str) -> tuple[int, int]:
    """Upper-case and lower-case letters of a text, of any script."""
    plain = text.encode("ascii", "ignore")
    # As bytes, what is below a letter wraps around to what is far above the last.
    codes = np.frombuffer(plain, dtype=np.uint8)
    upper, lower = (int(np.count_nonzero(codes - np.uint8(ord(first)) < LETTERS)) for first in "Aa")
    if len(plain) < len(text):
        for letter, count in Counter(_ASCII.sub("", text)).items():
            if letter.isalpha():
                upper += count * letter.isupper()
                lower += count * letter.islower()
    return upper, lower
