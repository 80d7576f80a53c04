"""Claim: 64 clients over 100 tuned models while two jobs train: no request fails, and memory stays where it was.

    python -m benchmarks.serving.load --minutes 10

Clients ask in every way of `adapters.py`, each answer checked, and besides list models, upload files and read events.
Two jobs train all the while, each begun anew when it has ended. Memory is that of server and engine, every ten seconds:
flat is the median of the last third within a tenth of the median of the middle third.
"""

from __future__ import annotations

import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

import httpx

from benchmarks.common import conclude, parser, serving, table
from benchmarks.serving.adapters import PROMPTS, plant, questions
from benchmarks.serving.asking import Work, Wrong, drive, latencies, resident_mib
from benchmarks.serving.planted import Planter
from tests.e2e.harness import Server, reviews, upload, wait_for
from tests.tiny import make_tiny_base

WATCH_EVERY_S = 10.0
FLAT = 1.1
OTHERS_SHARE = 0.1
"""Of all requests, those that are not for an answer of a model."""


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--models", type=int, default=100)
    options.add_argument("--clients", type=int, default=64)
    options.add_argument("--jobs", type=int, default=2)
    args = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        args.base = args.base or make_tiny_base(Path(folder) / "tiny")
        planter = Planter(args.base, PROMPTS)
        with serving(args, TUNESMITH_MAX_CONCURRENT_RUNS=str(args.jobs), TUNESMITH_JOBS_PER_RUN="1") as server:
            answers = plant(server, planter, Path(folder), args.models)
            until_s = time.monotonic() + args.minutes * 60
            with ThreadPoolExecutor() as beside:
                training = beside.submit(_train, server, args.jobs, until_s)
                watching = beside.submit(_watch, server, until_s)
                work = _everything(questions(planter, answers, sys.maxsize, seed=1))
                outcomes = drive(server, args.clients, takewhile(lambda _: time.monotonic() < until_s, work))
                trained, memory = training.result(), watching.result()
    faults = [outcome for outcome in outcomes if outcome.fault is not None]
    print(table(("request", "number", "p50 ms", "p95 ms", "p99 ms"), latencies(outcomes)))
    print(
        table(("MiB", "first", "middle", "last", "most"), [(part, *_course(found)) for part, found in memory.items()])
    )
    print(f"{trained} jobs ended meanwhile; {len(outcomes) / args.minutes / 60:.0f} requests/s")
    for outcome in faults[:10]:
        print(f"WRONG {outcome.kind}: {outcome.fault}")
    courses = {part: _course(found) for part, found in memory.items()}
    flat = all(last <= middle * FLAT for _, middle, last, _ in courses.values())
    facts = {
        "minutes": args.minutes,
        "requests": len(outcomes),
        "faults": len(faults),
        "jobs_ended": trained,
        "p99_ms": round(latencies(outcomes)[-1][-1]),
        "mib": {part: [round(value) for value in course] for part, course in courses.items()},
    }
    return conclude("serving/load", not faults and flat and trained > 0, facts)


def _everything(asked: Iterator[Work]) -> Iterator[Work]:
    """Questions, and now and then what else users do."""
    chance = random.Random(2)
    others: tuple[Work, ...] = (("list of models", _list), ("upload", _upload), ("list of jobs", _jobs))
    for question in asked:
        yield chance.choice(others) if chance.random() < OTHERS_SHARE else question


async def _list(client: httpx.AsyncClient) -> None:
    _fine(await client.get("models"))


async def _jobs(client: httpx.AsyncClient) -> None:
    _fine(await client.get("fine-tunes"))


async def _upload(client: httpx.AsyncClient) -> None:
    row = b'{"prompt": "a ->", "completion": " b"}\n'
    answer = await client.post("files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", row * 200)})
    _fine(answer)
    _fine(await client.delete(f"files/{answer.json()['id']}"))


def _fine(response: httpx.Response) -> None:
    if response.status_code != 200:
        raise Wrong(f"{response.status_code}: {response.text[:300]}")


def _train(server: Server, jobs: int, until_s: float) -> int:
    """Keeps so many jobs running; how many succeeded."""
    ended = 0
    with server.client() as client:
        file_id = upload(client, reviews(100, seed=1))
        running: list[str] = []
        while time.monotonic() < until_s:
            while len(running) < jobs:
                running.append(client.post("fine-tunes", body={"training_file": file_id, "model": "ada"})["id"])
            time.sleep(1.0)
            for job_id in list(running):
                job = client.get("fine-tunes", job_id)
                if job["status"] not in ("pending", "running"):
                    assert job["status"] == "succeeded", job
                    running.remove(job_id)
                    ended += 1
        for job_id in running:
            client.post("fine-tunes", job_id, "cancel")
            wait_for(client, job_id)
    return ended


def _watch(server: Server, until_s: float) -> dict[str, list[float]]:
    """Memory of server and engine every few seconds."""
    found: dict[str, list[float]] = {}
    while time.monotonic() < until_s:
        for part, mib in resident_mib(server).items():
            found.setdefault(part, []).append(mib)
        time.sleep(WATCH_EVERY_S)
    return found


def _course(values: list[float]) -> tuple[float, float, float, float]:
    """Medians of the thirds of a series, and its most."""
    third = max(1, len(values) // 3)
    parts = (values[:third], values[third : 2 * third] or values, values[-third:])
    return (*(statistics.median(part) for part in parts), max(values))  # type: ignore[return-value]


if __name__ == "__main__":
    sys.exit(main())
