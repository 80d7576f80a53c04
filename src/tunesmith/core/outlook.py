"""When waiting jobs are likely to start and running ones to end, told from jobs that ended. Estimates, no promises."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

from sqlalchemy import Connection, RowMapping, select

from tunesmith.core.queue import queue
from tunesmith.core.requests import DEFAULT_N_EPOCHS
from tunesmith.core.schema import jobs
from tunesmith.core.statuses import JobStatus

REMEMBERED = 50
"""Jobs that ended last and are judged by."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """Unix times; None where no job has ended yet that could tell."""

    starts_unix: int | None
    """None for a job that has started."""
    ends_unix: int | None


class Work(NamedTuple):
    """A job that has not ended, as far as its time goes."""

    job_id: str
    base_name: str
    examples: int
    """To be trained on, repeats included."""
    started_unix: int | None


def outlook(connection: Connection, *, now_unix: int, slots: int) -> dict[str, Outlook]:
    """Of every job that is pending or running, and not paused."""
    at_work = jobs.c.status == JobStatus.RUNNING, jobs.c.paused_unix.is_(None)
    running = [_work(row) for row in connection.execute(select(jobs).where(*at_work)).mappings()]
    order = [waiting.job_id for waiting in queue(connection)]
    pending = {
        row[jobs.c.id]: _work(row)
        for row in connection.execute(select(jobs).where(jobs.c.status == JobStatus.PENDING)).mappings()
    }
    return schedule(running, [pending[job_id] for job_id in order], _paces(connection), now_unix=now_unix, slots=slots)


def schedule(
    running: Sequence[Work], waiting: Sequence[Work], paces: Mapping[str | None, float], *, now_unix: int, slots: int
) -> dict[str, Outlook]:
    """`paces` are seconds an example by base, and by None for any base; `waiting` is in the order of the queue.

    A job whose end cannot be told leaves the starts of those behind it open too.
    """
    found: dict[str, Outlook] = {}
    free: list[float] = [float(now_unix)] * (slots - len(running))
    for work in running:
        pace = paces.get(work.base_name, paces.get(None))
        if pace is None:
            found[work.job_id] = Outlook(None, None)
            continue
        begun = now_unix if work.started_unix is None else work.started_unix
        end = max(float(now_unix), begun + pace * work.examples)
        found[work.job_id] = Outlook(None, round(end))
        free.append(end)
    heapq.heapify(free)
    for work in waiting:
        pace = paces.get(work.base_name, paces.get(None))
        if not free or pace is None:
            found[work.job_id] = Outlook(None, None)
            free = []
            continue
        start = heapq.heappop(free)
        heapq.heappush(free, start + pace * work.examples)
        found[work.job_id] = Outlook(round(start), round(start + pace * work.examples))
    return found


def _paces(connection: Connection) -> dict[str | None, float]:
    query = (
        select(jobs)
        .where(jobs.c.status == JobStatus.SUCCEEDED, jobs.c.started_unix.is_not(None))
        .order_by(jobs.c.finished_unix.desc())
        .limit(REMEMBERED)
    )
    seen: defaultdict[str | None, list[float]] = defaultdict(list)
    for row in connection.execute(query).mappings():
        work = _work(row)
        pace = (row[jobs.c.finished_unix] - row[jobs.c.started_unix]) / work.examples
        seen[work.base_name].append(pace)
        seen[None].append(pace)
    return {base_name: median(paces) for base_name, paces in seen.items()}


def _work(row: RowMapping) -> Work:
    known = row[jobs.c.hyperparameters] or row[jobs.c.asked]
    epochs = known["n_epochs"] or DEFAULT_N_EPOCHS
    return Work(row[jobs.c.id], row[jobs.c.base_name], row[jobs.c.training_examples] * epochs, row[jobs.c.started_unix])
