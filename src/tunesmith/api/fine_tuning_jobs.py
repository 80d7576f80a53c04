"""`/v1/fine_tuning/jobs`, the dialect since late 2023: the jobs of `/v1/fine-tunes`, asked for and shown in its shape.

Jobs of either dialect are found under both. Those asked for here have ids that begin with `ftjob-`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import anyio
import anyio.to_thread
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tunesmith.api.body import Fields, read_json
from tunesmith.api.fine_tunes import hyperparams_to_wire, integration_from_wire
from tunesmith.api.pages import page
from tunesmith.api.routing import path_id
from tunesmith.core.accounts import Caller
from tunesmith.core.events import Event, Events
from tunesmith.core.integrations import integration_to_wire
from tunesmith.core.jobs import Job, Jobs
from tunesmith.core.models import Model
from tunesmith.core.requests import FineTuneRequest
from tunesmith.core.statuses import ENDED, JobStatus
from tunesmith.errors import InvalidRequest

DEFAULT_PAGE = "20"
DEFAULT_CHECKPOINTS = "10"
AUTO = "auto"
"""What clients send for a hyperparameter whose default counts."""
SUPERVISED = "supervised"
EPOCH_CHECKPOINTS = 3
"""So many of the last epochs become models of their own. Source: the published API's guide."""
STATUSES = {JobStatus.PENDING: "queued"}
"""What the two dialects call differently. This one has no word for a job that rests: it is queued."""
METRICS = {
    "training_loss": "train_loss",
    "training_token_accuracy": "train_mean_token_accuracy",
    "validation_loss": "valid_loss",
    "validation_token_accuracy": "valid_mean_token_accuracy",
    "full_validation_loss": "full_valid_loss",
    "full_validation_token_accuracy": "full_valid_mean_token_accuracy",
}
"""Ours -> the dialect's."""
MESSAGES = (
    (r"Created fine-tune: (.+)", r"Created fine-tuning job: \1"),
    (r"Fine-tune enqueued\. Queue number: \d+", "Files validated, moving job to queued state"),
    (r"Fine-tune is in the queue\. (.+)", r"The job is in the queue. \1"),
    (r"Fine-tune costs (.+)", r"The job costs \1"),
    (r"Fine-tune started", "Fine-tuning job started"),
    (r"Uploaded model: (.+)", r"New fine-tuned model created: \1"),
    (r"Fine-tune succeeded", "The job has successfully completed"),
    (r"Fine-tune (cancelled|paused|resumed)", r"The job has been \1"),
    (r"Fine-tune failed\. (.+)", r"The job failed. \1"),
)
"""Events are kept in the words of 2021-2023; these have others in this dialect."""

_METADATA = re.compile(r"metadata\[(.+)\]")


class FineTuningJobsApi:
    """The verbs of fine-tuning jobs."""

    def __init__(self, jobs: Jobs, events: Events, admitting: anyio.CapacityLimiter) -> None:
        self.jobs = jobs
        self.events = events
        self._admitting = admitting

    async def create(self, request: Request, caller: Caller) -> Response:
        """POST /v1/fine_tuning/jobs."""
        asked = request_from_wire(await read_json(request))
        return await self._shown(
            await anyio.to_thread.run_sync(self.jobs.create, caller, asked, limiter=self._admitting)
        )

    async def list(self, request: Request, caller: Caller) -> Response:
        """GET /v1/fine_tuning/jobs: newest first, 20 a page unless `limit` says otherwise.

        Only those that have the pairs that `metadata[key]=value` asks for.
        """
        wanted = {
            found[1]: value for name, value in request.query_params.items() if (found := _METADATA.fullmatch(name))
        }
        jobs = await run_in_threadpool(self.jobs.list, caller)
        shown = [job_to_wire(job) for job in jobs if wanted.items() <= job.asked.metadata.items()]
        return JSONResponse(_newest_first(shown, request, DEFAULT_PAGE))

    async def get(self, request: Request, caller: Caller) -> Response:
        """GET /v1/fine_tuning/jobs/{id}."""
        return await self._change(self.jobs.get, request, caller)

    async def cancel(self, request: Request, caller: Caller) -> Response:
        """POST /v1/fine_tuning/jobs/{id}/cancel; no body is read."""
        return await self._change(self.jobs.cancel, request, caller)

    async def pause(self, request: Request, caller: Caller) -> Response:
        """POST /v1/fine_tuning/jobs/{id}/pause; no body is read."""
        return await self._change(self.jobs.pause, request, caller)

    async def resume(self, request: Request, caller: Caller) -> Response:
        """POST /v1/fine_tuning/jobs/{id}/resume; no body is read."""
        return await self._change(self.jobs.resume, request, caller)

    async def list_events(self, request: Request, caller: Caller) -> Response:
        """GET /v1/fine_tuning/jobs/{id}/events: newest first, in pages; the numbers of the steps are among them."""
        job = await run_in_threadpool(self.jobs.get, caller, path_id(request))
        events = await run_in_threadpool(self.events.list, job.id)
        return JSONResponse(_newest_first([event_to_wire(job.id, event) for event in events], request, DEFAULT_PAGE))

    async def list_checkpoints(self, request: Request, caller: Caller) -> Response:
        """GET /v1/fine_tuning/jobs/{id}/checkpoints: epochs that became models of their own, newest first."""
        job_id = path_id(request)
        newest_first = await run_in_threadpool(self.jobs.checkpoints, caller, job_id)
        shown = [checkpoint_to_wire(job_id, model) for model in reversed(newest_first)]
        return JSONResponse(_newest_first(shown, request, DEFAULT_CHECKPOINTS))

    async def _change(self, change: Callable[[Caller, str], Job], request: Request, caller: Caller) -> Response:
        return await self._shown(await run_in_threadpool(change, caller, path_id(request)))

    async def _shown(self, job: Job) -> Response:
        ends = None if job.status in ENDED else (await run_in_threadpool(self.jobs.outlook, job)).ends_unix
        return JSONResponse({**job_to_wire(job), "estimated_finish": ends})


def request_from_wire(fields: Fields) -> FineTuneRequest:
    """The fields of POST /v1/fine_tuning/jobs by kind; whether their values go together, `Jobs.create` says.

    What `method` says counts before the `hyperparameters` that it replaced.
    """
    method = fields.nested("method")
    kind = method.text("type") or SUPERVISED
    if kind != SUPERVISED:
        raise InvalidRequest(
            f"'{method.path('type')}' must be {SUPERVISED}; {kind[:40]!r} is a way to train that is not here.",
            param=method.path("type"),
        )
    details = method.nested(SUPERVISED)
    given = _hyperparameters(fields.nested("hyperparameters")) | _hyperparameters(details.nested("hyperparameters"))
    details.done()
    method.done()
    request = FineTuneRequest(
        modern=True,
        model=fields.required_text("model"),
        training_file=fields.required_text("training_file"),
        validation_file=fields.text("validation_file"),
        suffix=fields.text("suffix"),
        seed=fields.integer("seed"),
        epoch_checkpoints=EPOCH_CHECKPOINTS,
        metadata=fields.strings("metadata"),
        integrations=tuple(integration_from_wire(one) for one in fields.each("integrations")),
        **given,
    )
    fields.done()
    return request


def job_to_wire(job: Job) -> dict[str, Any]:
    """The fine_tuning.job object."""
    hyperparameters = {name: AUTO if value is None else value for name, value in hyperparams_to_wire(job).items()}
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_unix,
        "finished_at": job.finished_unix,
        "estimated_finish": None,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.organization_id,
        "status": "queued" if job.paused else STATUSES.get(job.status, job.status),
        "hyperparameters": hyperparameters,
        "method": {"type": SUPERVISED, SUPERVISED: {"hyperparameters": hyperparameters}},
        "training_file": job.training_file.id,
        "validation_file": None if job.validation_file is None else job.validation_file.id,
        "result_files": [file.id for file in job.result_files],
        "trained_tokens": job.trained_tokens,
        "seed": job.seed,
        "error": None if job.error is None else {"code": "job_failed", "message": job.error, "param": None},
        "integrations": [integration_to_wire(one) for one in job.asked.integrations],
        "user_provided_suffix": job.asked.suffix,
        "metadata": job.asked.metadata or None,
    }


def event_to_wire(job_id: str, event: Event) -> dict[str, Any]:
    """The fine_tuning.job.event object."""
    return {
        "id": f"ftevent-{job_id.partition('-')[2]}-{event.id}",
        "object": "fine_tuning.job.event",
        "created_at": event.created_unix,
        "level": event.level,
        "message": _reworded(event.message),
        "type": event.kind,
        "data": event.data or {},
    }


def checkpoint_to_wire(job_id: str, model: Model) -> dict[str, Any]:
    """The fine_tuning.job.checkpoint object: the model of an epoch, with the numbers of the step that ended it."""
    return {
        "id": f"ftckpt-{job_id.partition('-')[2]}-{model.step}",
        "object": "fine_tuning.job.checkpoint",
        "created_at": model.created_unix,
        "fine_tuned_model_checkpoint": model.name,
        "fine_tuning_job_id": job_id,
        "step_number": model.step,
        "metrics": {"step": model.step}
        | {METRICS[name]: value for name, value in (model.metrics or {}).items() if name in METRICS},
    }


def _hyperparameters(fields: Fields) -> dict[str, Any]:
    """Those that were given a value of their own."""
    given = fields.without(AUTO)
    values = {
        "n_epochs": given.integer("n_epochs"),
        "batch_size": given.integer("batch_size"),
        "learning_rate_multiplier": given.number("learning_rate_multiplier"),
    }
    given.done()
    return {name: value for name, value in values.items() if value is not None}


def _reworded(message: str) -> str:
    for old, new in MESSAGES:
        if found := re.fullmatch(old, message, re.DOTALL):
            return found.expand(new)
    return message


def _newest_first(oldest_first: list[dict[str, Any]], request: Request, limit: str) -> dict[str, Any]:
    query: Mapping[str, str] = {"limit": limit, "order": "desc"} | dict(request.query_params)
    return page(oldest_first, query)
