"""The tracking folder: all that the server and the process of a tracker share. Knows names and formats.

The server writes, the tracker reads, and neither waits for the other:

    spec.json     TrackingSpec: which tracker, and what it is told of the job
    rows.jsonl    {"event", "step", "values"}: one line for each metrics event of the job, appended
    end.json      how the job ended: written once all rows are there

The tracker, `python -m tunesmith.tracking <folder>`, writes:

    heartbeat     touched while it is alive and not stuck
    began.json    {"where"}: the run is open
    outcome.json  TrackingOutcome, written last; none: it died, and is to be started again
    tracker.log   its output
    ...           what its package keeps on this machine
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tunesmith.rundir import write_json
from tunesmith.tracking.base import Subject


@dataclass(frozen=True, slots=True)
class TrackingSpec:
    """What is tracked, and by what."""

    kind: str
    """One of `tracking.base.KINDS`."""
    subject: Subject


@dataclass(frozen=True, slots=True)
class Row:
    """The numbers of a step."""

    event: int
    """The id of the job's event."""
    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class TrackingOutcome:
    """How a tracker ended by itself."""

    status: Literal["done", "unusable"]
    reason: str | None = None
    """In words for the user, when unusable."""


@dataclass(frozen=True, slots=True)
class TrackingDir:
    """The paths of one tracking folder."""

    path: Path

    @property
    def spec(self) -> Path:
        """Written by the server, first."""
        return self.path / "spec.json"

    @property
    def rows(self) -> Path:
        """Appended to by the server."""
        return self.path / "rows.jsonl"

    @property
    def end(self) -> Path:
        """Written by the server, last."""
        return self.path / "end.json"

    @property
    def heartbeat(self) -> Path:
        """Touched by the tracker."""
        return self.path / "heartbeat"

    @property
    def began(self) -> Path:
        """Written by the tracker."""
        return self.path / "began.json"

    @property
    def outcome(self) -> Path:
        """Written by the tracker, last."""
        return self.path / "outcome.json"

    @property
    def log(self) -> Path:
        """Output of the tracker."""
        return self.path / "tracker.log"

    def write_spec(self, spec: TrackingSpec) -> None:
        """Durable before it returns."""
        write_json(self.spec, asdict(spec))

    def read_spec(self) -> TrackingSpec:
        """The inverse."""
        raw = json.loads(self.spec.read_text())
        subject = raw["subject"]
        return TrackingSpec(raw["kind"], Subject(**subject | {"tags": tuple(subject["tags"])}))

    def append_rows(self, rows: list[Row]) -> None:
        """Durable before it returns. What a crash left of a half-written line is cut off first."""
        with self.rows.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write(b"".join(json.dumps(asdict(row)).encode() + b"\n" for row in rows))
            file.flush()
            os.fsync(file.fileno())

    def read_rows(self, after_event: int = 0) -> list[Row]:
        """Those of later events, each once; a last line still being written is left for the next call."""
        try:
            content = self.rows.read_bytes()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1].splitlines()
        rows = {row.event: row for row in (Row(**json.loads(line)) for line in whole)}  # a full disk may cause repeats
        return [row for event, row in rows.items() if event > after_event]

    def write_outcome(self, outcome: TrackingOutcome) -> None:
        """Durable before it returns."""
        write_json(self.outcome, asdict(outcome))

    def read_outcome(self) -> TrackingOutcome | None:
        """None while there is none."""
        raw = read_json(self.outcome)
        return None if raw is None else TrackingOutcome(**raw)


def read_json(path: Path) -> dict[str, Any] | None:
    """None where there is no such file yet."""
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return values
