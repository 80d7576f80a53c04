"""Aliases: names from elsewhere that answer with the model of a job here. Knows names and jobs; resolves no model.

An alias belongs to an organisation and points to a job, not to a model: so it can be taken before the job has trained
anything, and answers from the moment the job has succeeded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Row, Select, delete, insert, select

from tunesmith.core.schema import aliases, jobs, organizations
from tunesmith.core.statuses import JobStatus
from tunesmith.errors import InvalidRequest, NotFound


@dataclass(frozen=True, slots=True)
class Alias:
    """A name and the job whose model it means."""

    name: str
    organization_id: str
    owned_by: str
    """The organisation's slug."""
    job_id: str
    job_status: JobStatus
    base_name: str
    """Of the job."""
    model_name: str | None
    """What answers; None until the job has succeeded. May have been deleted since."""
    created_unix: int

    @property
    def note(self) -> str:
        """One line for people."""
        if self.model_name is not None:
            return f"another name of {self.model_name}"
        return f"a name kept for the model of fine-tune {self.job_id}, which is {self.job_status}"

    def not_yet(self) -> NotFound:
        """The error for who calls it before there is a model."""
        if self.job_status in (JobStatus.FAILED, JobStatus.CANCELLED):
            then = "Start that fine-tune again under the same alias."
        else:
            then = "It answers as soon as that fine-tune has succeeded."
        return NotFound(
            f"The model `{self.name}` does not exist yet: it is {self.note}. {then}",
            param="model",
            code="model_not_found",
        )


def find_alias(connection: Connection, organization_id: str, name: str) -> Alias | None:
    """None for a name that is no alias of the organisation."""
    row = connection.execute(_of(organization_id).where(aliases.c.name == name)).one_or_none()
    return None if row is None else _alias(row)


def list_aliases(connection: Connection, organization_id: str) -> Iterator[Alias]:
    """The organisation's, oldest first."""
    for row in connection.execute(_of(organization_id).order_by(aliases.c.created_unix, aliases.c.name)):
        yield _alias(row)


def take_alias(connection: Connection, organization_id: str, name: str, job_id: str, now_unix: int) -> None:
    """Let `name` mean the model of a job, within a writing transaction.

    A name whose job has ended without a model may be taken over. Raises InvalidRequest for any other that is taken.
    """
    taken = find_alias(connection, organization_id, name)
    if taken is not None and taken.job_status not in (JobStatus.FAILED, JobStatus.CANCELLED):
        raise InvalidRequest(
            f"alias {name!r} is taken: it is {taken.note}. Delete it first (DELETE /v1/models/...), or choose another.",
            param="alias",
        )
    drop_alias(connection, organization_id, name)
    values = {"organization_id": organization_id, "name": name, "job_id": job_id, "created_unix": now_unix}
    connection.execute(insert(aliases).values(values))


def drop_alias(connection: Connection, organization_id: str, name: str) -> None:
    """Forget a name; the model that it meant stays."""
    connection.execute(delete(aliases).where(aliases.c.organization_id == organization_id, aliases.c.name == name))


def _of(organization_id: str) -> Select[Any]:
    return (
        select(aliases, jobs.c.status, jobs.c.base_name, jobs.c.fine_tuned_model, organizations.c.slug)
        .join(jobs, jobs.c.id == aliases.c.job_id)
        .join(organizations, organizations.c.id == aliases.c.organization_id)
        .where(aliases.c.organization_id == organization_id)
    )


def _alias(row: Row[Any]) -> Alias:
    return Alias(
        name=row.name,
        organization_id=row.organization_id,
        owned_by=row.slug,
        job_id=row.job_id,
        job_status=JobStatus(row.status),
        base_name=row.base_name,
        model_name=row.fine_tuned_model,
        created_unix=row.created_unix,
    )
