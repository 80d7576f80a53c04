"""Many small jobs in one step against one after another: the ratio, and that every adapter has the same bytes.

    python -m benchmarks.together [--jobs 16] [--batch-sizes 1,2,4] [--rounds 3]

Both ways train the same run folders with the trainer itself, in one process, in turn; the base is loaded beforehand.
What a job of its own costs on top, the start of a process, is told beside it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from benchmarks.common import conclude, parser, read_rows, table
from tests.e2e.harness import reviews
from tunesmith.core.bases import BOX_LEARNING_RATES, Bases
from tunesmith.core.requests import DEFAULT_LORA_RANK, DEFAULT_LORA_SCALE
from tunesmith.rundir import ResolvedHyperparameters, RunDir, RunSpec
from tunesmith.training.host import Host
from tunesmith.training.together import Shared


def main() -> int:
    """Exit code 0 if together is faster at batch size 1 and no byte differs."""
    options = parser(__doc__)
    options.add_argument("--jobs", type=int, default=16)
    options.add_argument("--examples", type=int, default=32, help="of each job")
    options.add_argument("--batch-sizes", default="1,2,4")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--box", default="babbage", help="which base of the box, without --base")
    asked = options.parse_args()
    rows, ratios, differing = [], {}, 0
    with tempfile.TemporaryDirectory(prefix="tunesmith-together-") as folder:
        base = asked.base or Bases(Path(folder)).folder(asked.box)
        _timed(
            _together, _make_runs(Path(folder) / "warm-up", base, 1, argparse.Namespace(**vars(asked) | {"jobs": 2}))
        )
        for batch_size in map(int, asked.batch_sizes.split(",")):
            times: dict[str, list[tuple[float, float]]] = {"alone": [], "together": []}
            prints: dict[str, set[tuple[str, ...]]] = {"alone": set(), "together": set()}
            for round_ in range(asked.rounds):
                for way, train in (("alone", _one_after_another), ("together", _together)):
                    runs = _make_runs(Path(folder) / f"{way}-{batch_size}-{round_}", base, batch_size, asked)
                    times[way].append(_timed(train, runs))
                    prints[way].add(tuple(_fingerprint(run_dir) for run_dir in runs))
                    shutil.rmtree(runs[0].path.parent)
            differing += len(prints["alone"] | prints["together"]) - 1
            steps = asked.jobs * -(-asked.examples // batch_size)
            for clock, name in enumerate(("wall", "processor")):
                alone, together = (
                    1_000 * median(taken[clock] for taken in times[way]) / steps for way in ("alone", "together")
                )
                ratios[f"{name} {batch_size}"] = round(alone / together, 2)
                rows.append([batch_size, name, alone, together, f"{alone / together:.2f}"])
    print(table(["batch size", "time", "alone, ms a step", "together, ms a job's step", "ratio"], rows))
    start_s = _start_s()
    print(f"starting a trainer, which each job alone does: {start_s:.1f} s; sets of bytes that differ: {differing}")
    facts = {"jobs": asked.jobs, "ratios": ratios, "differing": differing, "start_s": start_s}
    return conclude("together", differing == 0 and ratios.get("processor 1", 2.0) > 1, facts)


def _make_runs(folder: Path, base: Path, batch_size: int, asked: argparse.Namespace) -> list[RunDir]:
    runs = []
    for job in range(asked.jobs):
        run_dir = RunDir(folder / f"job-{job}")
        run_dir.path.mkdir(parents=True)
        data, count = asked.data, asked.examples
        examples = reviews(count, job) if data is None else read_rows(data, count * (job + 1))[-count:]
        run_dir.training_file.write_text("".join(json.dumps(example) + "\n" for example in examples))
        run_dir.write_spec(
            RunSpec(
                run_id=f"run-{job}",
                job_id=f"ft-{job}",
                base_dir=str(base),
                parent_adapter_dir=None,
                context_tokens=2_048,
                hyperparameters=ResolvedHyperparameters(1, batch_size, 0.1, 0.01),
                base_learning_rate=BOX_LEARNING_RATES["babbage"],
                lora_rank=DEFAULT_LORA_RANK,
                lora_alpha=DEFAULT_LORA_RANK * DEFAULT_LORA_SCALE,
                seed=job,
                threads=asked.threads,
                checkpoint_interval_s=1e9,
            )
        )
        runs.append(run_dir)
    return runs


def _timed(train: Callable[[Shared, list[RunDir]], None], runs: list[RunDir]) -> tuple[float, float]:
    """Wall and processor seconds; the latter of one thread are to be trusted on a machine with other work."""
    with Shared(time.monotonic) as shared:
        shared.base(Path(runs[0].read_spec().base_dir))
        begun, busy = time.perf_counter(), time.process_time()
        train(shared, runs)
        return time.perf_counter() - begun, time.process_time() - busy


def _together(shared: Shared, runs: list[RunDir]) -> None:
    host = Host(shared, lambda: False, None)
    for run_dir in runs:
        host.take(run_dir)
    while host.working:
        host.step()


def _one_after_another(shared: Shared, runs: list[RunDir]) -> None:
    for run_dir in runs:
        _together(shared, [run_dir])


def _fingerprint(run_dir: RunDir) -> str:
    outcome = run_dir.read_outcome()
    assert outcome is not None and outcome.status == "succeeded", outcome
    files = (run_dir.adapter / "adapter_model.safetensors", run_dir.results)
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _start_s() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import tunesmith.training.host"], check=True)
    return time.perf_counter() - begun


if __name__ == "__main__":
    sys.exit(main())
