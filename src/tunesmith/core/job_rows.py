"""A job as clients see it, and how it is read from its row and those of its files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, RowMapping, Select, select

from tunesmith.core.files import File, file_from_row
from tunesmith.core.integrations import integrations_from_json
from tunesmith.core.requests import FineTuneRequest
from tunesmith.core.schema import files, jobs
from tunesmith.core.statuses import JobStatus
from tunesmith.rundir import ResolvedHyperparameters, hyperparameters_from_json

_training, _validation, _result = (files.alias(name) for name in ("training", "validation", "result"))


@dataclass(frozen=True, slots=True)
class Job:
    """A fine-tune as clients see it."""

    id: str
    organization_id: str
    model: str
    """As asked."""
    base_name: str
    parent_name: str | None
    """The tuned model that training goes on from; None when it starts from the base."""
    status: JobStatus
    created_unix: int
    updated_unix: int
    fine_tuned_model: str | None
    """Set by success; kept when that model is deleted."""
    asked: FineTuneRequest
    hyperparameters: ResolvedHyperparameters | None
    """None until training has started."""
    training_file: File
    validation_file: File | None
    result_files: tuple[File, ...]
    error: str | None
    seed: int
    training_examples: int
    queue_number: int | None
    """How many pending jobs were before it when it was last told; None before it was, and once it has started."""
    paused: bool
    started_unix: int | None
    finished_unix: int | None
    trained_tokens: int | None
    """Over all epochs; None until the job has succeeded, and of jobs that ended before this was kept."""


def with_files(*conditions: ColumnElement[bool]) -> Select[Any]:
    """Jobs with their files, in the columns that `job_from_row` reads."""
    return (
        select(jobs, _training, _validation, _result)
        .join(_training, _training.c.id == jobs.c.training_file_id)
        .outerjoin(_validation, _validation.c.id == jobs.c.validation_file_id)
        .outerjoin(_result, _result.c.id == jobs.c.result_file_id)
        .where(*conditions)
    )


def job_from_row(row: RowMapping) -> Job:
    """The job of a row of `with_files`."""
    asked, resolved = dict(row[jobs.c.asked]), row[jobs.c.hyperparameters]
    if asked["classification_betas"] is not None:  # JSON has no tuples
        asked["classification_betas"] = tuple(asked["classification_betas"])
    if asked.get("lora_targets") is not None:
        asked["lora_targets"] = tuple(asked["lora_targets"])
    asked["integrations"] = integrations_from_json(asked.get("integrations", ()))
    if resolved is not None:
        resolved = hyperparameters_from_json(resolved)
    return Job(
        id=row[jobs.c.id],
        organization_id=row[jobs.c.organization_id],
        model=row[jobs.c.model],
        base_name=row[jobs.c.base_name],
        parent_name=row[jobs.c.parent_name],
        status=JobStatus(row[jobs.c.status]),
        created_unix=row[jobs.c.created_unix],
        updated_unix=row[jobs.c.updated_unix],
        fine_tuned_model=row[jobs.c.fine_tuned_model],
        asked=FineTuneRequest(**asked),
        hyperparameters=resolved,
        training_file=file_from_row(row, _training),
        validation_file=None if row[_validation.c.id] is None else file_from_row(row, _validation),
        result_files=() if row[_result.c.id] is None else (file_from_row(row, _result),),
        error=row[jobs.c.error],
        seed=row[jobs.c.seed],
        training_examples=row[jobs.c.training_examples],
        queue_number=row[jobs.c.queue_number] if row[jobs.c.status] == JobStatus.PENDING else None,
        paused=row[jobs.c.paused_unix] is not None,
        started_unix=row[jobs.c.started_unix],
        finished_unix=row[jobs.c.finished_unix],
        trained_tokens=row[jobs.c.trained_tokens],
    )
