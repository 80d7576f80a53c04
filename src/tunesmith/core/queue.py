"""Whose turn it is: the order in which pending jobs start. Knows organisations and ages, no leases."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import NamedTuple

from sqlalchemy import Connection, select

from tunesmith.core.schema import jobs, organizations
from tunesmith.core.statuses import JobStatus


class Waiting(NamedTuple):
    """A pending job, as far as its place in the queue goes."""

    job_id: str
    organization_id: str
    position: int
    last_turn: int
    queue_number: int | None
    cost_usd: float


def queue(connection: Connection) -> list[Waiting]:
    """All pending jobs that are not paused, in the order in which they start."""
    query = (
        select(
            jobs.c.id,
            jobs.c.organization_id,
            jobs.c.position,
            organizations.c.last_turn,
            jobs.c.queue_number,
            jobs.c.cost_usd,
        )
        .join(organizations)
        .where(jobs.c.status == JobStatus.PENDING, jobs.c.paused_unix.is_(None))
    )
    return in_turn(Waiting(*row) for row in connection.execute(query))


def in_turn(waiting: Iterable[Waiting]) -> list[Waiting]:
    """The order in which pending jobs start: round by round, in each the oldest of every organisation.

    Within a round the organisation comes first whose last turn is longest ago; between such that never had one, the
    one that has waited longest.
    """
    by_organization: dict[str, list[Waiting]] = {}
    for job in sorted(waiting, key=lambda job: job.position):
        by_organization.setdefault(job.organization_id, []).append(job)
    turns = sorted(by_organization.values(), key=lambda jobs: (jobs[0].last_turn, jobs[0].position))
    return [job for round_ in zip_longest(*turns) for job in round_ if job is not None]
