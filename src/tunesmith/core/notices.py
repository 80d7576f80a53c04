"""What the doctor says of data that was accepted: a line for a file, events for a job. Refuses nothing.

Looks at the first part of a file only (see `data/sample.py`), so that neither an upload nor a new job waits for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.data.doctor import Codec
from tunesmith.data.findings import Finding, Severity
from tunesmith.data.sample import Sample
from tunesmith.data.verdict import TRAINING, judge

MOST_NOTICES = 5
"""A job gets no more events than that from the doctor; the last of them names what else there is."""
FEWEST_ROWS = 10
"""What fewer rows have in common, or have not, may be chance: of those only what training them would harm is told."""
_OF_ALL_ROWS = frozenset({"class_imbalance", "unknown_classes", "prompt_suffix", "completion_suffix"})
"""What the first rows do not tell: files may be sorted."""


@dataclass(frozen=True, slots=True)
class Notice:
    """One line about data, for the user who sent it."""

    message: str
    data: Mapping[str, Any]
    """The same for machines."""


def about_upload(sample: Sample) -> str | None:
    """One line about a file of which no base is known yet; None if there is nothing to say."""
    notices = _notices(sample, None, None)
    return None if not notices else " ".join(notice.message for notice in notices)


def about_job(training: Sample, validation: Sample | None, codec: Codec) -> tuple[Notice, ...]:
    """What a job is told of its data before it trains, the worst first; of rows as the base with that codec reads them.

    Lengths are not judged: too long a row has been refused.
    """
    return _notices(training, validation, codec)


def _notices(training: Sample, validation: Sample | None, codec: Codec | None) -> tuple[Notice, ...]:
    verdict = judge(training.part(), None if validation is None else validation.part(), None, codec)
    whole = training.whole and (validation is None or validation.whole)
    told = [
        (which, finding)
        for which, finding in verdict.warnings
        if (whole or finding.id not in _OF_ALL_ROWS)
        and (training.rows >= FEWEST_ROWS or finding.severity is Severity.REQUIRED)
    ]
    samples = {TRAINING: training}
    notices = [
        _notice(which, finding, samples.get(which, validation) or training)
        for which, finding in told[: MOST_NOTICES if len(told) <= MOST_NOTICES else MOST_NOTICES - 1]
    ]
    rest = [finding.id for _, finding in told[len(notices) :]]
    if rest:
        message = f"Data check found more: {', '.join(dict.fromkeys(rest))}. `tunesmith doctor` on the file tells all."
        notices.append(Notice(message, {"findings": rest}))
    return tuple(notices)


def _notice(which: str, finding: Finding, sample: Sample) -> Notice:
    rows = (
        f", rows {finding.rows}" if finding.rows.shown else f", {finding.rows.count:,} rows" * bool(finding.rows.count)
    )
    looked = "" if sample.whole else f" (of the first {sample.taken:,})"
    fix = None if finding.fix is None else finding.fix.action
    message = f"Data check {finding.id} in the {which} file{rows}{looked}: {finding.explanation}"
    if fix is not None:
        message += f" Fix: {fix}."
    data = {
        "finding": finding.id,
        "severity": finding.severity.value,
        "file": which,
        "count": finding.rows.count,
        "rows": list(finding.rows.shown),
        "looked_at": sample.taken,
        "fix": fix,
    }
    return Notice(" ".join(message.split()), data)
