"""Mending what the doctor has found, as far as no person has to decide. Pure: rows in, rows out, and what changed.

What comes out trains: rows without completion and rows that are too long as they are written always go.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from tunesmith.data.doctor_private import PLACEHOLDERS, redacted, scan, without_controls
from tunesmith.data.facts import Facts, Lengths, over_long
from tunesmith.data.findings import Finding
from tunesmith.data.formats import Example
from tunesmith.data.rows import Batch
from tunesmith.data.verdict import Verdict

MENDED = (
    "empty_completion",
    "long_examples",
    "control_characters",
    "special_tokens",
    "changed_tokens",
    "secrets",
    "card_numbers",
    "separator_missing",
    "separator_space",
    "completion_space",
    "stop_missing",
    "duplicated_rows",
    "overlap_exact",
    "overlap_spelling",
    "overlap_near",
)
"""Findings that are mended unless others are named."""
IF_NAMED = ("email_addresses", "phone_numbers", "class_tokens", "class_first_tokens")
"""These may be meant, or others may have to know: only if they are asked for."""
ALWAYS = ("empty_completion", "long_examples")
"""Without these the file would not train."""
SHOWN_CHANGES = 10


@dataclass(frozen=True, slots=True)
class Repair:
    """What is done to the rows of both files alike."""

    separator: str = ""
    """Every prompt ends with exactly this."""
    stop: str = ""
    """Every completion ends with this."""
    space: bool = False
    """Every completion begins with white space."""
    composed: bool = False
    """Characters are composed (Unicode NFC)."""
    no_controls: bool = False
    special: tuple[str, ...] = ()
    """Texts that are taken out."""
    private: tuple[str, ...] = ()
    """Kinds of private data that a placeholder stands for."""
    spellings: Mapping[str, str] = field(default_factory=dict)
    """Completions that are spelt otherwise, without `ending`, which stays."""
    ending: str = ""
    drop_duplicates: bool = False
    drop_overlap: tuple[str, ...] = ()
    """Kinds of overlap; rows of validation go, those of training stay."""

    def example(self, prompt: str, completion: str) -> Example | None:
        """The row as it should be; None if nothing is left of its completion. Private data is seen to elsewhere."""
        prompt, completion = self._clean(prompt), self._clean(completion)
        if not completion:
            return None
        if self.separator and not prompt.endswith(self.separator):
            core = self.separator.strip()
            bare = prompt.rstrip()
            prompt = (bare.removesuffix(core).rstrip() if core and bare.endswith(core) else prompt) + self.separator
        if self.spellings:
            name = completion.removesuffix(self.ending)
            completion = self.spellings.get(name, name) + completion[len(name) :]
        if self.space and not completion[0].isspace():
            completion = " " + completion
        if self.stop and not completion.endswith(self.stop):
            completion += self.stop
        return Example(prompt, completion)

    def leaves(self, mark: str) -> bool:
        """Whether a mark may be added: what most rows end with may itself be something that is taken out."""
        return redacted(self._clean(mark), self.private) == mark

    def _clean(self, text: str) -> str:
        if self.no_controls:
            text = without_controls(text)
        while any(token in text for token in self.special):  # taking one out may put another together
            for token in self.special:
                text = text.replace(token, "")
        return unicodedata.normalize("NFC", text) if self.composed else text


@dataclass(frozen=True, slots=True)
class Change:
    """A row that is not what it was."""

    row: int
    """Its number in the file that was read, from 1 on."""
    written: int
    """How many rows were written before it."""
    before: Example
    after: Example | None
    """None: it was left out."""


@dataclass(slots=True)
class Changes:
    """What came of one file."""

    kept: int = 0
    changed: int = 0
    removed: int = 0
    shown: list[Change] = field(default_factory=list)
    """The first SHOWN_CHANGES."""

    def add(self, row: int, before: Example, after: Example | None) -> None:
        """The next row."""
        if after != before:
            self.changed += after is not None
            self.removed += after is None
            if len(self.shown) < SHOWN_CHANGES:
                self.shown.append(Change(row, self.kept, before, after))
        self.kept += after is not None


def plan_repair(verdict: Verdict, special: Sequence[str], only: Collection[str] = ()) -> tuple[Repair, list[Finding]]:
    """What can be done about the findings, all in MENDED or those that are named; and the findings it is done about."""
    assert verdict.training is not None  # what cannot be read cannot be mended
    wanted = {*(only or MENDED), *ALWAYS}
    found = [finding for _, finding in verdict.findings if finding.id in wanted]
    ids = {finding.id for finding in found}
    marks = verdict.training.marks
    suggested: dict[str, str] = {}
    for finding in found:
        if finding.fix is not None:
            suggested |= {name: text for name, text in finding.fix.change.items() if isinstance(text, str)}
    repair = Repair(
        space="completion_space" in ids,
        composed="changed_tokens" in ids,
        no_controls="control_characters" in ids,
        special=tuple(special) if "special_tokens" in ids else (),
        private=tuple(kind for kind in PLACEHOLDERS if kind in ids),
        spellings=verdict.class_spellings if ids & {"class_tokens", "class_first_tokens"} else {},
        ending=marks.stop or "",
        drop_duplicates="duplicated_rows" in ids,
        drop_overlap=tuple(id_ for id_ in sorted(ids) if id_.startswith("overlap_")),
    )
    separator = marks.separator or suggested.get("prompt_suffix", "")
    stop = marks.stop or suggested.get("completion_suffix", "")
    if ids & {"separator_missing", "separator_space"} and repair.leaves(separator):
        repair = replace(repair, separator=separator)
    if "stop_missing" in ids and repair.leaves(stop):
        repair = replace(repair, stop=stop)
    return repair, found


def mend(
    batches: Iterable[Batch],
    repair: Repair,
    facts: Facts,
    lengths: Lengths,
    overlap: NDArray[np.bool_] | None,
    changes: Changes,
) -> Iterator[Batch]:
    """The rows as they are to be written, numbered anew; `changes` takes up what became of each.

    `facts` are those of the same rows; `overlap` says of each row whether it goes because the other file holds it.
    """
    place = 0
    for batch in batches:
        befores = [Example(*pair) for pair in zip(batch.prompts, batch.completions, strict=True)]
        afters = [repair.example(*pair) for pair in _redacted(batch, repair.private)]
        for number, before in enumerate(befores):
            if not before.completion:
                continue
            if repair.drop_duplicates and facts.drop_duplicates[place]:
                afters[number] = None
            place += 1
        if overlap is not None:
            for number in np.flatnonzero(overlap[batch.first - 1 : batch.first - 1 + len(batch)]).tolist():
                afters[number] = None
        _drop_long(afters, lengths)
        first = changes.kept + 1
        for number, (before, after) in enumerate(zip(befores, afters, strict=True), batch.first):
            changes.add(number, before, after)
        kept = [after for after in afters if after is not None]
        yield Batch(first, [row.prompt for row in kept], [row.completion for row in kept], batch.read_bytes)


def _redacted(batch: Batch, kinds: Sequence[str]) -> Iterable[tuple[str, str]]:
    if not kinds:
        return zip(batch.prompts, batch.completions, strict=True)
    texts = [*batch.prompts, *batch.completions]
    found = scan(texts).places
    for place in {place for kind in kinds for place in found[kind]}:
        texts[place] = redacted(texts[place], kinds)
    return zip(texts[: len(batch)], texts[len(batch) :], strict=True)


def _drop_long(rows: list[Example | None], lengths: Lengths) -> None:
    """Leaves out rows that training would refuse."""
    kept = [(place, row) for place, row in enumerate(rows) if row is not None]
    if kept:
        for number, _ in over_long([row.prompt for _, row in kept], [row.completion for _, row in kept], lengths):
            rows[kept[number][0]] = None
