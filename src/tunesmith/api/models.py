"""`/v1/models`: parse, call `core.models` or `serving.weights`, render."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args
from urllib.parse import quote

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from tunesmith.api.multipart import receive_upload
from tunesmith.api.pages import envelope
from tunesmith.api.routing import path_id
from tunesmith.core.accounts import Caller
from tunesmith.core.aliases import Alias
from tunesmith.core.blobs import READ_CHUNK_BYTES
from tunesmith.core.models import Model, Models
from tunesmith.core.names import slug
from tunesmith.errors import InvalidRequest, TunesmithError
from tunesmith.serving.completer import Completer
from tunesmith.serving.residency import State
from tunesmith.serving.weights import Exported, Form, Kind, Precision, Weights

CHECKED_HEADER = "tunesmith-checked"
"""Says what the numbers in a file of weights were held against."""


class ModelsApi:
    """The verbs of models."""

    def __init__(
        self, models: Models, completer: Completer, weights: Weights, *, max_upload_bytes: int, spool: Path
    ) -> None:
        self.models = models
        self.completer = completer
        self.weights = weights
        self.max_upload_bytes = max_upload_bytes
        self.spool = spool

    async def list(self, _request: Request, caller: Caller) -> Response:
        """GET /v1/models: bases and the organisation's own."""
        models = await run_in_threadpool(self.models.list, caller)
        return JSONResponse(envelope([model_to_wire(model) for model in models]))

    async def get(self, request: Request, caller: Caller) -> Response:
        """GET /v1/models/{id}: with `state`, whether it can answer at once."""
        model = await run_in_threadpool(self.models.get, caller, path_id(request))
        return JSONResponse(model_to_wire(model) | {"state": await self._state(caller, model.name)})

    async def _state(self, caller: Caller, name: str) -> State | None:
        try:
            return self.completer.state(await run_in_threadpool(self.models.resolve, caller, name))
        except (TunesmithError, ValueError):  # what is wrong with it, those hear who use it
            return None

    async def delete(self, request: Request, caller: Caller) -> Response:
        """DELETE /v1/models/{id}."""
        name = path_id(request)
        await run_in_threadpool(self.models.delete, caller, name)
        return JSONResponse({"id": name, "object": "model", "deleted": True})

    async def create(self, request: Request, caller: Caller) -> Response:
        """POST /v1/models, multipart: `file`, a zip of an adapter or a checkpoint; `model`, its base; `suffix`."""
        async with receive_upload(
            request, file_field="file", max_file_bytes=self.max_upload_bytes, folder=self.spool
        ) as upload:
            base_name, suffix = upload.fields.pop("model", None), upload.fields.pop("suffix", None)
            if upload.fields:
                name = next(iter(upload.fields))
                raise InvalidRequest(
                    f"Unrecognized request argument supplied: {name}. The parts of this form are file, model, suffix.",
                    param=name,
                )
            if not base_name:
                raise InvalidRequest("The form has no part 'model': the base that the weights are for.", param="model")
            model = await self.weights.imported(caller, upload.content, base_name, suffix)
        return JSONResponse(model_to_wire(model))

    async def download(self, request: Request, caller: Caller) -> Response:
        """GET /v1/models/{id}/weights: a zip, or with `format=gguf` a GGUF file of the `precision` asked for."""
        form = _form(request.query_params)
        ref = await run_in_threadpool(self.models.resolve, caller, path_id(request))
        suffix = "gguf" if form.kind == "gguf" else "zip"
        return _Package(self.weights.exported(ref, form), f"{slug(ref.name)}.{suffix}")


def _form(query: Mapping[str, str]) -> Form:
    kind, precision = query.get("format"), query.get("precision")
    for name, value, known in (("format", kind, get_args(Kind)), ("precision", precision, get_args(Precision))):
        if value is not None and value not in known:
            raise InvalidRequest(f"{name!r} must be one of {', '.join(known)}; it is {value!r}.", param=name)
    if kind == "gguf":
        return Form("gguf", cast(Precision, precision or "f32"))
    if precision is not None:
        raise InvalidRequest(
            "'precision' goes with format gguf; adapters and checkpoints are written as they are.", param="precision"
        )
    return Form(cast(Kind | None, kind))


class _Package(Response):
    """A file that is made when the answer is sent, and gone when it ends, however it ends."""

    def __init__(self, exported: AbstractAsyncContextManager[Exported], filename: str) -> None:
        super().__init__(media_type="application/zip" if filename.endswith(".zip") else "application/octet-stream")
        self._exported = exported
        self._filename = quote(filename, safe="")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._exported as exported:
            headers = {
                "content-length": str(os.fstat(exported.content.fileno()).st_size),
                "content-disposition": f"attachment; filename*=UTF-8''{self._filename}",
            }
            if exported.checked:
                headers[CHECKED_HEADER] = exported.checked
            chunks = iter(partial(exported.content.read, READ_CHUNK_BYTES), b"")
            await StreamingResponse(chunks, headers=headers, media_type=self.media_type)(scope, receive, send)


def model_to_wire(model: Model) -> dict[str, Any]:
    """The model object of the days of fine-tunes, with `permission`, `root` and `parent`.

    `description` and `method` (what was trained, null for a base) are our own, and so is `alias`, which only other
    names of models have.
    """
    return {
        "id": model.name,
        "object": "model",
        "created": model.created_unix,
        "owned_by": model.owned_by,
        "permission": [_permission(model)],
        "root": model.base_name,
        "parent": model.parent_name,
        "description": model.note,
        "method": model.method,
    } | ({} if model.alias is None else {"alias": _meaning(model.alias)})


def _meaning(alias: Alias) -> dict[str, Any]:
    return {"fine_tune": alias.job_id, "status": alias.job_status, "model": alias.model_name}


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
