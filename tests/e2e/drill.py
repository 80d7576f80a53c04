"""What an undisturbed run would have given, and whether a disturbed one gave the same, byte for byte."""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.e2e.harness import Server
from tests.waiting import until
from tunesmith.client import Client
from tunesmith.core.jobs import INTERRUPTED
from tunesmith.rundir import RunDir

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
NEWS = re.compile(rf"Fine-tune is in the queue\.|Data check |{INTERRUPTED}")
"""What other jobs, interruptions and the doctor make: it is set aside where runs are compared."""
IDS = re.compile(r"(ft|file)-[A-Za-z0-9]{24}|(?<=Uploaded model: )\S+")


@dataclass(frozen=True)
class Traces:
    """What a user keeps of a job."""

    adapter: dict[str, bytes]
    results: bytes
    events: list[str]
    """Messages in order, without ids and times, without news of the queue, of data and notices of restarts."""

    def difference(self, other: Traces) -> str | None:
        """What differs, in words; None if nothing does."""
        for name in ADAPTER_FILES:
            if self.adapter[name] != other.adapter[name]:
                return f"{name} differs"
        if self.results != other.results:
            return _first_difference("results.csv", self.results.decode(), other.results.decode())
        if self.events != other.events:
            return _first_difference("events", "\n".join(self.events), "\n".join(other.events))
        return None


def run_dir_of(server: Server, job_id: str) -> RunDir:
    """The run folder of a job, as soon as the dispatcher has prepared it."""

    def found() -> RunDir | None:
        for path in server.run_dirs():
            run_dir = RunDir(path)
            if run_dir.spec.exists() and run_dir.read_spec().job_id == job_id:
                return run_dir
        return None

    run_dir = until(found, within_s=60.0)
    assert run_dir is not None
    return run_dir


def copy_inputs(run_dir: RunDir, folder: Path) -> RunDir:
    """Spec and data of a run, taken while they are there, for `undisturbed`."""
    folder.mkdir(parents=True)
    for path in (run_dir.spec, run_dir.training_file, run_dir.validation_file):
        if path.exists():
            shutil.copy(path, folder)
    return RunDir(folder)


def undisturbed(inputs: RunDir) -> Traces:
    """Trains on a copy of a run folder with nobody in the way; what the job then must have given."""
    subprocess.run([sys.executable, "-m", "tunesmith.training", str(inputs.path)], check=True)
    outcome = inputs.read_outcome()
    assert outcome is not None
    assert outcome.status == "succeeded", outcome
    progress = [line.message for line in inputs.read_progress(0) if line.kind == "message"]
    events = [
        "Created fine-tune: ID",
        "Fine-tune costs $0.00",
        "Fine-tune enqueued. Queue number: 0",
        "Fine-tune started",
        *progress,
        "Uploaded model: ID",
        "Uploaded result file: ID",
        "Fine-tune succeeded",
    ]
    return Traces(_adapter(inputs.adapter), inputs.results.read_bytes(), events)


def traces(server: Server, client: Client, job: dict[str, Any]) -> Traces:
    """What a job that succeeded has given."""
    adapter = server.home / "adapters" / _model_id(server, job["id"])
    messages = [IDS.sub("ID", event["message"]) for event in job["events"]]
    return Traces(
        adapter=_adapter(adapter),
        results=client.content(job["result_files"][0]["id"]),
        events=[message for message in messages if not NEWS.match(message)],
    )


def _model_id(server: Server, job_id: str) -> str:
    with closing(sqlite3.connect(f"file:{server.home / 'tunesmith.db'}?mode=ro", uri=True)) as database:
        ((model_id,),) = database.execute("SELECT id FROM models WHERE job_id = ?", (job_id,)).fetchall()
    return str(model_id)


def _adapter(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ADAPTER_FILES}


def _first_difference(what: str, mine: str, theirs: str) -> str:
    ours, others = mine.splitlines(), theirs.splitlines()
    for number, (one, other) in enumerate(zip(ours, others, strict=False), start=1):
        if one != other:
            return f"{what} line {number}: {one!r} against {other!r}"
    return f"{what}: {len(ours)} lines against {len(others)}"
