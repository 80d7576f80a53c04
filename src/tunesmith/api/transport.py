"""What is the same for every request, whatever it asks: its path made regular, its id, the headers of its answer.

Three ASGI layers, from the outside in. None of them knows a route or an object of the API.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from urllib.parse import quote, unquote

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith.api.errors import error_response

logger = logging.getLogger(__name__)

API_VERSION = "2020-10-01"


class RegularPath:
    """Gives each request one spelling of its path; routes match it percent-encoded and decode what they take out.

    So an encoded slash stays inside its id (`/v1/files/some%2Fdir%2Ftrain.jsonl` asks for one file, of a strange
    name), while doubled slashes (a base URL with a slash at its end), a slash at the end and a doubled `/v1` (a base
    URL with `/v1` given to a client that adds its own) do no harm.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] == "http":
            sent: bytes = scope.get("raw_path") or quote(scope["path"]).encode()
            scope = {**scope, "path": regular_path(sent.partition(b"?")[0].decode("latin-1"))}
        await self.app(scope, receive, send)


def regular_path(path: str) -> str:
    """`//v1/v1/files/a%2fb/` -> `/v1/files/a%2Fb`: each segment encoded in full, none empty, `v1` once."""
    segments = [quote(unquote(segment), safe="") for segment in path.split("/") if segment]
    while segments[:2] == ["v1", "v1"]:
        del segments[0]
    return "/" + "/".join(segments)


class Stamp:
    """Gives each request an id, each answer its headers, and the operator one line of log for both.

    `openai-processing-ms` is numeric always: the oldest clients fail on every answer where it is not.
    """

    def __init__(self, app: ASGIApp, *, new_id: Callable[[str], str]) -> None:
        self.app = app
        self.new_id = new_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = self.new_id("req_")
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        started_s = time.perf_counter()

        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                spent_ms = round((time.perf_counter() - started_s) * 1000)
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                headers["openai-version"] = API_VERSION
                headers["openai-processing-ms"] = str(spent_ms)
                if (caller := state.get("caller")) is not None:
                    headers["openai-organization"] = quote(caller.organization_slug)  # letters of any script
                logger.info(
                    "%s %s %d %d ms request=%s",
                    scope["method"],
                    scope["path"],
                    message["status"],
                    spent_ms,
                    request_id,
                )
            await send(message)

        await self.app(scope, receive, stamped)


class LastResort:
    """Answers for errors that nobody meant: 500, with the traceback in the log and nowhere else.

    It also reads a refused request to its end, `unread_limit_bytes` at most. Answered and hung up on while still
    sending, a client would see a broken connection instead of the refusal.
    """

    def __init__(self, app: ASGIApp, *, unread_limit_bytes: int) -> None:
        self.app = app
        self.unread_limit_bytes = unread_limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        started = False
        unread = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        # Such a client sends its body when we first ask for it, and one that is refused before need not send it.
        waits_for_leave = "expect" in headers

        async def watched_receive() -> Message:
            nonlocal unread, waits_for_leave
            waits_for_leave = False
            message = await receive()
            unread = unread and message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def watched_send(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if message["status"] >= 400:
                    left = 0 if waits_for_leave else self.unread_limit_bytes
                    while unread and left > 0:
                        left -= len((await watched_receive()).get("body", b""))
                    if unread:
                        MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        try:
            await self.app(scope, watched_receive, watched_send)
        except Exception as error:
            logger.exception("request failed request=%s", scope["state"]["request_id"])
            if started:
                raise
            await error_response(error)(scope, watched_receive, watched_send)
