"""Events: the lines a user sees of a job. Appended in the transaction that makes them true; never changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, func, insert, select

from tunesmith.core.schema import events
from tunesmith.core.store import Store

Level = Literal["info", "warn", "error"]
Kind = Literal["message", "metrics"]


@dataclass(frozen=True, slots=True)
class Event:
    """One line."""

    id: int
    """Dense from 1 within a job: a reader that has seen n asks for what comes after n."""
    created_unix: int
    level: Level
    message: str
    data: Mapping[str, Any] | None = None
    """Numbers for machines, such as {"step": 10, "training_loss": 0.4}."""
    kind: Kind = "message"
    """Metrics come many times a job; the dialect of 2021-2023 leaves them out, as its service did not have them."""


class Events:
    """The events of all jobs."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def append(
        self,
        connection: Connection,
        job_id: str,
        level: Level,
        message: str,
        data: Mapping[str, Any] | None = None,
        kind: Kind = "message",
    ) -> None:
        """Add a line within a writing transaction; writers take turns, so ids stay dense."""
        last = connection.scalar(select(func.max(events.c.id)).where(events.c.job_id == job_id))
        connection.execute(
            insert(events).values(
                job_id=job_id,
                id=(last or 0) + 1,
                created_unix=int(self._store.clock()),
                level=level,
                message=message,
                data=None if data is None else dict(data),
                kind=kind,
            )
        )

    def list(self, job_id: str, after: int = 0) -> list[Event]:
        """The lines with `id > after`, in order."""
        query = select(events).where(events.c.job_id == job_id, events.c.id > after).order_by(events.c.id)
        with self._store.reading() as connection:
            return [
                Event(row.id, row.created_unix, row.level, row.message, row.data, row.kind)
                for row in connection.execute(query)
            ]
