"""Trackings: how far the trackers are that follow jobs. Knows rows and moves; starts and watches nothing.

A tracker is a guest: whatever happens to it is written here and told in the job's events, and the job goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sqlalchemy import Connection, insert, select, update

from tunesmith.core.events import Events, Level
from tunesmith.core.schema import trackings
from tunesmith.core.store import Store

Status = Literal["waiting", "following", "ended", "given up"]
"""Not begun, or begun and not yet sure to work; at work; the tracker has everything; it never will have."""
OPEN: tuple[Status, ...] = ("waiting", "following")


@dataclass(frozen=True, slots=True)
class Tracking:
    """One integration of one job."""

    job_id: str
    number: int
    """Its place among the job's integrations."""
    status: Status
    failures: int
    """How often its tracker ended without having done its work."""


def insert_trackings(connection: Connection, job_id: str, count: int) -> None:
    """Have a new job followed by so many trackers, within a writing transaction."""
    for number in range(count):
        connection.execute(insert(trackings).values(job_id=job_id, number=number, status="waiting", failures=0))


class Trackings:
    """The trackings of all jobs."""

    def __init__(self, store: Store, events: Events) -> None:
        self._store = store
        self._events = events

    def open(self) -> list[Tracking]:
        """Those that somebody has to look after."""
        query = select(trackings).where(trackings.c.status.in_(OPEN)).order_by(trackings.c.job_id, trackings.c.number)
        with self._store.reading() as connection:
            return [Tracking(row.job_id, row.number, row.status, row.failures) for row in connection.execute(query)]

    def move(
        self,
        tracking: Tracking,
        status: Status,
        *,
        message: str | None = None,
        level: Level = "info",
        failed: bool = False,
    ) -> None:
        """Note a new status, and tell the user of it, both or neither. `failed` counts one more failure."""
        with self._store.transaction() as connection:
            connection.execute(
                update(trackings)
                .where(trackings.c.job_id == tracking.job_id, trackings.c.number == tracking.number)
                .values(status=status, failures=tracking.failures + failed)
            )
            if message is not None:
                self._events.append(connection, tracking.job_id, level, message)
