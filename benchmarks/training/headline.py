"""Claim: from an uploaded file of 5,000 tweets to the first answer of the tuned model we are several times as fast.

    python -m benchmarks.training.headline --peers /path/to/peers/bin/python [--datasets DIR] [--peer-steps 60]

Ours: a real server, a file uploaded, a job with every hyperparameter left out, a completion. The peer: `script.py`, as
one writes it today with TRL and PEFT, in a process of its own, on the same base, rows, epochs, batch, rank and learning
rate, at the setting of TRL that `compare` found fastest for short rows. Each has the machine to itself. Without
`--datasets` the tweets are made up. With `--peer-steps` the peer's training is cut after so many steps and its time
extrapolated to all of them; its accuracy is then that of a model not trained to the end, and is not reported.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import conclude, parser, read_rows, serving, table
from benchmarks.training.compare import QUIET, ROOT
from tests.e2e.drill import run_dir_of
from tests.e2e.harness import Server, reviews, upload, wait_for
from tunesmith.client import Client

HELD_OUT_ROWS = 1_000
TARGET = 4.0
ASKED_AT_ONCE = 20
LONGEST_JOB_S = 4 * 3600.0

Rows = Sequence[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Ours:
    """What a user of ours waited, and got."""

    seconds: float
    """From the beginning of the upload to the first answer."""
    accuracy: float
    run: dict[str, Any]
    """The spec of the run."""


def main() -> int:
    """Exit code 0 if the ratio is met."""
    options = parser(__doc__)
    options.set_defaults(threads=2)
    options.add_argument("--peers", type=Path, required=True, help="the Python of the peers' environment")
    options.add_argument("--datasets", type=Path, help="folder with tweet_sentiment/train.jsonl and valid.jsonl")
    options.add_argument("--peer-steps", type=int, help="cut the peer's training after these")
    options.add_argument("--rows", type=int, default=5_000)
    args = options.parse_args()
    train, held_out = _rows(args.datasets, args.rows)

    with (
        tempfile.TemporaryDirectory(prefix="tunesmith-benchmark-") as scratch,
        serving(args, TUNESMITH_TRAINER_NICENESS="0") as server,
        server.client() as client,
    ):
        ours = _ours(client, server, train, held_out)
        peer = _peer(args, Path(scratch), ours.run, train, held_out)
    steps, all_steps = peer["steps"], peer["all_steps"]
    train_s = peer["train_s"] * all_steps / steps
    peer_s = peer["import_s"] + peer["prepare_s"] + train_s + peer["answer_s"]
    ratio = peer_s / ours.seconds
    whole = steps == all_steps
    accuracy = f"{peer['accuracy']:.3f}" if whole else "not trained to the end"
    lines = [
        ("ours", ours.seconds, f"{ours.accuracy:.3f}"),
        (f"TRL + PEFT, {steps} of {all_steps} steps", peer_s, accuracy),
    ]
    print(table(("from file to first answer", "s", "held-out accuracy"), lines))
    facts = {
        "ratio": round(ratio, 2),
        "seconds": round(ours.seconds, 1),
        "accuracy": ours.accuracy,
        "peer_seconds": round(peer_s, 1),
        "peer_stages_s": {name: round(peer[name], 1) for name in ("import_s", "prepare_s", "train_s", "answer_s")},
        "peer_train_cpu_s": round(peer["train_cpu_s"], 1),
        "peer_steps": f"{steps} of {all_steps}",
        "peer_accuracy": peer["accuracy"] if whole else None,
        "hyperparameters": ours.run["hyperparameters"],
        "rows": len(train),
        "threads": args.threads,
    }
    return conclude("headline", ratio >= TARGET, facts)


def _rows(datasets: Path | None, n: int) -> tuple[Rows, Rows]:
    if datasets is None:
        every = reviews(n + HELD_OUT_ROWS, seed=1)
        return every[:n], every[n:]
    folder = datasets / "tweet_sentiment"
    return read_rows(folder / "train.jsonl", n), read_rows(folder / "valid.jsonl", HELD_OUT_ROWS)


def _ours(client: Client, server: Server, train: Rows, held_out: Rows) -> Ours:
    began = time.monotonic()
    job = client.post("fine-tunes", body={"training_file": upload(client, train, "tweets.jsonl"), "model": "ada"})
    spec = json.loads(run_dir_of(server, job["id"]).spec.read_text())
    job = wait_for(client, job["id"], within_s=LONGEST_JOB_S)
    assert job["status"] == "succeeded", job["events"][-1]
    model = job["fine_tuned_model"]
    _answers(client, model, held_out[:1])
    seconds = time.monotonic() - began
    right = 0
    for start in range(0, len(held_out), ASKED_AT_ONCE):
        asked = held_out[start : start + ASKED_AT_ONCE]
        given = _answers(client, model, asked)
        right += sum(row["completion"] == answer for row, answer in zip(asked, given, strict=True))
    return Ours(seconds, right / len(held_out), spec)


def _answers(client: Client, model: str, rows: Rows) -> list[str]:
    question = {"model": model, "prompt": [row["prompt"] for row in rows], "max_tokens": 1, "temperature": 0}
    choices = client.post("completions", body=question)["choices"]
    return [choice["text"] for choice in sorted(choices, key=lambda choice: choice["index"])]


def _peer(args: argparse.Namespace, scratch: Path, run: dict[str, Any], train: Rows, held_out: Rows) -> dict[str, Any]:
    for name, rows in (("train", train), ("held_out", held_out)):
        (scratch / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = run["hyperparameters"]
    task = {
        "base": run["base_dir"],
        "folder": str(scratch),
        "epochs": asked["n_epochs"],
        "batch": asked["batch_size"],
        "learning_rate": run["base_learning_rate"] * asked["learning_rate_multiplier"],
        "rank": run["lora_rank"],
        "alpha": run["lora_alpha"],
        "threads": args.threads,
        "most_steps": args.peer_steps,
    }
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(args.threads)}
    command = [str(args.peers), "-m", "benchmarks.training.script", json.dumps(task)]
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main())
