"""Whatever users, two dispatchers, time and crashes do to jobs in whatever order, the store makes sense."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from tests.core.conftest import open_world, rows, trained
from tunesmith.core.jobs import Claim, JobStatus
from tunesmith.core.requests import resolve
from tunesmith.core.statuses import ENDED, MOVES
from tunesmith.errors import InvalidRequest, LeaseLost
from tunesmith.rundir import ProgressLine

LEASE_S = 10
LAST_WORDS = {
    JobStatus.SUCCEEDED: "Fine-tune succeeded",
    JobStatus.FAILED: "Fine-tune failed. because",
    JobStatus.CANCELLED: "Fine-tune cancelled",
}


class Dispatching(RuleBasedStateMachine):
    """Keeps beside the store who holds which job, as a dispatcher would have to be told, and compares."""

    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp())
        self.world = open_world(self.home / "home", f"sqlite:///{self.home / 'tunesmith.db'}")
        self.training = self.world.upload(rows(("a", " b"))).id
        self.adapter, self.results = trained(self.home / "run")
        self.holding: dict[str, int] = {}
        """Job id -> the lease that may write; absent: none may."""
        self.expires: dict[str, float] = {}
        self.leases: dict[str, int] = {}
        self.statuses: dict[str, JobStatus] = {}

    def teardown(self) -> None:
        self.world.store.close()
        shutil.rmtree(self.home)

    @precondition(lambda self: len(self.statuses) < 4)
    @rule()
    def create(self) -> None:
        job = self.world.job(training_file=self.training)
        self.statuses[job.id] = job.status

    @rule(seconds=st.sampled_from([1, LEASE_S]))
    def time_passes(self, seconds: int) -> None:
        self.world.clock.now += seconds

    @rule()
    def enqueue(self) -> None:
        self.world.jobs.enqueue()

    @rule(target=claims, holder=st.sampled_from(["one", "two"]))
    def claim(self, holder: str) -> object:
        taken = self.world.jobs.claim(holder, LEASE_S)
        live = [job_id for job_id, status in self.statuses.items() if status not in ENDED]
        held = [job_id for job_id in self.holding if self.expires[job_id] > self.world.clock.now]
        assert (taken is None) == (set(live) == set(held))
        if taken is None:
            return multiple()
        assert taken.job.id not in held
        assert taken.lease == self.leases.get(taken.job.id, 0) + 1
        self.leases[taken.job.id] = self.holding[taken.job.id] = taken.lease
        self.expires[taken.job.id] = self.world.clock.now + LEASE_S
        return taken

    def valid(self, claim: Claim) -> bool:
        return self.holding.get(claim.job.id) == claim.lease

    @rule(claim=claims)
    def start(self, claim: Claim) -> None:
        try:
            self.world.jobs.started(claim, "handle", resolve(claim.job.asked, 1))
            assert self.valid(claim)
        except LeaseLost:
            assert not self.valid(claim)

    @rule(claim=claims)
    def heartbeat(self, claim: Claim) -> None:
        try:
            self.world.jobs.heartbeat(claim, LEASE_S)
            assert self.valid(claim)
            if self.expires[claim.job.id] < self.world.clock.now + 0.75 * LEASE_S:
                self.expires[claim.job.id] = self.world.clock.now + LEASE_S
        except LeaseLost:
            assert not self.valid(claim)

    @rule(claim=claims, upto=st.integers(1, 5))
    def record(self, claim: Claim, upto: int) -> None:
        try:
            self.world.jobs.record(claim, [ProgressLine(seq, "info", f"line {seq}") for seq in range(1, upto + 1)])
            assert self.valid(claim)
        except LeaseLost:
            assert not self.valid(claim)

    @rule(claim=consumes(claims), how=st.sampled_from(["succeed", "fail"]))
    def end(self, claim: Claim, how: str) -> None:
        try:
            if how == "fail":
                self.world.jobs.fail(claim, "because")
            else:
                self.world.jobs.succeed(claim, adapter_dir=self.adapter, results_csv=self.results, trained_tokens=1)
            assert self.valid(claim)
            del self.holding[claim.job.id]
        except LeaseLost:
            assert not self.valid(claim)

    @rule(claim=claims)
    def release(self, claim: Claim) -> None:
        self.world.jobs.release(claim)
        if self.valid(claim):
            del self.holding[claim.job.id]

    @rule(holder=st.sampled_from(["one", "two"]))
    def restart(self, holder: str) -> None:
        """What the holder had is free; the model asks the store who that was, nothing else tells."""
        self.world.jobs.release_all(holder)
        with self.world.store.reading() as connection:
            still = dict(connection.exec_driver_sql("SELECT id, lease FROM jobs WHERE lease_holder IS NOT NULL").all())
            others = connection.exec_driver_sql("SELECT count(*) FROM jobs WHERE lease_holder = ?", (holder,)).scalar()
        assert others == 0
        assert still.items() <= self.holding.items()
        self.holding = still

    @precondition(lambda self: self.statuses)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(list(self.statuses)))
        try:
            self.world.jobs.cancel(self.world.owner, job_id)
            assert self.statuses[job_id] not in ENDED
            self.holding.pop(job_id, None)
        except InvalidRequest:
            assert self.statuses[job_id] in ENDED

    @invariant()
    def the_store_makes_sense(self) -> None:
        succeeded = []
        for job in self.world.jobs.list(self.world.owner):
            before, now = self.statuses[job.id], job.status
            assert now == before or now in MOVES[before]
            self.statuses[job.id] = now
            events = self.world.events.list(job.id)
            messages = [event.message for event in events]
            assert [event.id for event in events] == list(range(1, len(events) + 1))
            assert [m for m in messages if m in LAST_WORDS.values()] == ([LAST_WORDS[now]] if now in ENDED else [])
            assert now not in ENDED or messages[-1] == LAST_WORDS[now]
            lines = [message for message in messages if message.startswith("line")]
            assert lines == [f"line {number}" for number in range(1, len(lines) + 1)]
            assert messages.count("Fine-tune started") == (job.hyperparameters is not None)
            if now is JobStatus.SUCCEEDED:
                succeeded.append(job)
        names = {model.name for model in self.world.models.list(self.world.owner) if model.adapter_dir}
        assert names == {job.fine_tuned_model for job in succeeded}
        assert len(names) == len(succeeded)
        results = self.world.files.list(self.world.owner, "fine-tune-results")
        assert {file.id for file in results} == {job.result_files[0].id for job in succeeded}
        kept = {path for path in self.world.leftovers() if path.count("/") == 1}
        assert len(kept) == 1 + len(results) + len(names)


TestDispatching = Dispatching.TestCase
TestDispatching.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
