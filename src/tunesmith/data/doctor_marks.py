"""Where prompts end and completions stop: which marks the rows agree on, and the rows that do otherwise. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tunesmith.data.facts import ENDINGS, SEPARATORS
from tunesmith.data.rows import Batch, RowList

AGREE = 0.5
"""A mark is one that so large a share of the first rows end with; the others have lost it."""
STEADY = 0.97
"""A mark is longer by a character if so large a share of the rows that have it have that before it too."""
DIALOGUE = 0.2
"""Where so large a share of prompts hold the separator earlier too, that is how they are made: turns of a talk."""
UNIQUE = 0.01
"""A full stop or the like is a mark only where no larger share of texts hold it earlier too."""
MOST_CHARACTERS = 40

_SENTENCE_ENDS = ".?!,;\"')]"
_MARK = re.compile(r"[^\w\s.?!,;\"'()]|\n| \[?[A-Z]{2,}\]?$")
"""Some of this tells a mark from the end of a word that many texts share, as the classes `positive` and `negative`."""


@dataclass(frozen=True, slots=True)
class Marks:
    """What the rows agree on; None where they do not, or where there is nothing to agree on."""

    separator: str | None
    """Ends prompts."""
    stop: str | None
    """Ends completions."""
    dialogue: bool = False
    """Prompts hold the separator more than once by design."""

    @classmethod
    def of(cls, prompts: Sequence[str], completions: Sequence[str]) -> Marks:
        """The marks of these rows, the first few thousand of a file, say."""
        separator = agreed_mark(prompts, SEPARATORS)
        stop = agreed_mark(completions, ENDINGS)
        dialogue = separator is not None and _how_many_earlier(prompts, separator) > DIALOGUE * len(prompts)
        return cls(separator, stop, dialogue)


@dataclass(slots=True)
class MarkFaults:
    """Rows that do otherwise, batch by batch."""

    marks: Marks
    separator_missing: RowList = field(default_factory=RowList)
    separator_space: RowList = field(default_factory=RowList)
    """The separator is there but for the white space around it."""
    separator_inside: RowList = field(default_factory=RowList)
    stop_missing: RowList = field(default_factory=RowList)
    stop_inside: RowList = field(default_factory=RowList)
    no_space: RowList = field(default_factory=RowList)
    """The completion does not begin with white space."""

    def add(self, batch: Batch) -> None:
        """The next rows. Rows without a completion are left to others."""
        numbers = range(batch.first, batch.first + len(batch))
        self._prompts(numbers, batch.prompts)
        self._completions(numbers, batch.completions)

    def _prompts(self, numbers: Iterable[int], prompts: Sequence[str]) -> None:
        separator = self.marks.separator
        if separator is None:
            return
        core = separator.strip()
        missing: list[int] = []
        space: list[int] = []
        inside: list[int] = []
        for number, prompt in zip(numbers, prompts, strict=True):
            if not prompt.endswith(separator):
                nearly = bool(core) and prompt.rstrip().endswith(core)
                (space if nearly else missing).append(number)
            elif not self.marks.dialogue and prompt.find(separator) < len(prompt) - len(separator):
                inside.append(number)
        self.separator_missing = self.separator_missing.plus(missing)
        self.separator_space = self.separator_space.plus(space)
        self.separator_inside = self.separator_inside.plus(inside)

    def _completions(self, numbers: Sequence[int], completions: Sequence[str]) -> None:
        rows = [(number, text) for number, text in zip(numbers, completions, strict=True) if text]
        self.no_space = self.no_space.plus([number for number, text in rows if not text[0].isspace()])
        stop = self.marks.stop
        if stop is None:
            return
        self.stop_missing = self.stop_missing.plus([number for number, text in rows if not text.endswith(stop)])
        before = -len(stop)
        self.stop_inside = self.stop_inside.plus(
            [number for number, text in rows if stop in (text[:before] if text.endswith(stop) else text)]
        )


def agreed_mark(texts: Sequence[str], known: Sequence[str]) -> str | None:
    r"""What most texts end with on purpose.

    >>> agreed_mark(["a ->", "b ->", "c ->", "d"], SEPARATORS)
    ' ->'
    >>> agreed_mark([" positive", " negative"], ENDINGS) is None
    True
    """
    mark = _shared_ending([text for text in texts if text])
    for usual in sorted(known, key=len, reverse=True):
        # What stands before it, such as the `?` of questions, is no part of it; another mark is.
        if mark.endswith(usual) and not _MARK.search(mark[: -len(usual)]):
            mark = usual
            break
    else:
        mark = mark.lstrip(_SENTENCE_ENDS) or mark
    if _MARK.search(mark):
        return mark
    mark = mark[len(mark.rstrip(_SENTENCE_ENDS)) :]
    return mark if mark and _how_many_earlier(texts, mark) <= UNIQUE * len(texts) else None


def _how_many_earlier(texts: Sequence[str], mark: str) -> int:
    """How many texts hold a mark before their end."""
    return sum(mark in text.removesuffix(mark) for text in texts)


def _shared_ending(texts: Sequence[str]) -> str:
    """What most texts end with, a character at a time from the end."""
    ending, holders = "", list(texts)
    fewest = AGREE * len(holders)
    while holders and len(ending) < MOST_CHARACTERS:
        place = -len(ending) - 1
        letters = Counter(text[place] for text in holders if len(text) >= -place)
        if not letters:
            break
        letter, count = letters.most_common(1)[0]
        if count < fewest:
            break
        ending = letter + ending
        holders = [text for text in holders if text.endswith(ending)]
        fewest = STEADY * len(holders)
    return ending
