"""The torch engine in a thread of this process. `engine/remote.py` runs the same worker in a process of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from pathlib import Path

from tunesmith.engine.base import Capabilities, EngineOutput, GenerateRequest
from tunesmith.engine.handles import handle_of
from tunesmith.engine.mailbox import Mailbox
from tunesmith.engine.messages import Event
from tunesmith.engine.worker import Worker
from tunesmith.errors import EngineUnavailable


class EmbeddedEngine:
    """Generates with all cores it is given, in one worker thread. For one event loop."""

    def __init__(self, *, threads: int) -> None:
        """`threads` is for the products inside one step."""
        self._worker = Worker(threads=threads, emit=self._emit)
        self._mailbox = Mailbox(self._worker.put)
        self._thread = threading.Thread(target=self._worker.run, name="engine", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def capabilities(self) -> Capabilities:
        """All."""
        return Capabilities()

    async def load(self, base_dir: Path, adapter_dir: Path | None) -> str:
        """See `Engine.load`."""
        self._start()
        handle = handle_of(base_dir, adapter_dir)
        await self._mailbox.load(handle, base_dir, adapter_dir)
        return handle

    async def unload(self, handle: str) -> None:
        """See `Engine.unload`."""
        self._mailbox.unload(handle)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[EngineOutput, None]:
        """See `Engine.generate`."""
        self._start()
        outputs = self._mailbox.generate(request)
        try:
            async for output in outputs:
                yield output
        finally:
            await outputs.aclose()

    async def close(self) -> None:
        """See `Engine.close`."""
        self._mailbox.close(EngineUnavailable("The engine is closed."))
        self._worker.stop()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _start(self) -> None:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._thread.start()

    def _emit(self, events: list[Event]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._mailbox.deliver, events)
