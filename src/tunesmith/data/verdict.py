"""The doctor's look at the rows of a job, whole: for the command line, for uploads and for new jobs the same.

Reads rows, judges them, sorts what was found. Knows no server and prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tunesmith.data.doctor import Codec, Examination, Examined, first_marks
from tunesmith.data.doctor_findings import about_file, about_validation, diagnose
from tunesmith.data.doctor_marks import Marks
from tunesmith.data.doctor_overlap import Overlap, ValidationRows
from tunesmith.data.facts import Lengths
from tunesmith.data.findings import Finding, Severity, Subject
from tunesmith.data.rows import Batch
from tunesmith.data.source import Source
from tunesmith.errors import InvalidRequest

TRAINING, VALIDATION = "training", "validation"


@dataclass(frozen=True, slots=True)
class Part:
    """One of the files of a job."""

    source: Source
    batches: Callable[[], Iterable[Batch]]
    """All rows that are to be looked at, from the beginning; asked for more than once."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of it."""

    findings: tuple[tuple[str, Finding], ...]
    """Each with TRAINING or VALIDATION, whose rows it names; the worst first."""
    training: Examined | None
    """None if the file cannot be read to its end."""
    validation: Examined | None
    overlap: Overlap | None
    """None where one of the two could not be read."""
    class_spellings: Mapping[str, str]

    @property
    def warnings(self) -> tuple[tuple[str, Finding], ...]:
        """The findings that are worse than a note."""
        return tuple(told for told in self.findings if told[1].severity is not Severity.NOTE)

    def plus(self, more: Iterable[tuple[str, Finding]]) -> Verdict:
        """With more findings."""
        return replace(self, findings=_sorted([*self.findings, *more]))


def judge(training: Part, validation: Part | None, lengths: Lengths | None, codec: Codec | None) -> Verdict:
    """Looks at both files. Rows that cannot be read are a finding.

    Without `lengths` no row is too long; without `codec` nothing is said of tokens. Raises Changed as the batches do.
    """
    try:
        marks = first_marks(training.batches())
    except InvalidRequest as error:
        return Verdict(((TRAINING, _unreadable(error)),), None, None, None, {})
    rows = ValidationRows(marks.separator)
    found: list[tuple[str, Finding]] = []
    tried: Examined | None = None
    if validation is not None:
        try:
            tried = _pass(validation, marks, lengths, codec, rows.add)
        except InvalidRequest as error:
            found.append((VALIDATION, _unreadable(error)))
    try:
        examined = _pass(training, marks, lengths, codec, None if tried is None else rows.meet)
    except InvalidRequest as error:
        return Verdict((*found, (TRAINING, _unreadable(error))), None, tried, None, {})
    diagnosis = diagnose(examined, codec)
    ours = [*about_file(Subject(training.source, examined.facts, lengths)), *diagnosis.findings]
    overlap = None
    if tried is not None:
        overlap = rows.result()
        found += [(VALIDATION, finding) for finding in about_validation(examined, tried, overlap)]
    every = _sorted([*((TRAINING, finding) for finding in ours), *found])
    return Verdict(every, examined, tried, overlap, diagnosis.class_spellings)


def _sorted(findings: Sequence[tuple[str, Finding]]) -> tuple[tuple[str, Finding], ...]:
    order = list(Severity)
    return tuple(sorted(findings, key=lambda told: -order.index(told[1].severity)))


def _pass(
    part: Part,
    marks: Marks,
    lengths: Lengths | None,
    codec: Codec | None,
    each: Callable[[Batch], None] | None,
) -> Examined:
    with Examination(marks, lengths, codec) as examination:
        for batch in part.batches():
            examination.add(batch)
            if each is not None:
                each(batch)
        return examination.result()


def _unreadable(error: InvalidRequest) -> Finding:
    return Finding("unreadable", Severity.FATAL, error.message)
