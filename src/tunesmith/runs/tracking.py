"""Trackers at work: one process for each integration of a job, fed from the job's events, watched, started again.

No job waits for anything here: it has a thread and processes of its own, reads what the dispatcher has written, and
tells of its troubles in events.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.core.events import Events
from tunesmith.core.files import File
from tunesmith.core.jobs import Job, Jobs
from tunesmith.core.statuses import ENDED
from tunesmith.core.trackings import Tracking, Trackings
from tunesmith.rundir import PARENT_PID, write_json
from tunesmith.tracking.base import KINDS, Subject
from tunesmith.tracking.folder import Row, TrackingDir, TrackingSpec, read_json

logger = logging.getLogger(__name__)

TRACKER = (sys.executable, "-m", "tunesmith.tracking")
MAX_FAILURES = 5
"""A tracker that died or got stuck is started again this often, each time after a longer pause: a minute in all."""
STALLED_AFTER_S = 300.0
"""A tracker that gave no sign of life for so long is stuck. It may wait 90 s for a connection, and longer for the last
of its data to leave."""
NICENESS = 15
"""Below trainers: a tracker has all the time there is."""
SECRETS = ("TUNESMITH_OWNER_KEY", "TUNESMITH_DATABASE_URL", "TUNESMITH_BLOBS_URL")
FAR_AWAY = "http"


@dataclass(slots=True)
class _Watched:
    """What is remembered of a tracker between rounds."""

    folder: TrackingDir
    fed_event: int
    """Events up to here are in its folder."""
    child: subprocess.Popen[bytes] | None = None
    not_before: float = 0.0
    pulse: int | None = None
    pulse_at: float = 0.0
    stuck: bool = False


@dataclass
class Trackers:
    """Looks after the trackers of all jobs. `run` is to be called in a thread that lives as long as they may."""

    jobs: Jobs
    events: Events
    trackings: Trackings
    home: Path
    """Tracking folders are made here, one for each integration of a job."""
    command: Sequence[str] = TRACKER
    stalled_after_s: float = STALLED_AFTER_S
    tick_s: float = 1.0
    monotonic: Callable[[], float] = time.monotonic
    _watched: dict[tuple[str, int], _Watched] = field(default_factory=dict, init=False)

    def run(self, stop: threading.Event) -> None:
        """Rounds until `stop` is set; then the trackers are ended. They go on at the next start."""
        while not stop.is_set():
            try:
                self.tick()
            except Exception:  # of the database, say: it will be there again
                logger.exception("trackers")
            stop.wait(self.tick_s)
        self.drain()

    def tick(self) -> None:
        """One round over all jobs that are tracked; waits for nobody."""
        open_trackings = self.trackings.open()
        for tracking in open_trackings:
            try:
                self._look_after(tracking)
            except OSError:  # of a full disk, say: the numbers are in the events, and are written when there is room
                logger.exception("tracker of job=%s", tracking.job_id)
        for key in self._watched.keys() - {(tracking.job_id, tracking.number) for tracking in open_trackings}:
            _kill(self._watched.pop(key).child)

    def drain(self) -> None:
        """Ends every tracker at once: what it had not sent, it sends when it is started again."""
        for watched in self._watched.values():
            _kill(watched.child)
        self._watched.clear()

    def _look_after(self, tracking: Tracking) -> None:
        job = self.jobs.look(tracking.job_id)  # before its events: of a job that has ended, all are there then
        if job.hyperparameters is None:
            if job.status in ENDED:  # it never began to train
                self.trackings.move(tracking, "ended")
            return
        key = tracking.job_id, tracking.number
        if key not in self._watched:
            folder = TrackingDir(self.home / f"{tracking.job_id}-{tracking.number}")
            fed = folder.read_rows()
            self._watched[key] = _Watched(folder, fed[-1].event if fed else 0)
        watched = self._watched[key]
        self._feed(watched, tracking, job)
        if watched.child is None:
            self._start(watched)
        elif (code := watched.child.poll()) is not None:
            self._conclude(watched, tracking, job, code)
        else:
            self._feel_pulse(watched)
            self._note_begin(watched, tracking, job)

    def _feed(self, watched: _Watched, tracking: Tracking, job: Job) -> None:
        """Everything that is new of the job into the folder."""
        folder = watched.folder
        if not folder.spec.exists():
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.write_spec(_spec(job, tracking.number))
        events = self.events.list(job.id, watched.fed_event)
        rows = [_row(event.id, event.data) for event in events if event.kind == "metrics" and event.data]
        if rows:
            folder.append_rows(rows)
            watched.fed_event = rows[-1].event
        if job.status in ENDED and not folder.end.exists():
            write_json(folder.end, _end(job))

    def _start(self, watched: _Watched) -> None:
        now = self.monotonic()
        if now < watched.not_before:
            return
        watched.folder.outcome.unlink(missing_ok=True)
        with watched.folder.log.open("ab") as log:
            watched.child = subprocess.Popen(
                [*self.command, str(watched.folder.path)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=tracker_environment(os.environ),
                process_group=0,  # with all that its package starts
            )
        os.setpriority(os.PRIO_PROCESS, watched.child.pid, NICENESS)
        watched.pulse, watched.pulse_at, watched.stuck = None, now, False
        logger.info("tracker started folder=%s pid=%d", watched.folder.path.name, watched.child.pid)

    def _feel_pulse(self, watched: _Watched) -> None:
        """Ends a tracker that is stuck."""
        try:
            pulse = watched.folder.heartbeat.stat().st_mtime_ns
        except FileNotFoundError:
            pulse = None
        now = self.monotonic()
        if pulse != watched.pulse:
            watched.pulse, watched.pulse_at = pulse, now
        elif now - watched.pulse_at > self.stalled_after_s:
            watched.stuck = True
            _kill(watched.child)

    def _note_begin(self, watched: _Watched, tracking: Tracking, job: Job) -> None:
        if tracking.status != "waiting" or (began := read_json(watched.folder.began)) is None:
            return
        where = began["where"]
        if not where.startswith(FAR_AWAY):  # a folder of the server says nothing to its users
            where = "offline; the run stays on the server, for its operator to upload with `wandb sync`"
        self.trackings.move(tracking, "following", message=f"{_title(job, tracking)} follows this fine-tune: {where}")

    def _conclude(self, watched: _Watched, tracking: Tracking, job: Job, code: int) -> None:
        """The tracker has ended: with its work done, for good, or to be started again."""
        _kill(watched.child)  # what it may have left behind
        watched.child = None
        self._note_begin(watched, tracking, job)
        outcome, title = watched.folder.read_outcome(), _title(job, tracking)
        if outcome is not None and outcome.status == "done":
            self.trackings.move(tracking, "ended", message=f"{title} has all the numbers of this fine-tune")
        elif outcome is not None:
            self._give_up(tracking, f"{title} cannot follow this fine-tune: {outcome.reason}")
        elif tracking.failures >= MAX_FAILURES:
            self._give_up(tracking, f"{title} does not follow this fine-tune: its tracker {_how(watched, code)} again")
        else:
            watched.not_before = self.monotonic() + 2.0**tracking.failures
            self.trackings.move(
                tracking,
                "following" if watched.folder.began.exists() else "waiting",
                message=f"The tracker for {title} {_how(watched, code)} and is started again. Training goes on",
                level="warn",
                failed=True,
            )

    def _give_up(self, tracking: Tracking, reason: str) -> None:
        way_out = f"Training goes on; once it has succeeded, `tunesmith wandb sync -i {tracking.job_id}` makes the run"
        self.trackings.move(tracking, "given up", message=f"{reason}. {way_out}", level="warn", failed=True)


def tracker_environment(inherited: Mapping[str, str]) -> dict[str, str]:
    """The inherited environment, where trackers find their keys, without what is secret to the server."""
    kept = {name: value for name, value in inherited.items() if name not in SECRETS}
    return kept | {PARENT_PID: str(os.getpid()), "OMP_NUM_THREADS": "1"}


def _spec(job: Job, number: int) -> TrackingSpec:
    integration = job.asked.integrations[number]
    assert job.hyperparameters is not None
    config: dict[str, Any] = {
        "id": job.id,
        "model": job.model,
        "base": job.base_name,
        "parent": job.parent_name,
        "suffix": job.asked.suffix,
        "seed": job.seed,
        "created_at": job.created_unix,
        "hyperparams": asdict(job.hyperparameters),
        "training_examples": job.training_examples,
        "training_file": _file(job.training_file),
        "validation_file": None if job.validation_file is None else _file(job.validation_file),
    }
    subject = Subject(
        job_id=job.id,
        project=integration.project,
        config=config,
        name=integration.name,
        entity=integration.entity,
        tags=integration.tags,
    )
    return TrackingSpec(integration.kind, subject)


def _file(file: File) -> dict[str, Any]:
    return {"id": file.id, "filename": file.filename, "bytes": file.size_bytes}


def _row(event: int, data: Mapping[str, Any]) -> Row:
    return Row(event, int(data["step"]), {name: value for name, value in data.items() if name != "step"})


def _end(job: Job) -> dict[str, Any]:
    return {
        "status": job.status,
        "fine_tuned_model": job.fine_tuned_model,
        "error": job.error,
        "finished_at": job.finished_unix,
    }


def _title(job: Job, tracking: Tracking) -> str:
    return KINDS[job.asked.integrations[tracking.number].kind].title


def _how(watched: _Watched, code: int) -> str:
    if watched.stuck:
        return "gave no sign of life"
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended by itself (exit code {code})"


def _kill(child: subprocess.Popen[bytes] | None) -> None:
    """Ends a tracker and what it has started, at once."""
    if child is None:
        return
    with suppress(ProcessLookupError):  # nothing of it is left
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
