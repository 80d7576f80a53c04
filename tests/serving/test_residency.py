from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tunesmith.engine.scripted import ScriptedEngine
from tunesmith.serving.residency import Lease, Residency

pytestmark = pytest.mark.anyio


class CountingEngine(ScriptedEngine):
    """Remembers what was loaded and unloaded; loading waits for `gate`."""

    def __init__(self) -> None:
        super().__init__(100)
        self.gate = asyncio.Event()
        self.gate.set()
        self.loads: list[str] = []
        self.loaded: set[str] = set()
        self.failing = False

    async def load(self, base_dir: Path, adapter_dir: Path | None) -> str:
        self.loads.append((adapter_dir or base_dir).name)
        await self.gate.wait()
        if self.failing:
            raise ValueError("damaged")
        handle = await super().load(base_dir, adapter_dir)
        self.loaded.add(handle)
        return handle

    async def unload(self, handle: str) -> None:
        self.loaded.discard(handle)
        await super().unload(handle)


@pytest.fixture
def engine(anyio_backend: str) -> CountingEngine:
    return CountingEngine()


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    made = []
    for name in "abcd":
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_bytes(name.encode())
        made.append(tmp_path / name)
    return made


async def test_those_who_ask_together_load_once(engine: CountingEngine, tiny_base: Path, folders: list[Path]) -> None:
    residency = Residency(engine, max_adapters=2)
    engine.gate.clear()
    asked = [asyncio.create_task(residency.acquire(tiny_base, folders[0])) for _ in range(5)]
    await asyncio.sleep(0)
    asked[0].cancel()  # the one who began goes away; the others still get their model
    engine.gate.set()
    leases = await asyncio.gather(*asked[1:])
    assert len({lease.handle for lease in leases}) == 1
    assert engine.loads == ["a"]


async def test_the_least_recently_used_makes_room(engine: CountingEngine, tiny_base: Path, folders: list[Path]) -> None:
    residency = Residency(engine, max_adapters=2)
    a, b, c, _ = folders
    for folder in (a, b, a, c):  # b was not asked for the longest
        (await residency.acquire(tiny_base, folder)).release()
    assert len(engine.loaded) == 2
    (await residency.acquire(tiny_base, a)).release()
    (await residency.acquire(tiny_base, c)).release()
    assert engine.loads == ["a", "b", "c"]
    (await residency.acquire(tiny_base, b)).release()
    assert engine.loads == ["a", "b", "c", "b"]


async def test_models_of_all_weights_have_room_of_their_own(
    engine: CountingEngine, tiny_base: Path, folders: list[Path]
) -> None:
    residency = Residency(engine, max_adapters=2, max_full=1)
    a, b, c, d = folders
    for folder in (c, d):
        (folder / "adapter_model.safetensors").rename(folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    for folder in (a, c, b, d, a, b):
        (await residency.acquire(tiny_base, folder)).release()
    assert engine.loads == ["a", "c", "b", "d"]
    (await residency.acquire(tiny_base, c)).release()
    assert engine.loads == ["a", "c", "b", "d", "c"]
    assert len(engine.loaded) == 3


async def test_room_that_nobody_wants_any_more_is_given_on(
    engine: CountingEngine, tiny_base: Path, folders: list[Path]
) -> None:
    """Who asked first went away while it was loading; who waits for room hears of it when that is loaded."""
    residency = Residency(engine, max_adapters=1)
    engine.gate.clear()
    first = asyncio.create_task(residency.acquire(tiny_base, folders[0]))
    await asyncio.sleep(0)
    second = asyncio.create_task(residency.acquire(tiny_base, folders[1]))
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.gather(first, return_exceptions=True)
    await asyncio.sleep(0)
    engine.gate.set()
    await asyncio.wait_for(second, 5)
    assert engine.loads == ["a", "b"]


async def test_one_in_use_is_never_evicted(engine: CountingEngine, tiny_base: Path, folders: list[Path]) -> None:
    residency = Residency(engine, max_adapters=2)
    a, b, c, d = folders
    first = await residency.acquire(tiny_base, a)
    (await residency.acquire(tiny_base, b)).release()
    third = await residency.acquire(tiny_base, c)  # in the place of b, though a is older
    assert {first.handle, third.handle} == engine.loaded
    fourth: asyncio.Task[Lease] = asyncio.create_task(residency.acquire(tiny_base, d))
    for _ in range(10):
        await asyncio.sleep(0)
    assert not fourth.done()  # waits until one is free
    first.release()
    first.release()  # idempotent
    assert {(await fourth).handle, third.handle} == engine.loaded


async def test_those_who_keep_asking_for_what_is_loaded_keep_nobody_waiting_for_ever(
    engine: CountingEngine, tiny_base: Path, folders: list[Path]
) -> None:
    residency = Residency(engine, max_adapters=1)
    a, b, c, _ = folders
    held = await residency.acquire(tiny_base, a)
    asked = [asyncio.create_task(residency.acquire(tiny_base, folder)) for folder in (b, a, c)]
    for _ in range(10):
        await asyncio.sleep(0)
    assert not any(task.done() for task in asked)  # not even the one who asks for what is loaded: it came later
    for loaded, task in enumerate(asked, start=2):
        held.release()
        held = await asyncio.wait_for(task, 5)
        assert len(engine.loads) == loaded
    assert engine.loads == ["a", "b", "a", "c"]


async def test_who_gives_up_waiting_leaves_the_others_what_is_loaded(
    engine: CountingEngine, tiny_base: Path, folders: list[Path]
) -> None:
    residency = Residency(engine, max_adapters=1)
    held = await residency.acquire(tiny_base, folders[0])
    given_up = asyncio.create_task(residency.acquire(tiny_base, folders[1]))
    await asyncio.sleep(0)
    again = asyncio.create_task(residency.acquire(tiny_base, folders[0]))
    await asyncio.sleep(0)
    assert not again.done()
    given_up.cancel()
    assert (await asyncio.wait_for(again, 5)).handle == held.handle
    assert engine.loads == ["a"]


async def test_bases_take_no_adapters_place(engine: CountingEngine, tiny_base: Path, folders: list[Path]) -> None:
    residency = Residency(engine, max_adapters=1)
    base = await residency.acquire(tiny_base, None)
    adapter = await residency.acquire(tiny_base, folders[0])
    assert {base.handle, adapter.handle} == engine.loaded


async def test_a_model_made_again_at_the_same_path_is_loaded_again(
    engine: CountingEngine, tiny_base: Path, folders: list[Path]
) -> None:
    residency = Residency(engine, max_adapters=2)
    before = await residency.acquire(tiny_base, folders[0])
    (folders[0] / "adapter_model.safetensors").write_bytes(b"other weights")
    after = await residency.acquire(tiny_base, folders[0])
    assert before.handle != after.handle
    assert engine.loads == ["a", "a"]


async def test_a_load_that_fails_is_tried_again(engine: CountingEngine, tiny_base: Path, folders: list[Path]) -> None:
    residency = Residency(engine, max_adapters=1)
    engine.failing = True
    for _ in range(2):
        with pytest.raises(ValueError, match="damaged"):
            await residency.acquire(tiny_base, folders[0])
    engine.failing = False
    (await residency.acquire(tiny_base, folders[1])).release()  # the failures hold no place
    assert engine.loads == ["a", "a", "b"]


async def test_a_folder_without_a_model_says_so(engine: CountingEngine, tiny_base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adapter_model"):
        await Residency(engine, max_adapters=1).acquire(tiny_base, tmp_path)
    assert engine.loads == []
