"""Which models are loaded: on demand, once for all who ask at the same time, the least recently used adapter leaving.

Bases stay: there are few of them and adapters need them. Knows folders and handles; nothing of text or requests.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.engine.base import Engine
from tunesmith.engine.handles import handle_of


@dataclass(slots=True)
class _Resident:
    loading: asyncio.Task[str]
    is_adapter: bool
    leases: int = 0

    @property
    def idle(self) -> bool:
        return self.leases == 0 and self.loading.done()


@dataclass(slots=True)
class Lease:
    """While it is held its model is not evicted."""

    handle: str
    """For `GenerateRequest`."""
    _resident: _Resident
    _freed: asyncio.Event
    _held: bool = field(default=True)

    def release(self) -> None:
        """Idempotent."""
        if self._held:
            self._held = False
            self._resident.leases -= 1
            self._freed.set()


class Residency:
    """The loaded models of one engine. For one event loop."""

    def __init__(self, engine: Engine, *, max_adapters: int) -> None:
        self._engine = engine
        self._max_adapters = max_adapters
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._freed = asyncio.Event()

    async def acquire(self, base_dir: Path, adapter_dir: Path | None) -> Lease:
        """Loads the model if it is not loaded. Waits for room while every adapter is in use.

        Raises ValueError if the folders hold no model (any more), EngineUnavailable if the engine is down.
        """
        key = handle_of(base_dir, adapter_dir)
        while key not in self._residents:
            if adapter_dir is None or self._adapters < self._max_adapters:
                self._load(key, base_dir, adapter_dir)
            elif not await self._evict():
                self._freed.clear()
                await self._freed.wait()
        self._residents.move_to_end(key)
        resident = self._residents[key]
        lease = Lease("", resident, self._freed)
        resident.leases += 1
        try:
            # Shielded: that one caller goes away must not fail the others who wait for the same model.
            lease.handle = await asyncio.shield(resident.loading)
        except BaseException:
            lease.release()
            raise
        return lease

    @property
    def _adapters(self) -> int:
        return sum(resident.is_adapter for resident in self._residents.values())

    def _load(self, key: str, base_dir: Path, adapter_dir: Path | None) -> None:
        loading = asyncio.ensure_future(self._engine.load(base_dir, adapter_dir))
        resident = self._residents[key] = _Resident(loading, adapter_dir is not None)

        def loaded(task: asyncio.Task[str]) -> None:
            if (task.cancelled() or task.exception()) and self._residents.get(key) is resident:
                del self._residents[key]
            self._freed.set()  # also if it succeeded: all who asked may have gone away meanwhile

        loading.add_done_callback(loaded)

    async def _evict(self) -> bool:
        """Unloads the adapter that was longest not asked for; False if all are in use."""
        for key, resident in self._residents.items():
            if resident.is_adapter and resident.idle:
                del self._residents[key]
                await self._engine.unload(resident.loading.result())
                return True
        return False
