"""`/v1/fine_tuning/jobs`, read only: the same jobs as `/v1/fine-tunes`, in the shape that clients of late 2023 read.

The published `openai wandb sync` of 0.28.1 asks here whatever its flags say, for ids of either kind.
"""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tunesmith.api.fine_tunes import hyperparams_to_wire
from tunesmith.api.pages import page
from tunesmith.api.routing import path_id
from tunesmith.core.accounts import Caller
from tunesmith.core.integrations import integration_to_wire
from tunesmith.core.jobs import Job, Jobs
from tunesmith.core.statuses import JobStatus

DEFAULT_PAGE = "20"
STATUSES = {JobStatus.PENDING: "queued"}
"""What the two dialects call differently."""


class FineTuningJobsApi:
    """The verbs of fine-tuning jobs."""

    def __init__(self, jobs: Jobs) -> None:
        self.jobs = jobs

    async def list(self, request: Request, caller: Caller) -> Response:
        """GET /v1/fine_tuning/jobs: newest first, 20 a page unless `limit` says otherwise."""
        jobs = await run_in_threadpool(self.jobs.list, caller)
        query = {"limit": DEFAULT_PAGE, "order": "desc"} | dict(request.query_params)
        return JSONResponse(page([job_to_wire(job) for job in jobs], query))

    async def get(self, request: Request, caller: Caller) -> Response:
        """GET /v1/fine_tuning/jobs/{id}."""
        return JSONResponse(job_to_wire(await run_in_threadpool(self.jobs.get, caller, path_id(request))))


def job_to_wire(job: Job) -> dict[str, Any]:
    """The fine_tuning.job object."""
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_unix,
        "finished_at": job.finished_unix,
        "estimated_finish": None,
        "model": job.model,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.organization_id,
        "status": STATUSES.get(job.status, job.status),
        "hyperparameters": {
            name: "auto" if value is None else value for name, value in hyperparams_to_wire(job).items()
        },
        "training_file": job.training_file.id,
        "validation_file": None if job.validation_file is None else job.validation_file.id,
        "result_files": [file.id for file in job.result_files],
        "trained_tokens": None,
        "seed": job.seed,
        "error": None if job.error is None else {"code": "job_failed", "message": job.error, "param": None},
        "integrations": [integration_to_wire(one) for one in job.asked.integrations],
    }
