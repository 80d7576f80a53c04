"""The client's side of a connection while we work for it: gone, or still there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

T = TypeVar("T")


async def hung_up(receive: Receive) -> None:
    """Returns when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled if the client hangs up first: then raises ClientDisconnect."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(hung_up(receive))
    try:
        await first_of(task, gone)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await end(task, gone)


async def first_of(*tasks: asyncio.Task[Any], timeout_s: float | None = None) -> None:
    """Returns when one of `tasks` has ended, or the time is over; none is cancelled."""
    await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)


async def end(*tasks: asyncio.Task[Any]) -> None:
    """Cancels what still runs and waits until it has ended; how it ended does not matter any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
