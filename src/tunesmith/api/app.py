"""The app: the route table on one page, and the layers every request goes through.

It owns nothing with a life of its own: store, engine and dispatcher are begun and ended by `server.py`, which hands
them over as `Services`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import BaseRoute, Route

from tunesmith.api.chat import ChatApi
from tunesmith.api.completions import CompletionsApi
from tunesmith.api.engines import EnginesApi
from tunesmith.api.errors import EXCEPTION_HANDLERS
from tunesmith.api.files import FilesApi
from tunesmith.api.fine_tunes import FineTunesApi
from tunesmith.api.fine_tuning_jobs import FineTuningJobsApi
from tunesmith.api.health import Check, HealthApi
from tunesmith.api.models import ModelsApi
from tunesmith.api.organization import OrganizationApi
from tunesmith.api.routing import Keyed
from tunesmith.api.transport import LastResort, RegularPath, Stamp
from tunesmith.core.accounts import Accounts
from tunesmith.core.events import Events
from tunesmith.core.files import Files
from tunesmith.core.jobs import Jobs
from tunesmith.core.models import Models
from tunesmith.core.store import Clock, NewId
from tunesmith.serving.completer import Completer
from tunesmith.serving.weights import Weights

CONCURRENT_ADMISSIONS = 4
"""Requests for jobs being checked at once; the others wait. Each reads whole files in a thread, and must not take all
threads."""

Api = TypeVar("Api")


@dataclass(frozen=True, slots=True)
class Services:
    """What the endpoints call, and the few values they need."""

    accounts: Accounts
    files: Files
    models: Models
    jobs: Jobs
    events: Events
    completer: Completer
    weights: Weights
    clock: Clock
    new_id: NewId
    spool: Path
    """Folder for uploads on their way in, on the disk where they end."""
    max_upload_bytes: int
    heartbeat_s: float
    checks: Mapping[str, Check]
    """What `/readyz` asks, by the name of the part."""
    is_stopping: Callable[[], bool]
    """True from the moment the server is asked to end: streams without an end in sight then end."""


def create_app(services: Services) -> Starlette:
    """The ASGI app. Layers from the outside in: regular path, id and headers, last resort, error shape, routes."""
    return Starlette(
        routes=routes(services),
        middleware=[
            Middleware(RegularPath),
            Middleware(Stamp, new_id=services.new_id),
            Middleware(LastResort, unread_limit_bytes=services.max_upload_bytes),
        ],
        exception_handlers=EXCEPTION_HANDLERS,
    )


def routes(services: Services) -> list[BaseRoute]:
    """Every URL. Ids are matched percent-encoded, so `{id}` is one segment whatever is in it."""
    at = Keyed(services.accounts).at
    health = HealthApi(services.checks)
    organization = OrganizationApi(services.accounts)
    files = FilesApi(services.files, max_upload_bytes=services.max_upload_bytes, spool=services.spool)
    models = ModelsApi(
        services.models,
        services.completer,
        services.weights,
        max_upload_bytes=services.max_upload_bytes,
        spool=services.spool,
    )
    completions, chat = _answering(CompletionsApi, services), _answering(ChatApi, services)
    engines = _answering(EnginesApi, services)
    admitting = anyio.CapacityLimiter(CONCURRENT_ADMISSIONS)
    fine_tunes = FineTunesApi(
        services.jobs, services.events, admitting, heartbeat_s=services.heartbeat_s, is_stopping=services.is_stopping
    )
    fine_tuning_jobs = FineTuningJobsApi(services.jobs, services.events, admitting)
    return [
        Route("/healthz", health.alive),
        Route("/readyz", health.ready),
        at("/v1/organization", GET=organization.get),
        at("/v1/organization/keys", GET=organization.list_keys, POST=organization.create_key),
        at("/v1/organization/keys/{id}", DELETE=organization.delete_key),
        at("/v1/files", GET=files.list, POST=files.create),
        at("/v1/files/{id}", GET=files.get, DELETE=files.delete),
        at("/v1/files/{id}/content", GET=files.content),
        at("/v1/fine-tunes", GET=fine_tunes.list, POST=fine_tunes.create),
        at("/v1/fine-tunes/{id}", GET=fine_tunes.get),
        at("/v1/fine-tunes/{id}/cancel", POST=fine_tunes.cancel),
        at("/v1/fine-tunes/{id}/pause", POST=fine_tunes.pause),
        at("/v1/fine-tunes/{id}/resume", POST=fine_tunes.resume),
        at("/v1/fine-tunes/{id}/events", GET=fine_tunes.list_events),
        at("/v1/fine-tunes/{id}/checkpoints", GET=fine_tunes.list_checkpoints),
        at("/v1/fine_tuning/jobs", GET=fine_tuning_jobs.list, POST=fine_tuning_jobs.create),
        at("/v1/fine_tuning/jobs/{id}", GET=fine_tuning_jobs.get),
        at("/v1/fine_tuning/jobs/{id}/cancel", POST=fine_tuning_jobs.cancel),
        at("/v1/fine_tuning/jobs/{id}/pause", POST=fine_tuning_jobs.pause),
        at("/v1/fine_tuning/jobs/{id}/resume", POST=fine_tuning_jobs.resume),
        at("/v1/fine_tuning/jobs/{id}/events", GET=fine_tuning_jobs.list_events),
        at("/v1/fine_tuning/jobs/{id}/checkpoints", GET=fine_tuning_jobs.list_checkpoints),
        at("/v1/models", GET=models.list, POST=models.create),
        at("/v1/models/{id}", GET=models.get, DELETE=models.delete),
        at("/v1/models/{id}/weights", GET=models.download),
        at("/v1/engines", GET=engines.list),
        at("/v1/engines/{id}", GET=engines.get, POST=engines.update),
        at("/v1/engines/{id}/generate", POST=engines.generate),
        at("/v1/engines/{id}/completions", POST=completions.create_for_engine),
        at("/v1/completions", POST=completions.create),
        at("/v1/engines/{id}/chat/completions", POST=chat.create_for_engine),
        at("/v1/chat/completions", POST=chat.create),
    ]


def _answering(api: Callable[..., Api], services: Services) -> Api:
    """The verbs that a model answers."""
    return api(
        services.completer,
        services.models,
        clock=services.clock,
        new_id=services.new_id,
        heartbeat_s=services.heartbeat_s,
    )
