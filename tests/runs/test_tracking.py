"""Trackers that work, hang, die and cannot work, as real processes beside a real job. None of them touches the job."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from tests.runs.platform import Platform
from tests.waiting import until
from tunesmith.core.integrations import Integration
from tunesmith.core.jobs import Claim, Job
from tunesmith.core.trackings import Trackings
from tunesmith.rundir import ProgressLine
from tunesmith.runs.tracking import MAX_FAILURES, Trackers, tracker_environment
from tunesmith.tracking.folder import TrackingDir

WANDB = Integration("wandb", "reviews", tags=("small",))
FOLLOWS = """
import pathlib, sys, time
from tunesmith.rundir import write_json  # whole or not at all, as a tracker writes
folder = pathlib.Path(sys.argv[1])
write_json(folder / "began.json", {"where": "https://wandb.example/run"})
while not (folder / "end.json").exists():
    (folder / "heartbeat").touch()
    time.sleep(0.01)
write_json(folder / "outcome.json", {"status": "done", "reason": None})
"""
HANGS = "import time; time.sleep(600)"
DIES = "import sys; sys.exit(3)"
CANNOT = """
import pathlib, sys
from tunesmith.rundir import write_json
outcome = {"status": "unusable", "reason": "it takes no API key from this environment"}
write_json(pathlib.Path(sys.argv[1]) / "outcome.json", outcome)
"""


class Followed:
    """A job that is at work, and what looks after its tracker."""

    def __init__(self, platform: Platform, program: str, *integrations: Integration, stalled_after_s: float = 60.0):
        self.platform = platform
        self.job = platform.create(integrations=integrations or (WANDB,))
        self.trackings = Trackings(platform.store, platform.events)
        self.trackers = self.another(program, stalled_after_s=stalled_after_s)
        self.claim: Claim | None = None
        self.said = 0

    def another(self, program: str, **settings: float) -> Trackers:
        """The same after a restart of the server."""
        platform = self.platform
        command = [sys.executable, "-c", program]
        return Trackers(platform.jobs, platform.events, self.trackings, platform.home / "tracking", command, **settings)

    @property
    def folder(self) -> TrackingDir:
        return TrackingDir(self.platform.home / "tracking" / f"{self.job.id}-0")

    def start(self) -> Job:
        jobs = self.platform.jobs
        self.claim = jobs.claim("here", 600)
        assert self.claim is not None
        jobs.started(self.claim, "1:1", jobs.hyperparameters(self.job, self.job.training_examples))
        return self.job

    def step(self, *steps: int) -> None:
        assert self.claim is not None
        lines = [
            ProgressLine(self.said + n, "info", f"Step {step}", {"step": step, "training_loss": 1 / step}, "metrics")
            for n, step in enumerate(steps, start=1)
        ]
        self.said += len(lines)
        self.platform.jobs.record(self.claim, lines)

    def end(self) -> None:
        assert self.claim is not None
        self.platform.jobs.fail(self.claim, "It was only a test.")

    def until_said(self, words: str, trackers: Trackers | None = None) -> str:
        """Rounds until an event says so."""
        looking_after = trackers or self.trackers

        def heard() -> str | None:
            looking_after.tick()
            return next((message for message in self.messages if words in message), None)

        return until(heard) or ""

    @property
    def messages(self) -> list[str]:
        return [event.message for event in self.platform.events.list(self.job.id) if event.kind == "message"]


@pytest.fixture
def followed(platform: Platform) -> Iterator[Followed]:
    followed = Followed(platform, FOLLOWS)
    yield followed
    followed.trackers.drain()


def test_a_tracker_is_fed_from_the_events_and_says_where_it_is(followed: Followed) -> None:
    followed.trackers.tick()
    assert not followed.folder.path.exists()  # there is nothing to tell of a job that waits
    followed.start()
    followed.step(1, 2)
    said = followed.until_said("follows")
    assert said == "Weights & Biases follows this fine-tune: https://wandb.example/run"
    followed.step(3)
    followed.end()
    followed.until_said("has all the numbers")
    assert [(row.step, row.values) for row in followed.folder.read_rows()] == [
        (step, {"training_loss": 1 / step}) for step in (1, 2, 3)
    ]
    spec = followed.folder.read_spec()
    assert (spec.kind, spec.subject.project, spec.subject.tags) == ("wandb", "reviews", ("small",))
    assert spec.subject.config["hyperparams"]["n_epochs"] == 4
    assert followed.trackings.open() == []
    assert followed.messages.count(said) == 1


def test_rows_are_fed_once_across_restarts_of_the_server(followed: Followed) -> None:
    followed.start()
    followed.step(1, 2)
    followed.until_said("follows")
    followed.trackers.drain()
    repeated = followed.folder.rows.read_bytes()
    with followed.folder.rows.open(
        "ab"
    ) as torn:  # of a disk that was full, and a server that was killed while it wrote
        torn.write(repeated + b'{"event": 9, "st')
    followed.step(3)
    again = followed.another(FOLLOWS)
    followed.end()
    followed.until_said("has all the numbers", again)
    assert [row.step for row in followed.folder.read_rows()] == [1, 2, 3]
    assert len([message for message in followed.messages if "follows this" in message]) == 1


def test_a_killed_tracker_is_started_again(followed: Followed) -> None:
    followed.start()
    followed.until_said("follows")
    (watched,) = followed.trackers._watched.values()
    assert watched.child is not None
    os.kill(watched.child.pid, signal.SIGKILL)
    said = followed.until_said("SIGKILL")
    assert said == "The tracker for Weights & Biases was ended by SIGKILL and is started again. Training goes on"
    followed.end()
    followed.trackers.monotonic = lambda: float("inf")  # no pause
    followed.until_said("has all the numbers")


@pytest.mark.parametrize(
    ("program", "stalled_after_s", "words"),
    [(DIES, 600.0, "ended by itself (exit code 3)"), (HANGS, 0.2, "gave no sign of life")],
)
def test_a_tracker_that_never_works_is_given_up(
    platform: Platform, program: str, stalled_after_s: float, words: str
) -> None:
    followed = Followed(platform, program, stalled_after_s=stalled_after_s)
    skipped_s = 0.0
    true_clock = followed.trackers.monotonic
    followed.trackers.monotonic = lambda: true_clock() + skipped_s
    followed.start()

    def given_up() -> bool:
        nonlocal skipped_s
        if all(watched.child is None for watched in followed.trackers._watched.values()):
            skipped_s += 60  # the pause is over
        followed.trackers.tick()
        return not followed.trackings.open()

    until(given_up)
    last = followed.messages[-1]
    assert words in last
    assert f"`tunesmith wandb sync -i {followed.job.id}`" in last
    assert sum(words in message for message in followed.messages) == MAX_FAILURES + 1
    assert followed.platform.jobs.look(followed.job.id).status == "running"  # the job has not noticed


def test_a_tracker_that_cannot_work_is_not_started_again(platform: Platform) -> None:
    followed = Followed(platform, CANNOT)
    followed.start()
    said = followed.until_said("cannot follow")
    assert said.startswith(
        "Weights & Biases cannot follow this fine-tune: it takes no API key from this environment. Training goes on"
    )
    assert followed.trackings.open() == []


def test_a_job_that_ends_before_it_trains_needs_no_tracker(platform: Platform) -> None:
    followed = Followed(platform, DIES)
    platform.jobs.cancel(platform.caller, followed.job.id)
    followed.trackers.tick()
    assert followed.trackings.open() == []
    assert followed.messages[-1] == "Fine-tune cancelled"


def test_each_integration_has_a_tracker_of_its_own(platform: Platform) -> None:
    followed = Followed(platform, FOLLOWS, WANDB, Integration("wandb", "another"))
    followed.start()
    followed.end()
    until(lambda: followed.trackers.tick() or not followed.trackings.open())
    projects = [TrackingDir(path).read_spec().subject.project for path in (platform.home / "tracking").iterdir()]
    assert sorted(projects) == ["another", "reviews"]


def test_what_is_secret_to_the_server_is_not_handed_on() -> None:
    inherited = {"WANDB_API_KEY": "for the tracker", "TUNESMITH_OWNER_KEY": "sk-owner", "TUNESMITH_DATABASE_URL": "x"}
    handed_on = tracker_environment(inherited)
    assert handed_on["WANDB_API_KEY"] == "for the tracker"
    assert not {"TUNESMITH_OWNER_KEY", "TUNESMITH_DATABASE_URL"} & handed_on.keys()
