"""Claim: kill -9 of the trainer, or of the whole process tree, at any moment changes nothing a user keeps of a job.

    python -m benchmarks.kill_nine

Each moment is drawn over the whole life of a job, from its creation to the registered model. After a kill of the tree
the server is started again; the job must then end by itself. Adapter, results.csv and events (without ids, times and
restart notices) are compared byte for byte with those of the same run folder trained with nobody in the way.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.common import conclude, parser, read_rows, serving, table
from tests.e2e.drill import Traces, copy_inputs, run_dir_of, traces, undisturbed
from tests.e2e.harness import TRAINER, Server, messages, reviews, upload, wait_for
from tests.waiting import until
from tunesmith.rundir import RunSpec


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument("--moments", type=int, default=10)
    options.add_argument("--seed", type=int, default=9)
    options.add_argument("--epochs", type=int, default=4)
    args = options.parse_args()
    rows = read_rows(args.data, 100_000) if args.data else reviews(300, seed=1)
    chance = random.Random(args.seed)
    expected: dict[RunSpec, Traces] = {}
    lines: list[tuple[object, ...]] = []

    with (
        tempfile.TemporaryDirectory(prefix="tunesmith-undisturbed-") as scratch,
        serving(args, TUNESMITH_CHECKPOINT_INTERVAL_S="1") as server,
    ):
        life_s = _one_job(server, rows, args.epochs, Path(scratch), expected, "none", 0.0)[1]
        for number in range(1, args.moments + 1):
            moment_s = chance.uniform(0, life_s)
            victim = "trainer" if number % 2 else "tree"
            difference, took_s = _one_job(server, rows, args.epochs, Path(scratch), expected, victim, moment_s)
            lines.append((number, victim, round(moment_s, 2), round(took_s, 1), difference or "none"))
            print(table(("moment", "killed", "after s", "job took s", "difference"), lines[-1:]), flush=True)
        orphans = until(lambda: not server.processes(TRAINER)) and len(server.processes(TRAINER))
        server.terminate()
        clean = server.gone()

    print()
    print(f"undisturbed, the job takes {life_s:.1f} s")
    print(table(("moment", "killed", "after s", "job took s", "difference"), lines))
    equal = sum(line[-1] == "none" for line in lines)
    print(f"{equal} of {len(lines)} jobs gave what an undisturbed run gives; no process left: {clean}")
    return conclude(
        "kill_nine",
        equal == len(lines) and clean,
        {"moments": len(lines), "equal": equal, "orphans": orphans, "undisturbed_s": round(life_s, 1)},
    )


def _one_job(
    server: Server,
    rows: list[dict[str, str]],
    epochs: int,
    scratch: Path,
    expected: dict[RunSpec, Traces],
    victim: str,
    moment_s: float,
) -> tuple[str | None, float]:
    """A job with a kill `moment_s` after its creation; what differs from an undisturbed run, and how long it took."""
    with server.client() as client:
        body = {"training_file": upload(client, rows), "validation_file": upload(client, rows[:50]), "model": "ada"}
        begun = time.monotonic()
        job_id = client.post("fine-tunes", body=body | {"n_epochs": epochs})["id"]
    inputs = copy_inputs(run_dir_of(server, job_id), scratch / job_id)
    time.sleep(max(0.0, begun + moment_s - time.monotonic()))
    match victim:
        case "trainer":
            for process in server.processes(TRAINER):
                process.kill()
        case "tree":
            server.kill_tree()
            server.start()
    with server.client() as client:
        job = wait_for(client, job_id, within_s=3600.0)
        took_s = time.monotonic() - begun
        if job["status"] != "succeeded":
            return f"{job['status']}: {messages(job)[-1]}", took_s
        found = traces(server, client, job)
    key = replace(inputs.read_spec(), run_id="", job_id="")
    if key not in expected:
        expected[key] = undisturbed(inputs)
    return found.difference(expected[key]), took_s


if __name__ == "__main__":
    sys.exit(main())
