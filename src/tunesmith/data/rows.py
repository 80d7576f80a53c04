"""Rows on their way through: batches of prompts and completions, the columns they come from, and rows that are broken.

What every reader gives and every check takes. Knows no format.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from tunesmith.data.formats import MESSAGES
from tunesmith.errors import InvalidRequest

BATCH_ROWS = 4_096
MAX_COLUMNS = 1_000
SHOWN_ROWS = 20
"""So many rows are named where a finding is about many."""
PROMPT, COMPLETION = "prompt", "completion"


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows that follow each other; prompts and completions are of one length."""

    first: int
    """Number of the first row, counted from 1; a heading is no row."""
    prompts: list[str]
    completions: list[str]
    read_bytes: int
    """How far into the file these rows reach, about."""

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True, slots=True)
class RowList:
    """Rows that share something: all counted, the first few by number."""

    count: int = 0
    shown: tuple[int, ...] = ()

    def plus(self, numbers: Sequence[int]) -> RowList:
        """With more of them."""
        return RowList(self.count + len(numbers), (*self.shown, *numbers[: SHOWN_ROWS - len(self.shown)]))

    def __str__(self) -> str:
        """`3, 17, 20`, with `and 5 more` where not all are shown."""
        more = self.count - len(self.shown)
        return ", ".join(map(str, self.shown)) + (f" and {more:,} more" if more else "")


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a file, and which of them are read as prompt and completion."""

    names: tuple[str, ...]
    prompt: str
    completion: str

    @property
    def extra(self) -> tuple[str, ...]:
        """The columns that are not read."""
        return tuple(name for name in self.names if name not in (self.prompt, self.completion))


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user calls the columns; None is `prompt` and `completion`, in any case."""

    prompt: str | None = None
    completion: str | None = None

    def choose(self, names: Iterable[str]) -> Columns:
        """Raises InvalidRequest for a column that is missing, or too many."""
        names = tuple(names)
        if len(names) > MAX_COLUMNS:
            raise InvalidRequest(
                f"The file has more than {MAX_COLUMNS:,} columns; two are needed, `prompt` and `completion`. Is the "
                "first line the heading, and the format the one that the file name says?",
                param="file",
            )
        return Columns(names, _choose(names, PROMPT, self.prompt), _choose(names, COMPLETION, self.completion))


def _choose(names: Sequence[str], field_name: str, asked: str | None) -> str:
    wanted = field_name if asked is None else asked
    if wanted in names:
        return wanted
    if asked is None:
        for name in names:
            if name.lower() == field_name:
                return name
    if asked is None and MESSAGES in names:
        raise InvalidRequest(
            "The rows are conversations (`messages`), which need no preparing: upload the file as it is.",
            param="file",
            code="conversations",
        )
    listed = ", ".join(f"`{name[:40]}`" for name in names[:SHOWN_ROWS]) or "none"
    raise InvalidRequest(
        f"The column/key `{wanted}` is missing; there are: {listed}. Name the right one with --{field_name}-column, or "
        "rename it in the file.",
        param=field_name,
        code="missing_column",
    )


def for_each(change: Callable[[str], str], texts: list[str]) -> list[str]:
    """What a change makes of each text. Where few of them differ, as names of classes, each is changed once."""
    distinct = set(texts)
    if 4 * len(distinct) > len(texts):
        return list(map(change, texts))
    changed = {text: change(text) for text in distinct}
    return list(map(changed.__getitem__, texts))


@dataclass(slots=True)
class Broken:
    """Collects rows that cannot be read, so that one run names many of them."""

    what: str
    """How places are counted: `Line` or `Object`."""
    faults: list[str] = field(default_factory=list)

    def add(self, number: int, fault: str) -> None:
        """Raises InvalidRequest once there are enough."""
        self.faults.append(f"{self.what} {number:,} {fault}")
        if len(self.faults) == SHOWN_ROWS:
            self.end()

    def end(self) -> None:
        """Raises InvalidRequest if there was any."""
        if not self.faults:
            return
        first, *others = self.faults
        more = "" if not others else " Also: " + "; ".join(others) + "."
        raise InvalidRequest(
            f"{first}. Mend or remove it, then run this again.{more}", param="file", code="broken_rows"
        )
