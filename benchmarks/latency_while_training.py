"""Claim: while a job trains, GET /v1/models has p99 under 100 ms, and a one-token completion on ada stays under 1 s.

    python -m benchmarks.latency_while_training

Requests go one after another, as one user's would; each kind is measured on the idle server first, for comparison.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from benchmarks.common import conclude, parser, read_rows, serving, table
from tests.e2e.drill import run_dir_of
from tests.e2e.harness import TRAINER, reviews, upload
from tests.waiting import until

MODELS_P99_MS = 100.0
COMPLETION_MAX_MS = 1000.0


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument("--requests", type=int, default=200)
    args = options.parse_args()
    rows = read_rows(args.data, 100_000) if args.data else reviews(4000, seed=1)

    with serving(args) as server, server.client() as client:
        question = {"model": "ada", "prompt": "The plot was", "max_tokens": 1}
        kinds: dict[str, Callable[[], object]] = {
            "GET /v1/models": lambda: client.get("models"),
            "POST /v1/completions": lambda: client.post("completions", body=question),
        }
        for ask in kinds.values():
            ask()  # loads the base

        measured = {("idle", kind): _times(ask, args.requests) for kind, ask in kinds.items()}
        job = client.post("fine-tunes", body={"training_file": upload(client, rows), "model": "ada", "n_epochs": 50})
        results = run_dir_of(server, job["id"]).results
        until(lambda: results.exists() and results.read_bytes().count(b"\n") > 3, within_s=300.0)
        begun, first = time.monotonic(), results.read_bytes().count(b"\n")
        measured |= {("training", kind): _times(ask, args.requests) for kind, ask in kinds.items()}
        assert server.processes(TRAINER), "the job ended before the measurement: give it more data"
        steps_per_s = (results.read_bytes().count(b"\n") - first) / (time.monotonic() - begun)
        client.post("fine-tunes", job["id"], "cancel")

    lines = [(load, kind, *_percentiles(times)) for (load, kind), times in measured.items()]
    print(table(("server", "request", "p50 ms", "p90 ms", "p99 ms", "max ms"), lines))
    print(f"{args.requests} requests each; the job took {steps_per_s:.1f} steps/s meanwhile")
    models_p99_ms = _percentiles(measured["training", "GET /v1/models"])[2]
    completion_max_ms = _percentiles(measured["training", "POST /v1/completions"])[3]
    return conclude(
        "latency_while_training",
        models_p99_ms < MODELS_P99_MS and completion_max_ms < COMPLETION_MAX_MS,
        {
            "models_p99_ms": models_p99_ms,
            "completion_max_ms": completion_max_ms,
            "requests": args.requests,
            "steps_per_s": round(steps_per_s, 2),
        },
    )


def _times(ask: Callable[[], object], requests: int) -> list[float]:
    times = []
    for _ in range(requests):
        begun = time.perf_counter()
        ask()
        times.append((time.perf_counter() - begun) * 1000)
    return sorted(times)


def _percentiles(times: list[float]) -> tuple[float, ...]:
    return tuple(round(times[min(len(times) - 1, int(len(times) * share))], 1) for share in (0.5, 0.9, 0.99, 1.0))


if __name__ == "__main__":
    sys.exit(main())
