from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.waiting import until
from tunesmith.engine.base import EngineOutput, GenerateRequest, SamplingParams
from tunesmith.engine.remote import RemoteEngine
from tunesmith.errors import EngineUnavailable

pytestmark = pytest.mark.anyio
SHORT = SamplingParams(max_tokens=5, temperature=0)


@pytest.fixture
async def remote() -> AsyncIterator[RemoteEngine]:
    engine = RemoteEngine(threads=1)
    yield engine
    await engine.close()


async def outputs(engine: RemoteEngine, request: GenerateRequest) -> list[EngineOutput]:
    return [output async for output in engine.generate(request)]


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def test_a_killed_engine_fails_what_ran_and_serves_what_comes(
    remote: RemoteEngine, tiny_base: Path, adapters: list[Path]
) -> None:
    base = await remote.load(tiny_base, None)
    tuned = await remote.load(tiny_base, adapters[0])
    before = [await outputs(remote, GenerateRequest(handle, (5, 6), SHORT)) for handle in (base, tuned)]

    running = remote.generate(GenerateRequest(base, (5, 6), SamplingParams(max_tokens=2000)))
    await anext(running)
    first = remote.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    with pytest.raises(EngineUnavailable, match="try again"):
        async for _ in running:
            pass

    after = [await outputs(remote, GenerateRequest(handle, (5, 6), SHORT)) for handle in (base, tuned)]
    assert after == before
    assert remote.pid not in (None, first)


async def test_the_end_of_a_process_group_does_not_cut_answers(remote: RemoteEngine, tiny_base: Path) -> None:
    base = await remote.load(tiny_base, None)
    running = remote.generate(GenerateRequest(base, (5, 6), SamplingParams(max_tokens=30, temperature=0)))
    came = [await anext(running)]
    assert remote.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):  # as a terminal and a service manager send them to all
        os.kill(remote.pid, number)
    came += [output async for output in running]
    assert len(came) == 30


async def test_a_request_that_had_no_answer_yet_does_not_notice_that_the_engine_died(
    remote: RemoteEngine, tiny_base: Path
) -> None:
    request = GenerateRequest(await remote.load(tiny_base, None), (5, 6), SHORT)
    before = await outputs(remote, request)

    frozen = remote.pid
    assert frozen is not None
    os.kill(frozen, signal.SIGSTOP)
    asked = asyncio.create_task(outputs(remote, request))
    await asyncio.sleep(0)
    os.kill(frozen, signal.SIGKILL)

    assert await asked == before
    assert remote.pid not in (None, frozen)


async def test_closing_ends_the_process(tiny_base: Path) -> None:
    engine = RemoteEngine(threads=1)
    await engine.start()
    pid = engine.pid
    assert pid is not None
    await engine.close()
    assert not alive(pid)
    with pytest.raises(EngineUnavailable):
        await engine.load(tiny_base, None)


async def test_a_process_that_does_not_come_up_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    engine = RemoteEngine(threads=1, start_timeout_s=2.0)
    with pytest.raises(EngineUnavailable, match="starting"):
        await engine.start()
    monkeypatch.delenv("PYTHONPATH")
    await engine.close()


PARENT = """
import asyncio, sys
from tunesmith.engine.remote import RemoteEngine

async def main():
    engine = RemoteEngine(threads=1)
    await engine.start()
    print(engine.pid, flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_the_engine_dies_with_a_parent_that_is_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid = int(await asyncio.to_thread(parent.stdout.readline))
        assert alive(pid)
        parent.kill()
    await asyncio.to_thread(until, lambda: not alive(pid))


async def test_a_process_that_could_not_be_started_is_tried_again(
    remote: RemoteEngine,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As when a machine has no memory or no process left for a while."""
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", str(tmp_path / "nowhere"))
        loading = asyncio.create_task(remote.load(tiny_base, None))
        async with asyncio.timeout(30):
            while "engine could not be run" not in caplog.text:
                await asyncio.sleep(0.01)
    await loading
    assert remote.pid is not None
