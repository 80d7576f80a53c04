"""Server-sent events as the published clients read them.

The oldest of them ignore each line that does not begin with `data: `, compare the last one to exactly
`data: [DONE]`, and read on after it until the connection is closed: so comments and `id:` lines are safe, the marker
is exact, and the answer closes its connection.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from tunesmith.api.connection import end, first_of, hung_up
from tunesmith.api.errors import error_body
from tunesmith.errors import TunesmithError

logger = logging.getLogger(__name__)

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"

HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "connection": "close",
    "x-accel-buffering": "no",
}


def frame(value: dict[str, Any], event_id: int | None = None) -> bytes:
    """One event. ASCII only: some readers take U+2028 and its like for ends of lines."""
    line = f"data: {json.dumps(value, allow_nan=False)}\n\n"
    return (line if event_id is None else f"id: {event_id}\n{line}").encode()


class EventStream(Response):
    """Sends frames as they come and a comment after each `heartbeat_s` of silence, then closes the connection.

    An error raised by `frames` becomes a last frame with an `error` object. When the client hangs up, `frames` is
    closed before this returns, so that the work behind it ends.
    """

    def __init__(self, frames: AsyncGenerator[bytes, None], *, heartbeat_s: float) -> None:
        super().__init__(headers=HEADERS)
        del self.headers["content-length"]  # Response sets that of its empty body
        self.frames = frames
        self.heartbeat_s = heartbeat_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        gone = asyncio.create_task(hung_up(receive))
        following: asyncio.Task[bytes | None] = asyncio.create_task(self._next())
        try:
            while not gone.done():
                await first_of(gone, following, timeout_s=self.heartbeat_s)
                content: bytes | None = PING
                if following.done():
                    content = following.result()
                    following = asyncio.create_task(self._next())
                if content is None or gone.done():
                    break
                await send({"type": "http.response.body", "body": content, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            await end(gone, following)
            await self.frames.aclose()

    async def _next(self) -> bytes | None:
        try:
            return await anext(self.frames, None)
        except Exception as error:
            # The status is sent already: the error can only be told inside the stream. The generator has ended with it.
            if not isinstance(error, TunesmithError):
                logger.exception("stream failed")
            return frame(error_body(error))
