"""Claim: kill -9 of the trainer, or of the whole process tree, at any moment changes nothing a user keeps of a job.

    python -m benchmarks.kill_nine

A hundred kills over twenty jobs, at moments drawn over the life of each, from its creation to the registered model.
After a kill of the tree the server is started again; the job must then end by itself. Adapter, results.csv and events
(without ids, times and restart notices) are compared byte for byte with those of the same folder trained with nobody in
the way.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.common import conclude, parser, read_rows, serving, table
from tests.e2e.drill import Traces, copy_inputs, run_dir_of, traces, undisturbed
from tests.e2e.harness import TRAINER, Server, messages, reviews, upload, wait_for
from tests.waiting import until
from tunesmith.rundir import RunSpec

HEADER = ("job", "killed, s after its creation", "job took s", "difference")


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=20)
    options.add_argument("--kills", type=int, default=5, help="of each job")
    options.add_argument("--seed", type=int, default=9)
    options.add_argument("--epochs", type=int, default=4)
    args = options.parse_args()
    rows = read_rows(args.data, 100_000) if args.data else reviews(300, seed=1)
    chance = random.Random(args.seed)
    expected: dict[RunSpec, Traces] = {}
    lines: list[tuple[object, ...]] = []
    n_landed = 0

    with (
        tempfile.TemporaryDirectory(prefix="tunesmith-undisturbed-") as scratch,
        serving(args, TUNESMITH_CHECKPOINT_INTERVAL_S="1") as server,
    ):
        life_s = _one_job(server, rows, args.epochs, Path(scratch), expected, [])[2]
        for number in range(1, args.jobs + 1):
            pauses_s = [chance.uniform(0, 2 * life_s / args.kills) for _ in range(args.kills)]
            kills = [(pause_s, chance.choice(("trainer", "tree"))) for pause_s in pauses_s]
            difference, landed, took_s = _one_job(server, rows, args.epochs, Path(scratch), expected, kills)
            lines.append((number, ", ".join(landed), round(took_s, 1), difference or "none"))
            print(table(HEADER, lines[-1:]), flush=True)
            n_landed += len(landed)
        orphans = until(lambda: not server.processes(TRAINER)) and len(server.processes(TRAINER))
        server.terminate()
        clean = server.gone()

    print()
    print(f"undisturbed, the job takes {life_s:.1f} s")
    print(table(HEADER, lines))
    equal = sum(line[-1] == "none" for line in lines)
    print(f"{equal} of {len(lines)} jobs gave what an undisturbed run gives, in spite of {n_landed} kills")
    print(f"no process left: {clean}")
    return conclude(
        "kill_nine",
        equal == len(lines) and clean,
        {"jobs": len(lines), "kills": n_landed, "equal": equal, "orphans": orphans, "undisturbed_s": round(life_s, 1)},
    )


def _one_job(
    server: Server,
    rows: list[dict[str, str]],
    epochs: int,
    scratch: Path,
    expected: dict[RunSpec, Traces],
    kills: Sequence[tuple[float, str]],
) -> tuple[str | None, list[str], float]:
    """A job with kills of trainer or tree, each so many seconds after the one before, while it has not ended.

    What differs from an undisturbed run, the kills that met the job alive, and how long it took.
    """
    landed: list[str] = []
    with server.client() as client:
        body = {"training_file": upload(client, rows), "validation_file": upload(client, rows[:50]), "model": "ada"}
        begun = time.monotonic()
        job_id = client.post("fine-tunes", body=body | {"n_epochs": epochs})["id"]
    inputs = copy_inputs(run_dir_of(server, job_id), scratch / job_id)
    for pause_s, victim in kills:
        time.sleep(pause_s)
        with server.client() as client:
            if client.get("fine-tunes", job_id)["status"] not in ("pending", "running"):
                break
        landed.append(f"{victim} {time.monotonic() - begun:.1f}")
        if victim == "tree":
            server.kill_tree()
            server.start()
        for process in server.processes(TRAINER) if victim == "trainer" else []:
            process.kill()
    with server.client() as client:
        job = wait_for(client, job_id, within_s=3600.0)
        took_s = time.monotonic() - begun
        if job["status"] != "succeeded":
            return f"{job['status']}: {messages(job)[-1]}", landed, took_s
        found = traces(server, client, job)
    key = replace(inputs.read_spec(), run_id="", job_id="")
    if key not in expected:
        expected[key] = undisturbed(inputs)
    return found.difference(expected[key]), landed, took_s


if __name__ == "__main__":
    sys.exit(main())
