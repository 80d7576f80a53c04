"""Claim: a job that is cancelled has no trainer within 2 s, whatever it is at.

    python -m benchmarks.cancelling

Jobs are cancelled while their trainer loads, in the midst of an epoch, and while it validates; seconds are those from
the request to the end of the trainer's process, on a quiet machine.
"""

from __future__ import annotations

import statistics
import sys
import time

from benchmarks.common import conclude, parser, serving, table
from tests.e2e.drill import run_dir_of
from tests.e2e.harness import TRAINER
from tests.e2e.test_phases import PHASES, create
from tests.waiting import until

WITHIN_S = 2.0


def main() -> int:
    """Exit code 0 if the claim holds."""
    options = parser(__doc__)
    options.add_argument("--times", type=int, default=5, help="in each phase")
    args = options.parse_args()
    took_s: dict[str, list[float]] = {phase: [] for phase in PHASES}
    with serving(args, TUNESMITH_TRAINER_NICENESS="0") as server, server.client() as client:
        for phase, reached in PHASES.items():
            for _ in range(args.times):
                job_id = create(client, n_epochs=50)
                run_dir = run_dir_of(server, job_id)
                until(lambda: reached(server, run_dir), within_s=300.0, every_s=0.002)  # noqa: B023
                begun = time.perf_counter()
                client.post("fine-tunes", job_id, "cancel")
                until(lambda: not server.processes(TRAINER))
                took_s[phase].append(time.perf_counter() - begun)
    rows = [(phase, f"{statistics.median(all_s):.2f}", f"{max(all_s):.2f}") for phase, all_s in took_s.items()]
    print(table(("cancelled while", "median s", "longest s"), rows))
    longest_s = max(map(max, took_s.values()))
    return conclude("cancelling", longest_s < WITHIN_S, {"longest_s": round(longest_s, 2)})


if __name__ == "__main__":
    sys.exit(main())
