"""`/healthz` and `/readyz`, for whatever watches the process. They need no key and tell only which part fails."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

logger = logging.getLogger(__name__)

CHECK_TIMEOUT_S = 5.0

Check = Callable[[], Awaitable[str | None]]
"""Asks one part of the server whether it does its work: None, or what is wrong, in words for the operator's log."""


class HealthApi:
    """Alive: the process answers. Ready: each of its parts does."""

    def __init__(self, checks: Mapping[str, Check]) -> None:
        self.checks = checks

    async def alive(self, _request: Request) -> Response:
        """GET /healthz."""
        return JSONResponse({"status": "ok"})

    async def ready(self, _request: Request) -> Response:
        """GET /readyz: 200 with every part `ok`, or 503."""
        parts = {name: await _state(name, check) for name, check in self.checks.items()}
        ready = all(state == "ok" for state in parts.values())
        return JSONResponse({"status": "ok" if ready else "unready", "parts": parts}, 200 if ready else 503)


async def _state(name: str, check: Check) -> str:
    try:
        fault = await asyncio.wait_for(check(), CHECK_TIMEOUT_S)
    except TimeoutError:
        fault = f"no answer within {CHECK_TIMEOUT_S:.0f} s"
    if fault is None:
        return "ok"
    logger.warning("not ready part=%s: %s", name, fault)
    return "failing"
