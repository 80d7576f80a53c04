"""From the error tree to the wire: status, headers and `{"error": {message, type, param, code}}`. The one place.

| error                 | status | type                    | asked again by clients |
|-----------------------|--------|-------------------------|------------------------|
| `UnsupportedMedia`    | 415    | `invalid_request_error` | no                     |
| `InvalidRequest`      | 400    | `invalid_request_error` | no                     |
| `AuthenticationFailed`| 401    | `invalid_request_error` | no                     |
| `PermissionDenied`    | 403    | `invalid_request_error` | no                     |
| `NotFound`            | 404    | `invalid_request_error` | no                     |
| `RateLimited`         | 429    | `requests`              | yes                    |
| `EngineUnavailable`   | 429    | `server_error`          | yes                    |
| `StorageFull`         | 507    | `server_error`          | no                     |
| anything else         | 500    | `server_error`          | as the client likes    |

A model still loading is 429, not 503: the published clients replace the text of a 503 by one of their own, and
their users' retry loops wait for 429. 409 and 422 are never sent: the oldest client asks again for ever on the first
and cannot read the second.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from tunesmith.errors import (
    AuthenticationFailed,
    EngineUnavailable,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RateLimited,
    StorageFull,
    TunesmithError,
    UnsupportedMedia,
)

logger = logging.getLogger(__name__)

ENGINE_RETRY_S = 5
SHOWN_PATH_CHARACTERS = 200
CLIENT_CLOSED_REQUEST = 499
"""Nobody reads this answer; the number is what proxies log for it."""


@dataclass(frozen=True, slots=True)
class _Answer:
    status: HTTPStatus
    type: str = "invalid_request_error"
    should_retry: bool | None = False
    """None leaves the choice to the client."""
    retry_after_s: int | None = None


def _answer(error: Exception) -> _Answer:
    match error:
        case UnsupportedMedia():
            return _Answer(HTTPStatus.UNSUPPORTED_MEDIA_TYPE)
        case InvalidRequest():
            return _Answer(HTTPStatus.BAD_REQUEST)
        case AuthenticationFailed():
            return _Answer(HTTPStatus.UNAUTHORIZED)
        case PermissionDenied():
            return _Answer(HTTPStatus.FORBIDDEN)
        case NotFound():
            return _Answer(HTTPStatus.NOT_FOUND)
        case RateLimited():
            return _Answer(HTTPStatus.TOO_MANY_REQUESTS, "requests", True, error.retry_after_s)
        case EngineUnavailable():
            return _Answer(HTTPStatus.TOO_MANY_REQUESTS, "server_error", True, ENGINE_RETRY_S)
        case StorageFull():
            return _Answer(HTTPStatus.INSUFFICIENT_STORAGE, "server_error")
        case _:
            return _Answer(HTTPStatus.INTERNAL_SERVER_ERROR, "server_error", None)


def error_body(error: Exception) -> dict[str, Any]:
    """The body that tells a client of `error`; of an error not raised on purpose it tells nothing but that it was."""
    if isinstance(error, TunesmithError) and _answer(error).status != HTTPStatus.INTERNAL_SERVER_ERROR:
        message, param, code = error.message, error.param, error.code
    else:
        message, param, code = "The server had an error while processing your request; its log tells more.", None, None
    return _body(message, _answer(error).type, param, code)


def error_response(error: Exception) -> Response:
    """The whole answer for `error`."""
    answer = _answer(error)
    headers: dict[str, str] = {}
    if answer.should_retry is not None:
        headers["x-should-retry"] = str(answer.should_retry).lower()
    if answer.retry_after_s is not None:
        headers["retry-after"] = str(answer.retry_after_s)
    if answer.status == HTTPStatus.UNAUTHORIZED:
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), answer.status, headers)


def _body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def on_tunesmith_error(_request: Request, error: Exception) -> Response:
    """Exception handler for everything raised on purpose."""
    return error_response(error)


async def on_routing_error(request: Request, error: Exception) -> Response:
    """Exception handler for what the router raises: no such URL, or no such method there."""
    assert isinstance(error, HTTPException)
    path = request.url.path[:SHOWN_PATH_CHARACTERS]
    allowed = (error.headers or {}).get("Allow")
    if allowed is None:
        message = f"Invalid URL ({request.method} {path}): there is nothing here. The API lives under /v1."
    else:
        message = f"Not allowed to {request.method} on {path}; allowed: {allowed}."
    headers = {**(error.headers or {}), "x-should-retry": "false"}
    return JSONResponse(_body(message, "invalid_request_error"), error.status_code, headers)


async def on_disconnect(_request: Request, _error: Exception) -> Response:
    """Exception handler for a client that hung up while it was still sending or waiting."""
    return Response(status_code=CLIENT_CLOSED_REQUEST)


EXCEPTION_HANDLERS = {
    TunesmithError: on_tunesmith_error,
    HTTPException: on_routing_error,
    ClientDisconnect: on_disconnect,
}
