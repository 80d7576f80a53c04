"""`/v1/fine-tunes`, the dialect of 2021-2023: parse, call `core.jobs` and `core.events`, render."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from typing import Any

import anyio
import anyio.to_thread
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tunesmith.api.body import Fields, read_json, whole_number
from tunesmith.api.files import file_to_wire
from tunesmith.api.pages import envelope
from tunesmith.api.routing import path_id
from tunesmith.api.sse import DONE, EventStream, frame
from tunesmith.core.accounts import Caller
from tunesmith.core.events import Event, Events
from tunesmith.core.integrations import Integration, check_kind, integration_to_wire
from tunesmith.core.jobs import MOVES, Job, Jobs
from tunesmith.core.models import Model
from tunesmith.core.requests import DEFAULT_MODEL, DEFAULT_N_EPOCHS, DEFAULT_PROMPT_LOSS_WEIGHT, FineTuneRequest
from tunesmith.core.statuses import ENDED
from tunesmith.errors import EngineUnavailable, InvalidRequest

OUR_OWN = ("seed", "method", "lora_targets", "best_epoch", "early_stopping_patience", "epoch_checkpoints")
"""Fields that the published API of 2021-2023 did not have."""
POLL_S = 0.2
"""Between two looks at the events of a job that is being followed."""

EventToWire = Callable[[Event], dict[str, Any] | None]


class FineTunesApi:
    """The verbs of fine-tunes."""

    def __init__(
        self,
        jobs: Jobs,
        events: Events,
        admitting: anyio.CapacityLimiter,
        *,
        heartbeat_s: float,
        is_stopping: Callable[[], bool],
    ) -> None:
        self.jobs = jobs
        self.events = events
        self.heartbeat_s = heartbeat_s
        self.is_stopping = is_stopping
        self._admitting = admitting

    async def create(self, request: Request, caller: Caller) -> Response:
        """POST /v1/fine-tunes."""
        asked = request_from_wire(await read_json(request))
        job = await anyio.to_thread.run_sync(self.jobs.create, caller, asked, limiter=self._admitting)
        return await self._with_events(job)

    async def list(self, _request: Request, caller: Caller) -> Response:
        """GET /v1/fine-tunes: all of them, oldest first, without their events."""
        jobs = await run_in_threadpool(self.jobs.list, caller)
        return JSONResponse(envelope([job_to_wire(job) for job in jobs]))

    async def get(self, request: Request, caller: Caller) -> Response:
        """GET /v1/fine-tunes/{id}."""
        return await self._with_events(await run_in_threadpool(self.jobs.get, caller, path_id(request)))

    async def cancel(self, request: Request, caller: Caller) -> Response:
        """POST /v1/fine-tunes/{id}/cancel. Clients send no body, or an empty form: none is read."""
        return await self._with_events(await run_in_threadpool(self.jobs.cancel, caller, path_id(request)))

    async def pause(self, request: Request, caller: Caller) -> Response:
        """POST /v1/fine-tunes/{id}/pause. Our own; no body is read."""
        return await self._with_events(await run_in_threadpool(self.jobs.pause, caller, path_id(request)))

    async def resume(self, request: Request, caller: Caller) -> Response:
        """POST /v1/fine-tunes/{id}/resume. Our own; no body is read."""
        return await self._with_events(await run_in_threadpool(self.jobs.resume, caller, path_id(request)))

    async def list_checkpoints(self, request: Request, caller: Caller) -> Response:
        """GET /v1/fine-tunes/{id}/checkpoints: epochs that became models of their own, newest first. Our own."""
        checkpoints = await run_in_threadpool(self.jobs.checkpoints, caller, path_id(request))
        return JSONResponse(envelope([checkpoint_to_wire(model) for model in checkpoints]))

    async def list_events(self, request: Request, caller: Caller) -> Response:
        """GET /v1/fine-tunes/{id}/events: those so far, or with `?stream=true` those to come as well.

        With our own `?metrics=true` the numbers of the steps are among them, and every event has its `type` and `data`.
        """
        job_id = path_id(request)
        stream = _flag(request, "stream")
        to_wire = whole_event_to_wire if _flag(request, "metrics") else event_to_wire
        await run_in_threadpool(self.jobs.get, caller, job_id)
        if stream:
            frames = self._follow(caller, job_id, to_wire, after=_last_event_id(request))
            return EventStream(frames, heartbeat_s=self.heartbeat_s)
        events = await run_in_threadpool(self.events.list, job_id)
        return JSONResponse(envelope(events_to_wire(events, to_wire)))

    async def _follow(
        self, caller: Caller, job_id: str, to_wire: EventToWire, after: int
    ) -> AsyncGenerator[bytes, None]:
        """Every event after `after`, in order and once; `[DONE]` when the job has ended and all are sent."""
        while True:
            # The status is read first: of a job that has ended, the events read after it are all there will be.
            job = await run_in_threadpool(self.jobs.get, caller, job_id)
            for event in await run_in_threadpool(self.events.list, job_id, after):
                if (value := to_wire(event)) is not None:
                    yield frame(value, event_id=event.id)
                after = event.id
            if not MOVES[job.status]:
                yield DONE
                return
            if self.is_stopping():
                # Clients take this for a broken stream and tell how to resume it, which [DONE] would not.
                raise EngineUnavailable("The server is shutting down. The job goes on when it is started again.")
            await asyncio.sleep(POLL_S)

    async def _with_events(self, job: Job) -> Response:
        events = await run_in_threadpool(self.events.list, job.id)
        outlook = {} if job.status in ENDED else await run_in_threadpool(self._outlook, job)
        return JSONResponse({**job_to_wire(job), **outlook, "events": events_to_wire(events)})

    def _outlook(self, job: Job) -> dict[str, Any]:
        """Where a job stands in the queue, and when it is likely to start and end: what is known of it."""
        if job.paused:
            return {"paused": True}
        outlook = self.jobs.outlook(job)
        values = {
            "queue_number": job.queue_number,
            "estimated_start": outlook.starts_unix,
            "estimated_finish": outlook.ends_unix,
        }
        return {name: value for name, value in values.items() if value is not None}


def request_from_wire(fields: Fields) -> FineTuneRequest:
    """The fields of POST /v1/fine-tunes by kind; whether their values go together, `Jobs.create` says."""
    hyperparameters = fields.nested("hyperparameters").without("auto")  # as the clients of late 2023 send it
    nested_epochs = hyperparameters.integer("n_epochs")
    hyperparameters.done()
    n_epochs = fields.integer("n_epochs")
    fields.take("use_packing")  # sent by the 2021 clients; it changes how fast training goes, not what it learns
    request = FineTuneRequest(
        training_file=fields.required_text("training_file"),
        validation_file=fields.text("validation_file"),
        model=fields.text("model") or DEFAULT_MODEL,
        suffix=fields.text("suffix"),
        n_epochs=nested_epochs if n_epochs is None else n_epochs,
        batch_size=fields.integer("batch_size"),
        learning_rate_multiplier=fields.number("learning_rate_multiplier"),
        prompt_loss_weight=fields.number("prompt_loss_weight"),
        compute_classification_metrics=fields.flag("compute_classification_metrics") or False,
        classification_n_classes=fields.integer("classification_n_classes"),
        classification_positive_class=fields.text("classification_positive_class"),
        classification_betas=fields.numbers("classification_betas"),
        seed=fields.integer("seed"),
        lora_rank=fields.integer("lora_rank"),
        lora_alpha=fields.number("lora_alpha"),
        lora_targets=fields.texts("lora_targets"),
        method=fields.text("method"),
        best_epoch=fields.flag("best_epoch") or False,
        early_stopping_patience=fields.integer("early_stopping_patience"),
        epoch_checkpoints=fields.integer("epoch_checkpoints"),
        alias=fields.text("alias"),
        integrations=tuple(integration_from_wire(one) for one in fields.each("integrations")),
    )
    fields.done()
    return request


def job_to_wire(job: Job) -> dict[str, Any]:
    """The fine-tune object without its events. Every key is there from the start: the old clients index blindly.

    Our own `integrations` and `alias` are there only where they were asked for.
    """
    integrations = [integration_to_wire(integration) for integration in job.asked.integrations]
    ours = {"integrations": integrations, "alias": job.asked.alias}
    return {
        "id": job.id,
        "object": "fine-tune",
        "model": job.model,
        "created_at": job.created_unix,
        "updated_at": job.updated_unix,
        "status": job.status,
        "fine_tuned_model": job.fine_tuned_model,
        "organization_id": job.organization_id,
        "hyperparams": hyperparams_to_wire(job),
        "training_files": [file_to_wire(job.training_file)],
        "validation_files": [] if job.validation_file is None else [file_to_wire(job.validation_file)],
        "result_files": [file_to_wire(file) for file in job.result_files],
    } | {name: value for name, value in ours.items() if value}


def event_to_wire(event: Event) -> dict[str, Any] | None:
    """The fine-tune-event object. None for numbers: the service of 2021-2023 had messages alone."""
    return _event(event) if event.kind == "message" else None


def whole_event_to_wire(event: Event) -> dict[str, Any]:
    """The fine-tune-event object of any event, with what the service of late 2023 tells besides."""
    return {**_event(event), "type": event.kind, "data": event.data}


def events_to_wire(events: Iterable[Event], to_wire: EventToWire = event_to_wire) -> list[dict[str, Any]]:
    """Those that `to_wire` has a shape for."""
    return [value for event in events if (value := to_wire(event)) is not None]


def _event(event: Event) -> dict[str, Any]:
    return {
        "object": "fine-tune-event",
        "created_at": event.created_unix,
        "level": event.level,
        "message": event.message,
    }


def checkpoint_to_wire(model: Model) -> dict[str, Any]:
    """The model of an epoch, with the numbers of the step that ended it."""
    return {
        "object": "fine-tune-checkpoint",
        "created_at": model.created_unix,
        "model": model.name,
        "step_number": model.step,
        "metrics": model.metrics,
    }


def hyperparams_to_wire(job: Job) -> dict[str, Any]:
    """As asked until the job starts, defaults that depend on the data being null; then as resolved.

    The classification keys are there only for a job that asked for the metrics, and our own only where they were asked.
    """
    asked, resolved = job.asked, job.hyperparameters
    values: dict[str, Any]
    if resolved is not None:
        values = {
            "n_epochs": resolved.n_epochs,
            "batch_size": resolved.batch_size,
            "prompt_loss_weight": resolved.prompt_loss_weight,
            "learning_rate_multiplier": resolved.learning_rate_multiplier,
        }
    else:
        values = {
            "n_epochs": DEFAULT_N_EPOCHS if asked.n_epochs is None else asked.n_epochs,
            "batch_size": asked.batch_size,
            "prompt_loss_weight": (
                DEFAULT_PROMPT_LOSS_WEIGHT if asked.prompt_loss_weight is None else asked.prompt_loss_weight
            ),
            "learning_rate_multiplier": asked.learning_rate_multiplier,
        }
    if asked.compute_classification_metrics:
        values["compute_classification_metrics"] = True
        given = {
            "classification_n_classes": asked.n_classes,
            "classification_positive_class": asked.classification_positive_class,
            "classification_betas": asked.classification_betas,
        }
        values |= {name: value for name, value in given.items() if value is not None}
    if asked.lora_rank is not None or asked.lora_alpha is not None:
        values |= {name: getattr(resolved or asked, name) for name in ("lora_rank", "lora_alpha")}
    ours = {name: getattr(asked, name) for name in OUR_OWN}
    return values | {name: value for name, value in ours.items() if value is not None and value is not False}


def integration_from_wire(fields: Fields) -> Integration:
    """One entry of `integrations`, in the shape of the API of today."""
    kind = fields.required_text("type")
    check_kind(kind, fields.path("type"))
    details = fields.nested(kind)
    integration = Integration(
        kind=kind,
        project=details.required_text("project"),
        name=details.text("name"),
        entity=details.text("entity"),
        tags=details.texts("tags") or (),
    )
    details.done()
    fields.done()
    return integration


def _flag(request: Request, name: str) -> bool:
    text = request.query_params.get(name, "false").lower()
    if text not in ("true", "false"):
        raise InvalidRequest(f"'{name}' must be true or false; it is {text!r}.", param=name)
    return text == "true"


def _last_event_id(request: Request) -> int:
    """Where a broken stream is to go on; 0 for one from the start, and for what is no id of ours."""
    return whole_number(request.headers.get("last-event-id", "")) or 0
