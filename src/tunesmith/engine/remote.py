"""The torch engine in a process of its own, so that no forward pass can stall the server, and its death kills nobody.

Commands and events are lines of JSON over a socket pair (`engine/messages.py`). The process is started when it is
first needed and again whenever it dies; what was loaded is loaded again when it is next asked for. It ends when this
side closes the socket or dies.
"""

from __future__ import annotations

import asyncio
import logging
import subprocess
import time
from collections.abc import AsyncGenerator
from pathlib import Path

from tunesmith.engine.base import Capabilities, EngineOutput, GenerateRequest
from tunesmith.engine.handles import handle_of
from tunesmith.engine.mailbox import Mailbox
from tunesmith.engine.messages import Command, command_to_line, events_from_line
from tunesmith.engine.process import EngineProcess
from tunesmith.errors import EngineUnavailable

logger = logging.getLogger(__name__)

LONGEST_LINE_BYTES = 1 << 28
"""Scores of a long prompt come on one line."""
EXIT_WAIT_S = 5.0
"""For the process to end by itself after the socket is closed."""
STEADY_S = 60.0
"""A process that lived so long is no sign of a fault that comes back at once."""
LONGEST_PAUSE_S = 30.0
ATTEMPTS = 2
"""Not more: a request that kills the engine, by exhausting its memory say, must not do so for ever."""

Models = dict[str, tuple[Path, Path | None]]


class RemoteEngine:
    """Starts and supervises `python -m tunesmith.engine`. For one event loop."""

    def __init__(
        self,
        *,
        threads: int,
        precision: str = "float32",
        device: str = "cpu",
        start_timeout_s: float = 60.0,
        begun: EngineProcess | None = None,
    ) -> None:
        """`threads` are the engine's; a request waits at most `start_timeout_s` for a process that is starting.

        `precision` and `device`: see `Settings`. `begun` is the first process, if there is one already.
        """
        self._threads = threads
        self._precision, self._device = precision, device
        self._start_timeout_s = start_timeout_s
        self._begun = begun
        self._models: Models = {}
        self._child: _Child | None = None
        self._up = asyncio.Event()
        self._supervisor: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def capabilities(self) -> Capabilities:
        """All."""
        return Capabilities()

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one that answers."""
        return self._child.process.pid if self._child else None

    async def start(self) -> None:
        """Starts the process ahead of the first request. Raises EngineUnavailable if it does not come up."""
        await self._ready()

    async def load(self, base_dir: Path, adapter_dir: Path | None) -> str:
        """See `Engine.load`."""
        handle = handle_of(base_dir, adapter_dir)
        await (await self._ready()).load(handle, (base_dir, adapter_dir))
        self._models[handle] = (base_dir, adapter_dir)
        return handle

    async def unload(self, handle: str) -> None:
        """See `Engine.unload`."""
        self._models.pop(handle, None)
        if self._child:
            self._child.unload(handle)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineOutput, None]:
        """See `Engine.generate`. A request of which nothing has come when the process dies is put to the next one."""
        for attempt in range(ATTEMPTS):
            produced = False
            outputs = self._attempt(request)
            try:
                async for output in outputs:
                    produced = True
                    yield output
                return
            except EngineUnavailable:
                if produced or self._closed or attempt == ATTEMPTS - 1:
                    raise
            finally:
                await outputs.aclose()

    async def _attempt(self, request: GenerateRequest) -> AsyncGenerator[EngineOutput, None]:
        child = await self._ready()
        await child.load(request.handle, self._models[request.handle])  # at once, but for the first after a restart
        outputs = child.mailbox.generate(request)
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()

    async def close(self) -> None:
        """See `Engine.close`."""
        self._closed = True
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)

    async def _ready(self) -> _Child:
        if self._closed:
            raise EngineUnavailable("The engine is closed.")
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise())
        try:
            async with asyncio.timeout(self._start_timeout_s):
                while self._child is None:  # one that came up can be gone again before we are told
                    await self._up.wait()
        except TimeoutError as error:
            raise EngineUnavailable("The engine is starting. Please try again in a few seconds.") from error
        return self._child

    async def _supervise(self) -> None:
        """Keeps a process running until this task is cancelled."""
        failures = 0
        while True:
            started = time.monotonic()
            try:
                await self._live()
            except Exception:  # no memory for a process, a line that is none: the next one may fare better
                logger.exception("engine could not be run")
            failures = 1 if time.monotonic() - started > STEADY_S else failures + 1
            # The first restart is at once; a process that keeps dying is given growing pauses.
            pause_s = 0.0 if failures == 1 else min(LONGEST_PAUSE_S, 2.0 ** (failures - 3))
            logger.error("engine restarts in_s=%s", pause_s)
            await asyncio.sleep(pause_s)

    async def _live(self) -> None:
        """One process, from its start to its end. Raises OSError if none can be started."""
        begun, self._begun = self._begun, None
        settings = {"precision": self._precision, "device": self._device}
        child = _Child(begun or EngineProcess(threads=self._threads, **settings))
        try:
            if await child.answers():
                self._child = child
                self._up.set()
                await child.died()
        finally:
            self._child = None
            self._up.clear()
            await child.end()
        logger.error("engine died code=%s", child.process.returncode)


class _Child:
    """One engine process and what is loaded in it."""

    def __init__(self, begun: EngineProcess) -> None:
        self.process = begun.process
        self._socket = begun.connection
        self.mailbox = Mailbox(self._send)
        self._loading: dict[str, asyncio.Task[None]] = {}
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None

    async def answers(self) -> bool:
        """Waits until the process is ready; False if it died before."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._socket, limit=LONGEST_LINE_BYTES)
        return bool(await self._reader.readline())

    async def died(self) -> None:
        """Passes on what the process says until it is gone."""
        assert self._reader is not None
        try:
            while line := await self._reader.readline():
                self.mailbox.deliver(events_from_line(line))
        except ConnectionError:
            return

    async def load(self, handle: str, folders: tuple[Path, Path | None]) -> None:
        """Once in the life of the process, unless it was unloaded; raises ValueError if there is no model."""
        if handle not in self._loading:
            task = self._loading[handle] = asyncio.create_task(self.mailbox.load(handle, *folders))
            task.add_done_callback(lambda done: self._forget_failure(handle, done))
        await asyncio.shield(self._loading[handle])  # others may wait for the same load

    def unload(self, handle: str) -> None:
        """Unknown handles pass."""
        self._loading.pop(handle, None)
        self.mailbox.unload(handle)

    async def end(self) -> None:
        """Fails what is under way, closes the socket, and waits for the process to be gone."""
        self.mailbox.close(EngineUnavailable("The engine stopped while working on this request. Please try again."))
        if self._writer is None:
            self._socket.close()
        else:
            self._writer.close()
        try:
            await asyncio.to_thread(self.process.wait, EXIT_WAIT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)

    def _send(self, command: Command) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(command_to_line(command))

    def _forget_failure(self, handle: str, task: asyncio.Task[None]) -> None:
        if (task.cancelled() or task.exception()) and self._loading.get(handle) is task:
            del self._loading[handle]
