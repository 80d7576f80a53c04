"""The doctor looks at rows on their way through and keeps what is odd about them: one pass, little memory, no advice.

What follows from it is in `doctor_findings`. Pure: batches of rows in, an Examined out; no files, no printing.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tunesmith.data.doctor_classes import Encode
from tunesmith.data.doctor_marks import MarkFaults, Marks
from tunesmith.data.doctor_private import KINDS, half_characters, scan, without_halves
from tunesmith.data.facts import Facts, FileFold, Lengths
from tunesmith.data.rows import BATCH_ROWS, Batch, RowList

ODD_TEXT = ("half_characters", "special_tokens", "changed_tokens")


@dataclass(frozen=True, slots=True)
class Codec:
    """How a base reads and writes text."""

    encode: Encode
    decode: Callable[[Iterable[int]], str]
    special: tuple[str, ...]
    """Texts of tokens that begin or end a text."""


@dataclass(frozen=True, slots=True)
class Examined:
    """What a file is like."""

    facts: Facts
    faults: MarkFaults
    texts: Mapping[str, RowList]
    """Rows by what a text of theirs holds: KINDS and ODD_TEXT."""
    contradictions: RowList
    """Rows whose prompt comes with another completion too."""

    @property
    def marks(self) -> Marks:
        """What the rows should end with."""
        return self.faults.marks


class Examination:
    """Looks at one file, batch by batch. A context: it keeps keys in a temporary file."""

    def __init__(self, marks: Marks, lengths: Lengths | None, codec: Codec | None) -> None:
        """`marks` are those that the rows should have.

        Without `lengths` no row is too long; without `codec` nothing is said of tokens.
        """
        self._fold = FileFold(lengths)
        self._codec = codec
        self._faults = MarkFaults(marks)
        self._texts = dict.fromkeys((*KINDS, *ODD_TEXT), RowList())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._fold.__exit__(kind, error, at)

    def add(self, batch: Batch) -> None:
        """The next rows. They are numbered from 1 on, without a gap."""
        batch = self._whole_characters(batch)
        self._fold.add(batch)
        self._faults.add(batch)
        self._look(batch)

    def result(self) -> Examined:
        """What there was so far."""
        return Examined(self._fold.result(), self._faults, self._texts, self._fold.contradictions())

    def _whole_characters(self, batch: Batch) -> Batch:
        """The rows without half characters, which nothing else could read."""
        halves = half_characters([*batch.prompts, *batch.completions])
        if not halves:
            return batch
        self._note("half_characters", batch, halves)
        prompts, completions = (list(map(without_halves, texts)) for texts in (batch.prompts, batch.completions))
        return Batch(batch.first, prompts, completions, batch.read_bytes)

    def _look(self, batch: Batch) -> None:
        texts = [*batch.prompts, *batch.completions]
        for kind, places in scan(texts).places.items():
            self._note(kind, batch, places)
        if self._codec is not None:
            self._note("special_tokens", batch, _holding(texts, self._codec.special))
            self._note("changed_tokens", batch, _changed(texts, self._codec))

    def _note(self, kind: str, batch: Batch, places: Sequence[int]) -> None:
        """Places among the prompts of a batch followed by its completions, as rows."""
        if places:
            rows = sorted({place % len(batch) for place in places})
            self._texts[kind] = self._texts[kind].plus([batch.first + row for row in rows])


def first_marks(batches: Iterable[Batch]) -> Marks:
    """The marks that the first BATCH_ROWS rows agree on, or a few more; no others are read."""
    prompts: list[str] = []
    completions: list[str] = []
    for batch in batches:
        prompts += batch.prompts
        completions += batch.completions
        if len(prompts) >= BATCH_ROWS:
            break
    return Marks.of(prompts, completions)


def _holding(texts: Sequence[str], marks: Sequence[str]) -> list[int]:
    """Places of the texts that hold one of the marks."""
    joined = "\0".join(texts)
    there = [mark for mark in marks if mark in joined]
    return [place for place, text in enumerate(texts) if any(mark in text for mark in there)] if there else []


def _changed(texts: Sequence[str], codec: Codec) -> list[int]:
    """Places of the texts that are not what their tokens say.

    Tokenizers that lose anything of usual text are refused when they are read, so only characters that can be composed
    are looked at.
    """
    suspects = [
        place for place, text in enumerate(texts) if not text.isascii() and not unicodedata.is_normalized("NFC", text)
    ]
    if not suspects:
        return []
    encoded = codec.encode([texts[place] for place in suspects])
    return [place for place, ids in zip(suspects, encoded, strict=True) if codec.decode(ids) != texts[place]]
