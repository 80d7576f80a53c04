"""`/v1/models` and its old alias `/v1/engines`: parse, call `core.models`, render."""

from __future__ import annotations

import hashlib
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tunesmith.api.pages import envelope
from tunesmith.api.routing import path_id
from tunesmith.core.accounts import Caller
from tunesmith.core.models import Model, Models


class ModelsApi:
    """The verbs of models, and those of engines."""

    def __init__(self, models: Models) -> None:
        self.models = models

    async def list(self, _request: Request, caller: Caller) -> Response:
        """GET /v1/models: bases and the organisation's own."""
        models = await run_in_threadpool(self.models.list, caller)
        return JSONResponse(envelope([model_to_wire(model) for model in models]))

    async def get(self, request: Request, caller: Caller) -> Response:
        """GET /v1/models/{id}."""
        return JSONResponse(model_to_wire(await run_in_threadpool(self.models.get, caller, path_id(request))))

    async def delete(self, request: Request, caller: Caller) -> Response:
        """DELETE /v1/models/{id}."""
        name = path_id(request)
        await run_in_threadpool(self.models.delete, caller, name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    async def list_engines(self, _request: Request, caller: Caller) -> Response:
        """GET /v1/engines: the same models, as they were called before 2022."""
        models = await run_in_threadpool(self.models.list, caller)
        return JSONResponse(envelope([engine_to_wire(model) for model in models]))

    async def get_engine(self, request: Request, caller: Caller) -> Response:
        """GET /v1/engines/{id}."""
        return JSONResponse(engine_to_wire(await run_in_threadpool(self.models.get, caller, path_id(request))))


def model_to_wire(model: Model) -> dict[str, Any]:
    """The model object of the days of fine-tunes, with `permission`, `root` and `parent`; `description` is our own."""
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_unix,
        "owned_by": model.owned_by,
        "permission": [_permission(model)],
        "root": model.base_name,
        "parent": model.parent_name,
        "description": model.note,
    }


def _permission(model: Model) -> dict[str, Any]:
    return {
        # The same at every call without being kept: it names nothing that could be asked for.
        "id": "modelperm-" + hashlib.sha256(model.name.encode()).hexdigest()[:24],
        "object": "model_permission",
        "created": model.created_unix,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": True,
        "organization": model.organization_id or "*",
        "group": None,
        "is_blocking": False,
    }


def engine_to_wire(model: Model) -> dict[str, Any]:
    """The engine object."""
    return {
        "id": model.name,
        "object": "engine",
        "owner": model.owned_by,
        "ready": True,
        "created": None,
        "permissions": None,
    }
