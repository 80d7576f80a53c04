"""Many clients at once, each asking one request after another; what came back, and how long it took."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.harness import ENGINE, OWNER_KEY, SERVER, Server

Json = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One request, answered."""

    kind: str
    seconds: float
    fault: str | None
    """What was wrong with the answer; None if nothing was."""


class Wrong(AssertionError):
    """An answer is not what it must be."""


Ask = Callable[[httpx.AsyncClient], Awaitable[None]]
"""Asks something and raises Wrong if the answer is."""
Work = tuple[str, Ask]
"""A kind, for the table, and what to ask."""


async def post(client: httpx.AsyncClient, path: str, body: Json) -> Json:
    """The answer; raises Wrong for anything but a 200."""
    response = await client.post(path, json=body)
    if response.status_code != 200:
        raise Wrong(f"{response.status_code}: {response.text[:300]}")
    answer: Json = response.json()
    return answer


async def streamed(client: httpx.AsyncClient, path: str, body: Json, *, most: int | None = None) -> list[Json]:
    """The chunks of a stream; with `most`, so many, then the client hangs up."""
    chunks: list[Json] = []
    async with client.stream("POST", path, json={**body, "stream": True}) as response:
        if response.status_code != 200:
            raise Wrong(f"{response.status_code}: {(await response.aread())[:300]!r}")
        async for line in response.aiter_lines():
            if line == "data: [DONE]":
                return chunks
            if line.startswith("data: "):
                chunks.append(json.loads(line.removeprefix("data: ")))
                if "error" in chunks[-1]:
                    raise Wrong(str(chunks[-1]))
            if len(chunks) == most:
                return chunks
    raise Wrong("a stream ended without [DONE]")


def drive(server: Server, clients: int, work: Iterable[Work]) -> list[Outcome]:
    """Has the clients do all the work, in its order, each taking the next when it is done with one."""
    return asyncio.run(_drive(server.base_url, clients, iter(work)))


async def _drive(base_url: str, clients: int, work: Iterator[Work]) -> list[Outcome]:
    outcomes: list[Outcome] = []
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    headers = {"Authorization": f"Bearer {OWNER_KEY}"}
    async with httpx.AsyncClient(
        base_url=base_url, headers=headers, limits=limits, timeout=120, trust_env=False
    ) as client:

        async def one() -> None:
            for kind, ask in work:
                begun, fault = time.perf_counter(), None
                try:
                    await ask(client)
                except (Wrong, httpx.HTTPError) as error:
                    fault = f"{type(error).__name__}: {error}"
                outcomes.append(Outcome(kind, time.perf_counter() - begun, fault))

        await asyncio.gather(*(one() for _ in range(clients)))
    return outcomes


def latencies(outcomes: Sequence[Outcome]) -> list[tuple[str, int, float, float, float]]:
    """Kind, number, and p50, p95, p99 in ms, all kinds together last."""
    times: defaultdict[str, list[float]] = defaultdict(list)
    for outcome in outcomes:
        times[outcome.kind].append(outcome.seconds * 1000)
        times["all"].append(outcome.seconds * 1000)
    order = [*sorted(times.keys() - {"all"}), "all"]
    return [
        (kind, len(times[kind]), *(percentile(times[kind], share) for share in (0.5, 0.95, 0.99))) for kind in order
    ]


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all are at most."""
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))]


def resident_mib(server: Server) -> dict[str, float]:
    """Memory of the server and of its engine, in MiB."""
    found = {}
    for part in (SERVER, ENGINE):
        status = Path(f"/proc/{server.one(part).pid}/status").read_text()
        found[part] = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024
    return found
