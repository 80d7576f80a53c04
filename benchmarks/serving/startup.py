"""Claim: `serve` answers its first completion within 3 s of the start of its process, and help is there within 0.2 s.

    python -m benchmarks.serving.startup

For each model of the box, on a home that has been used before: from the start of the process to the announcement, and
to the answer to a completion asked right then. Then how long a model that is on disk takes to be there: adapters of
rank 32 of the largest model, asked for one token each, first and second time.

The claim is for a quiet machine with two cores. Beside it stands the processor time of server and engine, which work at
the same time: where the machine is busy, the longer of the two tells about when the answer comes on a quiet one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from benchmarks.common import conclude, parser, table
from benchmarks.serving.adapters import bring
from benchmarks.serving.planted import package
from tests.e2e.harness import OWNER_KEY, Server
from tests.engine.models import make_adapter
from tunesmith.core import box

FIRST_ANSWER_S = 3.0
HELP_S = 0.2
ADAPTER_MS = 50.0
TIMES = 5
ADAPTERS = 20
MODELS = ("ada", "babbage")
HELP = ("--help", "serve --help", "api completions.create --help", "prepare --help")


def main() -> int:
    """Exit code 0 if the claim holds."""
    args = parser(__doc__).parse_args()
    help_s = {command: statistics.median(_help_s(command) for _ in range(TIMES)) for command in HELP}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        environment = _environment(home, args.threads)
        _start(environment, "ada")  # unpacks the box and compiles, once in the life of a home
        found = {model: [_start(environment, model) for _ in range(TIMES)] for model in MODELS}
        first_ms, again_ms = _loads(home, Path(folder))
    rows = [(model, *(statistics.median(times) for times in zip(*found[model], strict=True))) for model in found]
    shown = [(model, *(f"{value:.2f}" for value in values)) for model, *values in rows]
    print(table(("model", "announced after s", "answered after s", "processor s, server", "engine"), shown))
    load_ms = first_ms - again_ms
    print(f"adapter of rank 32: first answer {first_ms:.0f} ms, next {again_ms:.0f} ms, so {load_ms:.0f} ms to load")
    print("help: " + ", ".join(f"{command} {took_s:.2f} s" for command, took_s in help_s.items()))
    facts = {
        "answered_s": {model: round(answered, 2) for model, _, answered, *_ in rows},
        "processor_s": {model: [round(server, 2), round(engine, 2)] for model, _, _, server, engine in rows},
        "adapter_ms": round(load_ms, 1),
        "help_s": {command: round(took_s, 3) for command, took_s in help_s.items()},
    }
    slowest_s = max(answered for _, _, answered, *_ in rows)
    holds = slowest_s < FIRST_ANSWER_S and load_ms < ADAPTER_MS and max(help_s.values()) < HELP_S
    return conclude("serving/startup", holds, facts)


def _help_s(command: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", "tunesmith", *command.split()], capture_output=True, check=True)
    return time.perf_counter() - begun


def _environment(home: Path, threads: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
    return kept | {
        "TUNESMITH_HOME": str(home),
        "TUNESMITH_PORT": "0",
        "TUNESMITH_OWNER_KEY": OWNER_KEY,
        "TUNESMITH_ENGINE_THREADS": str(threads),
    }


def _start(environment: dict[str, str], model: str) -> tuple[float, float, float, float]:
    """Seconds to the announcement and to the first answer, and what server and engine computed until then."""
    begun = time.perf_counter()
    command = [sys.executable, "-m", "tunesmith", "--json", "serve"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        base_url = json.loads(process.stdout.readline())["base_url"]
        announced_s = time.perf_counter() - begun
        response = httpx.post(
            f"{base_url}/completions",
            headers={"Authorization": f"Bearer {OWNER_KEY}"},
            json={"model": model, "prompt": "The plot was", "max_tokens": 1},
            timeout=60,
            trust_env=False,
        )
        response.raise_for_status()
        answered_s = time.perf_counter() - begun
        (engine,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        computed_s = _computed_s(process.pid), _computed_s(int(engine))
        process.terminate()
    return announced_s, answered_s, *computed_s


def _computed_s(pid: int) -> float:
    """Processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _loads(home: Path, folder: Path) -> tuple[float, float]:
    """Milliseconds of a one-token answer of an adapter that is on disk, and of the same again: medians."""
    base = box.unpack(box.BOX / "babbage", folder)
    names = []
    with Server(home) as server:
        for seed in range(ADAPTERS):
            adapter = make_adapter(base, folder / f"adapter{seed}", seed=seed, rank=32)
            names.append(bring(server, package(adapter), seed, base_name="babbage"))
    with Server(home, {"TUNESMITH_MAX_RESIDENT_ADAPTERS": str(ADAPTERS)}) as server, server.client() as client:
        client.post("completions", body={"model": "babbage", "prompt": "x", "max_tokens": 1})
        times: tuple[list[float], list[float]] = ([], [])
        for name in names:
            for each in times:
                begun = time.perf_counter()
                client.post("completions", body={"model": name, "prompt": "x", "max_tokens": 1})
                each.append((time.perf_counter() - begun) * 1000)
    return statistics.median(times[0]), statistics.median(times[1])


if __name__ == "__main__":
    sys.exit(main())
