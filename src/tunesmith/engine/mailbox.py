"""The asynchronous side of an engine: numbers requests, sends commands, hands events to those who wait for them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path

from tunesmith.engine.base import EngineOutput, GenerateRequest, SampledToken
from tunesmith.engine.messages import Cancel, Command, Ended, Event, Generate, Load, Loaded, Produced, Unload
from tunesmith.errors import EngineUnavailable


class Mailbox:
    """One worker's requests under way. All calls are made from one event loop."""

    def __init__(self, send: Callable[[Command], None]) -> None:
        """`send` passes a command on and does not wait."""
        self._send = send
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Queue[Event | EngineUnavailable]] = {}
        self._closed: EngineUnavailable | None = None

    async def load(self, handle: str, base_dir: Path, adapter_dir: Path | None) -> None:
        """See `Engine.load`."""
        number, events = self._open()
        try:
            self._send(Load(number, handle, str(base_dir), None if adapter_dir is None else str(adapter_dir)))
            event = await _next(events)
            assert isinstance(event, Loaded)
            if event.error is not None:
                raise ValueError(event.error)
        finally:
            del self._waiting[number]

    def unload(self, handle: str) -> None:
        """See `Engine.unload`."""
        self._send(Unload(handle))

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineOutput, None]:
        """See `Engine.generate`."""
        number, events = self._open()
        running = True
        try:
            self._send(Generate(number, request))
            while running:
                match await _next(events):
                    case Produced(_, output):
                        running = not (isinstance(output, SampledToken) and output.finish)
                        yield output
                    case Ended(_, failure, reason):
                        running = False
                        _raise(failure, reason)
        finally:
            del self._waiting[number]
            if running and self._closed is None:
                self._send(Cancel(number))

    def deliver(self, events: Iterable[Event]) -> None:
        """To be called with what the worker says, in its order."""
        for event in events:
            if queue := self._waiting.get(event.number):  # a cancelled request may still be spoken of
                queue.put_nowait(event)

    def close(self, error: EngineUnavailable) -> None:
        """The worker is gone: everything under way, and everything to come, raises `error`."""
        self._closed = error
        for queue in self._waiting.values():
            queue.put_nowait(error)

    def _open(self) -> tuple[int, asyncio.Queue[Event | EngineUnavailable]]:
        if self._closed is not None:
            raise self._closed
        number = next(self._numbers)
        self._waiting[number] = asyncio.Queue()
        return number, self._waiting[number]


async def _next(events: asyncio.Queue[Event | EngineUnavailable]) -> Event:
    event = await events.get()
    if isinstance(event, EngineUnavailable):
        raise EngineUnavailable(event.message)  # one object for each caller: tracebacks grow on raised ones
    return event


def _raise(failure: str | None, reason: str) -> None:
    match failure:
        case None:
            return
        case "unknown handle":
            raise KeyError(reason)
        case "refused":
            raise ValueError(reason)
        case _:
            raise EngineUnavailable(reason)
