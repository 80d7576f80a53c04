"""Claim: our engine answers more requests in a second of processor time than the peers' at equal precision.

    python -m benchmarks.serving.compare --peers /path/to/peers/bin/python [--llama llama-server] [--json]

One checkpoint (10 M parameters, random weights), one thread each, in turn within a round; medians of the rounds. Ours
and llama.cpp are servers, asked over HTTP, and all of their processes count; transformers' generate, its continuous
batching and CTranslate2 are called in their own process. What each is asked: `cases.py`. Rates are per second of
processor time, which holds on a machine that others use; on a quiet one it is the same by the clock.
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import httpx

from benchmarks.common import conclude, table
from benchmarks.serving.adapters import bring
from benchmarks.serving.cases import CASES, INTERLEAVED, Case, Seconds
from benchmarks.serving.planted import package
from benchmarks.training import ours as training
from benchmarks.training.forks import Competitor
from benchmarks.training.shapes import VOCABULARY_SIZE
from tests.e2e.harness import OWNER_KEY, Server, put_base
from tests.engine.models import make_adapter
from tests.waiting import until

ROOT = Path(__file__).parents[2]
MODEL = "10M"
ADAPTERS, RANK = 50, 16
END_OF_TEXT = "0"
"""Is kept from being drawn, so that every answer has its length."""
IN_PROCESS = (
    *(("generate", precision) for precision in ("float32", "bfloat16")),
    *(("batching", precision) for precision in ("float32", "bfloat16")),
    *(("ctranslate2", precision) for precision in ("float32", "bfloat16", "int8")),
)
OURS = ("float32", "bfloat16")
LLAMA = {"float32": "f32", "bfloat16": "bf16", "int8": "q8_0"}
TARGETS = {"classify": 1.5, "generate x32": 1.3, "decode": 1.0}
"""Ours over the best peer at the same precision."""
KEEPS = 0.85
"""Of our own rate with one model, with 50 taking turns."""
Rates = dict[str, dict[str, list[float]]]
"""By engine and precision, by case: of each round."""


def main() -> int:
    """Exit code 0 if every target is met."""
    options = _options()
    rates: Rates = defaultdict(lambda: defaultdict(list))
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tunesmith-benchmark-")))
        base = scratch / "base"
        training.make_base(MODEL, str(base))
        models = [make_adapter(base, scratch / "adapters" / str(i), seed=2 * i, rank=RANK) for i in range(ADAPTERS)]
        plain = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        log = options.log or scratch / "log"
        peers = stack.enter_context(Competitor(options.peers, "benchmarks.serving.engines", plain, log))
        for number in range(options.rounds):
            for precision in OURS:
                with _ours(scratch / f"home-{number}-{precision}", base, precision, models) as ask:
                    _measure(rates[f"tunesmith {precision}"], ask, (*CASES, *INTERLEAVED))
            for engine, precision in IN_PROCESS:
                if options.engine and engine not in options.engine:
                    continue
                task = {
                    "engine": engine,
                    "precision": precision,
                    "base": str(base),
                    "seed": number,
                }
                for case, rate in peers.perform(task).items():
                    print(f"{engine} {precision}, {case}: {rate}", file=sys.stderr, flush=True)
                    if case == "error":
                        print(f"{engine} {precision}: {rate}", file=sys.stderr)
                    else:
                        rates[f"{engine} {precision}"][case].append(rate)
            for precision, kind in LLAMA.items() if options.llama else ():
                with _llama(options.llama, options.gguf / f"{kind}.gguf", log) as ask:
                    _measure(rates[f"llama.cpp {precision}"], ask, CASES)
    medians = {engine: {case: statistics.median(found) for case, found in by.items()} for engine, by in rates.items()}
    ratios = dict(_ratios(medians))
    if not options.json:
        names = [case.name for case in (*CASES, *INTERLEAVED)]
        lines = [
            [engine, *(round(by[name], 1) if name in by else "" for name in names)] for engine, by in medians.items()
        ]
        print(table(["engine", *names], lines))
    misses = list(_misses(ratios))
    return conclude("serving", not misses, {"ratios": ratios, "rates": medians, "misses": misses})


def _options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--peers", type=Path, required=True, help="Python with transformers and ctranslate2")
    options.add_argument("--llama", type=Path, help="llama-server of llama.cpp; with --gguf")
    options.add_argument("--gguf", type=Path, help="folder of f32.gguf, bf16.gguf and q8_0.gguf of the same shape")
    engines = sorted({engine for engine, _ in IN_PROCESS})
    options.add_argument("--engine", choices=engines, action="append", help="only these of those called in process")
    options.add_argument(
        "--rounds", type=int, default=3, help="of which the medians are taken; at least 3 to be quoted"
    )
    options.add_argument("--log", type=Path, help="what the competitors print goes there")
    options.add_argument("--json", action="store_true", help="print the JSON line alone")
    chosen = options.parse_args()
    if chosen.llama and not chosen.gguf:
        options.error("--llama needs --gguf")
    return chosen


def _measure(found: dict[str, list[float]], ask: Seconds, cases: Sequence[Case]) -> None:
    for case in cases:
        found[case.name].append(case.rate(ask))
        print(f"{case.name}: {found[case.name][-1]:.1f}", file=sys.stderr, flush=True)


@contextmanager
def _ours(home: Path, base: Path, precision: str, adapters: Sequence[Path]) -> Iterator[Seconds]:
    """A server of ours with one base and 50 tuned models of it."""
    put_base(home, "ada", base)
    settings = {"TUNESMITH_ENGINE_PRECISION": precision, "TUNESMITH_MAX_RESIDENT_ADAPTERS": str(ADAPTERS)}
    with Server(home, settings) as server:
        names = [bring(server, package(adapter), number) for number, adapter in enumerate(adapters)]
        pids = [process.pid for process in server.processes()]
        headers = {"Authorization": f"Bearer {OWNER_KEY}"}
        with httpx.Client(base_url=server.base_url, headers=headers, timeout=300, trust_env=False) as http:
            yield partial(_asked, http, pids, ["ada", *names], random.Random(1))


@contextmanager
def _llama(program: Path, model: Path, log: Path) -> Iterator[Seconds]:
    """llama.cpp's server, one thread, 32 places."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = f"-c 16384 -np 32 -t 1 -tb 1 --poll 0 -b 2048 -ub 512 --host 127.0.0.1 --port {port}"
    with log.open("ab") as out:
        process = subprocess.Popen([str(program), "-m", str(model), *options.split()], stdout=out, stderr=out)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/v1/", timeout=300, trust_env=False) as http:
            until(lambda: _healthy(http), within_s=120, every_s=0.2)
            yield partial(_asked, http, [process.pid], ["base"], random.Random(1))
    finally:
        process.kill()
        process.wait()


def _healthy(http: httpx.Client) -> bool:
    try:
        return http.get("../health").status_code == 200
    except httpx.TransportError:
        return False


def _asked(
    http: httpx.Client,
    pids: Sequence[int],
    models: Sequence[str],
    chance: random.Random,
    case: Case,
    requests: int,
    new: int,
) -> float:
    """Processor time that the processes `pids` spend on so many requests, of as many clients as the case has."""
    bodies = [
        {
            "model": models[1 + number % case.adapters] if case.adapters else models[0],
            "prompt": [chance.randrange(3, VOCABULARY_SIZE) for _ in range(case.prompt_tokens)],
            "max_tokens": new,
            "temperature": 0,
            "logit_bias": {END_OF_TEXT: -100},
            **({"logprobs": 5} if case.logprobs else {}),
        }
        for number in range(requests)
    ]
    begun = sum(map(_processor_s, pids))
    with ThreadPoolExecutor(case.clients) as clients:
        for answer in clients.map(lambda body: http.post("completions", json=body), bodies):
            answer.raise_for_status()
            assert answer.json()["usage"]["completion_tokens"] == new
    return sum(map(_processor_s, pids)) - begun


def _processor_s(pid: int) -> float:
    """In nanoseconds of the scheduler, threads included: clock ticks are too coarse for a request."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _ratios(medians: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, float]]:
    """Ours over the best peer: by case and precision, and "best" over whatever precision is best for either."""
    for case in CASES:
        for precision in (*OURS, "best"):
            alike = {k: by[case.name] for k, by in medians.items() if precision == "best" or k.endswith(precision)}
            ours = [rate for engine, rate in alike.items() if engine.startswith("tunesmith")]
            theirs = [rate for engine, rate in alike.items() if not engine.startswith("tunesmith")]
            if theirs:
                yield f"{case.name}, {precision}", round(max(ours) / max(theirs), 2)
    for kind in ("classify x32", "generate x32"):
        for precision in OURS:
            by = medians[f"tunesmith {precision}"]
            ratio = by[f"{kind}, {ADAPTERS} tuned"] / by[f"{kind}, 1 tuned"]
            yield f"{kind}, {precision}, {ADAPTERS} tuned models to one", round(ratio, 2)


def _misses(ratios: Mapping[str, float]) -> Iterator[str]:
    for name, ratio in ratios.items():
        wanted = KEEPS if name.endswith("to one") else next((t for k, t in TARGETS.items() if name.startswith(k)), 0)
        if ratio < wanted and not name.endswith(", best"):
            yield f"{name}: {ratio} < {wanted}"


if __name__ == "__main__":
    sys.exit(main())
