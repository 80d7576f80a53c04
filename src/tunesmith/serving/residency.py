"""Which models are loaded: on demand, once for all who ask at the same time, the least recently used leaving.

Bases stay: there are few of them and adapters need them. A model of which all weights were tuned is as large as its
base, so there is room for fewer of those than of adapters. Knows folders and handles; nothing of text or requests.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from tunesmith.engine.base import Engine
from tunesmith.engine.handles import handle_of
from tunesmith.rundir import holds_all_weights

Kind = Literal["base", "adapter", "full"]
State = Literal["resident", "loading", "on disk"]


@dataclass(slots=True)
class _Resident:
    loading: asyncio.Task[str]
    kind: Kind
    leases: int = 0
    leaving: bool = False
    """Nobody is given it any more: it makes room for the first of those who wait."""

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

    def __init__(self, engine: Engine, *, max_adapters: int, max_full: int = 4) -> None:
        """`max_full` bounds the models of which all weights were tuned."""
        self._engine = engine
        self._room: dict[Kind, float] = {"base": math.inf, "adapter": max_adapters, "full": max_full}
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # least recently used first
        self._lines: dict[Kind, deque[object]] = {kind: deque() for kind in self._room}
        self._freed = asyncio.Event()

    async def acquire(self, base_dir: Path, adapter_dir: Path | None) -> Lease:
        """Loads the model if it is not loaded. Waits for room, in turn, while every model of its kind is in use.

        Raises ValueError if the folders hold no model (any more), EngineUnavailable if the engine is down.
        """
        key = handle_of(base_dir, adapter_dir)
        kind = _kind(adapter_dir)
        if self._available(key) is None:
            await self._wait_for(key, base_dir, adapter_dir, kind)
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

    def state(self, base_dir: Path, adapter_dir: Path | None) -> State:
        """Where a model is now. Raises ValueError if the folders hold no model."""
        resident = self._residents.get(handle_of(base_dir, adapter_dir))
        if resident is None:
            return "on disk"
        return "resident" if resident.loading.done() else "loading"

    def _available(self, key: str) -> _Resident | None:
        resident = self._residents.get(key)
        return None if resident is None or resident.leaving else resident

    async def _wait_for(self, key: str, base_dir: Path, adapter_dir: Path | None, kind: Kind) -> None:
        """Returns when the model is there to be given: loaded by this caller, whose turn came, or by another."""
        line, ticket = self._lines[kind], object()
        line.append(ticket)
        try:
            while self._available(key) is None:
                if line[0] is ticket and self._count(kind) < self._room[kind] and key not in self._residents:
                    self._load(key, base_dir, adapter_dir, kind)
                elif line[0] is not ticket or not await self._evict(kind):
                    self._freed.clear()
                    await self._freed.wait()
        finally:
            line.remove(ticket)
            for resident in self._residents.values():
                resident.leaving &= resident.kind != kind
            self._freed.set()  # another is the first now

    def _count(self, kind: Kind) -> int:
        return sum(resident.kind == kind for resident in self._residents.values())

    def _load(self, key: str, base_dir: Path, adapter_dir: Path | None, kind: Kind) -> None:
        loading = asyncio.ensure_future(self._engine.load(base_dir, adapter_dir))
        resident = self._residents[key] = _Resident(loading, kind)

        def loaded(task: asyncio.Task[str]) -> None:
            if (task.cancelled() or task.exception()) and self._residents.get(key) is resident:
                del self._residents[key]
            self._freed.set()  # also if it succeeded: all who asked may have gone away meanwhile

        loading.add_done_callback(loaded)

    async def _evict(self, kind: Kind) -> bool:
        """Unloads the model of a kind that was longest not asked for.

        False if all are in use: then that one is given to nobody else, or those who keep asking for what is loaded
        would keep the others waiting for ever.
        """
        of_kind = [(key, resident) for key, resident in self._residents.items() if resident.kind == kind]
        for key, resident in of_kind:
            if resident.idle:
                del self._residents[key]
                await self._engine.unload(resident.loading.result())
                return True
        if not any(resident.leaving for _, resident in of_kind):
            of_kind[0][1].leaving = True
        return False


def _kind(adapter_dir: Path | None) -> Kind:
    if adapter_dir is None:
        return "base"
    return "full" if holds_all_weights(adapter_dir) else "adapter"
