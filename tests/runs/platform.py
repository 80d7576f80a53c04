"""The real nouns on a temporary home, and executors that stand in for training."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.core.accounts import Caller
from tunesmith.core.bases import Bases
from tunesmith.core.events import Events
from tunesmith.core.files import Files
from tunesmith.core.jobs import FineTuneRequest, Job, Jobs
from tunesmith.core.models import Models
from tunesmith.core.store import Store
from tunesmith.rundir import Outcome, ProgressLine, RunDir, RunSpec
from tunesmith.runs.dispatcher import Dispatcher
from tunesmith.runs.executor import Executor, RunState

Train = Callable[[Path], None]


def report(run_dir: RunDir, *messages: str) -> None:
    lines = [ProgressLine(seq, "info", message) for seq, message in enumerate(messages, start=1)]
    text = "".join(json.dumps({"seq": li.seq, "level": li.level, "message": li.message}) + "\n" for li in lines)
    run_dir.progress.write_text(text)


def finish(path: Path) -> None:
    """What a trainer leaves behind, without the training."""
    run_dir = RunDir(path)
    report(run_dir, "Completed epoch 1/1")
    run_dir.results.write_text("step,training_loss\n1,0.5\n")
    run_dir.adapter.mkdir(exist_ok=True)
    (run_dir.adapter / "adapter_config.json").write_text("{}")
    (run_dir.adapter / "adapter_model.safetensors").write_bytes(b"weights")
    run_dir.checkpoints.mkdir(exist_ok=True)
    run_dir.write_outcome(Outcome("succeeded", trained_tokens=12, steps=1))


@dataclass
class Clock:
    now: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Platform:
    """The real nouns on a temporary home, one caller, and dispatchers on demand."""

    home: Path
    clock: Clock
    store: Store
    caller: Caller
    files: Files
    models: Models
    bases: Bases
    jobs: Jobs
    events: Events
    parity: Callable[[RunDir, RunSpec], str | None] = field(default=lambda run_dir, spec: None)

    def dispatcher(self, executor: Executor, **settings: object) -> Dispatcher:
        return Dispatcher(
            jobs=self.jobs,
            files=self.files,
            bases=self.bases,
            models=self.models,
            executor=executor,
            parity=lambda run_dir, spec: self.parity(run_dir, spec),
            home=self.home,
            holder="here",
            monotonic=self.clock,
            **settings,  # type: ignore[arg-type]
        )

    def create(self, rows: int = 3, validation: bool = False, **asked: object) -> Job:
        content = b'{"prompt": "a ->", "completion": " b"}\n' * rows
        first = self.files.create(self.caller, filename="t.jsonl", purpose="fine-tune", chunks=io.BytesIO(content))
        second = None
        if validation:
            second = self.files.create(self.caller, filename="v.jsonl", purpose="fine-tune", chunks=io.BytesIO(content))
        return self.jobs.create(
            self.caller,
            FineTuneRequest(
                training_file=first.id,
                validation_file=None if second is None else second.id,
                **({"model": "ada"} | asked),  # type: ignore[arg-type]
            ),
        )

    def get(self, job: Job) -> Job:
        return self.jobs.get(self.caller, job.id)

    def messages(self, job: Job) -> list[str]:
        return [event.message for event in self.events.list(job.id)]

    def run_dir(self) -> RunDir:
        (path,) = (self.home / "runs").iterdir()
        return RunDir(path)


class Watched:
    """An executor of runs that last until they are told otherwise."""

    def __init__(self) -> None:
        self.states: dict[str, RunState] = {}
        self.stopped: list[tuple[str, float]] = []
        self.deaf = False

    def start(self, run_dir: Path, beside: str | None = None) -> str:
        handle = f"{run_dir.name}/{len(self.states)}"
        self.states[handle] = RunState.RUNNING
        return handle

    def state(self, handle: str) -> RunState:
        return self.states.get(handle, RunState.LOST)

    def stop(self, handle: str, grace_s: float) -> None:
        self.stopped.append((handle, grace_s))
        if not self.deaf and handle in self.states:
            self.states[handle] = RunState.EXITED
