"""`/v1/files`: parse, call `core.files`, render."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio.to_thread
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from tunesmith.api.multipart import receive_upload
from tunesmith.api.pages import page
from tunesmith.api.routing import path_id
from tunesmith.core.accounts import Caller
from tunesmith.core.files import File, Files
from tunesmith.errors import InvalidRequest

CONCURRENT_STORES = 4
"""Uploads being validated and stored at once; the others wait with their bytes received. Each holds a thread for as
long as its file takes, and must not take them all."""


class FilesApi:
    """The verbs of files."""

    def __init__(self, files: Files, *, max_upload_bytes: int, spool: Path) -> None:
        self.files = files
        self.max_upload_bytes = max_upload_bytes
        self.spool = spool
        self._storing = anyio.CapacityLimiter(CONCURRENT_STORES)

    async def create(self, request: Request, caller: Caller) -> Response:
        """POST /v1/files, multipart: `file`, `purpose`."""
        async with receive_upload(
            request, file_field="file", max_file_bytes=self.max_upload_bytes, folder=self.spool
        ) as upload:
            purpose = upload.fields.pop("purpose", None)
            if not purpose:
                raise InvalidRequest(
                    "The form has no part 'purpose'; for training data it is fine-tune.", param="purpose"
                )
            if upload.fields:
                name = next(iter(upload.fields))
                raise InvalidRequest(
                    f"Unrecognized request argument supplied: {name}. The parts of this form are file and purpose.",
                    param=name,
                )
            store = partial(
                self.files.create, caller, filename=upload.filename, purpose=purpose, chunks=upload.chunks()
            )
            file = await anyio.to_thread.run_sync(store, limiter=self._storing)
        return JSONResponse(file_to_wire(file))

    async def list(self, request: Request, caller: Caller) -> Response:
        """GET /v1/files: all of them, or a page."""
        files = await run_in_threadpool(self.files.list, caller, request.query_params.get("purpose"))
        return JSONResponse(page([file_to_wire(file) for file in files], request.query_params))

    async def get(self, request: Request, caller: Caller) -> Response:
        """GET /v1/files/{id}."""
        return JSONResponse(file_to_wire(await run_in_threadpool(self.files.get, caller, path_id(request))))

    async def delete(self, request: Request, caller: Caller) -> Response:
        """DELETE /v1/files/{id}."""
        file_id = path_id(request)
        await run_in_threadpool(self.files.delete, caller, file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def content(self, request: Request, caller: Caller) -> Response:
        """GET /v1/files/{id}/content: the bytes as they were sent."""
        file, chunks = await run_in_threadpool(self._open, caller, path_id(request))
        headers = {
            "content-length": str(file.size_bytes),
            "content-disposition": f"attachment; filename*=UTF-8''{quote(Path(file.filename).name, safe='')}",
        }
        return StreamingResponse(chunks, headers=headers, media_type="application/octet-stream")

    def _open(self, caller: Caller, file_id: str) -> tuple[File, Iterator[bytes]]:
        """The file and its bytes, the first of them read, so that a lost file is an error and not a broken answer."""
        file = self.files.get(caller, file_id)
        chunks = iter(self.files.content(caller, file_id))
        return file, chain([next(chunks, b"")], chunks)


def file_to_wire(file: File) -> dict[str, Any]:
    """The file object."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": file.created_unix,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": file.status,
        "status_details": file.status_details,
    }
