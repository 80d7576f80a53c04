"""What dispatchers do with jobs: claim, report and end them under a lease that only one holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from sqlalchemy import update

from tests.core.conftest import START_UNIX, World, rows, trained
from tunesmith.core.accounts import Role
from tunesmith.core.jobs import INTERRUPTED, Claim, Job, JobStatus
from tunesmith.core.models import SWEEP_AFTER_S
from tunesmith.core.queue import Waiting, in_turn
from tunesmith.core.requests import resolve
from tunesmith.core.schema import files
from tunesmith.errors import LeaseLost
from tunesmith.rundir import ProgressLine

LEASE_S = 60.0


def claim(world: World, holder: str = "d") -> Claim:
    claim = world.jobs.claim(holder, LEASE_S)
    assert claim is not None
    return claim


def start(world: World, held: Claim) -> None:
    world.jobs.started(held, "handle", resolve(held.job.asked, held.job.training_examples))


def succeed(world: World, held: Claim) -> Job:
    adapter, results = trained(world.home / "runs" / os.urandom(8).hex())
    return world.jobs.succeed(held, adapter_dir=adapter, results_csv=results, trained_tokens=1000)


def every_write(world: World, held: Claim) -> list[object]:
    """Each of a dispatcher's guarded writes, as a call."""
    return [
        lambda: start(world, held),
        lambda: world.jobs.heartbeat(held, LEASE_S),
        lambda: world.jobs.record(held, [ProgressLine(99, "info", "from the dead")]),
        lambda: world.jobs.record(held, []),
        lambda: succeed(world, held),
        lambda: world.jobs.fail(held, "from the dead"),
    ]


def assert_lost(world: World, held: Claim) -> None:
    """Nothing that `held` tries changes anything."""
    before = (world.jobs.list(world.owner), world.messages(held.job.id), world.leftovers())
    for write in every_write(world, held):
        with pytest.raises(LeaseLost, match=held.job.id):
            write()  # type: ignore[operator]
    world.jobs.release(held)
    assert (world.jobs.list(world.owner), world.messages(held.job.id), world.leftovers()) == before


def test_nothing_to_claim(world: World) -> None:
    assert world.jobs.claim("d", LEASE_S) is None
    assert not world.jobs.awaited()


def test_a_job_is_awaited_while_it_waits_for_its_turn_or_for_somebody_to_hold_it(world: World) -> None:
    job = world.job()
    assert world.jobs.awaited()
    world.jobs.pause(world.owner, job.id)
    assert not world.jobs.awaited()
    world.jobs.resume(world.owner, job.id)
    start(world, claim(world))
    assert not world.jobs.awaited()
    world.clock.now += LEASE_S + 1
    assert world.jobs.awaited()
    world.jobs.release(claim(world))
    assert world.jobs.awaited()
    world.jobs.cancel(world.owner, job.id)
    assert not world.jobs.awaited()


def test_the_whole_life_of_a_job(world: World) -> None:
    job = world.job(suffix="Custom model name")
    world.jobs.enqueue()
    held = claim(world)
    assert (held.job.id, held.job.status, held.lease) == (job.id, JobStatus.RUNNING, 1)
    assert (held.handle, held.progress_seq) == (None, 0)
    assert held.run_id.startswith("run-")
    assert held.job.hyperparameters is None

    resolved = world.jobs.hyperparameters(held.job, held.job.training_examples)
    world.jobs.started(held, "pid 1", resolved)
    assert world.jobs.get(world.owner, job.id).hyperparameters == resolved
    world.jobs.record(held, [ProgressLine(1, "info", "Completed epoch 1/4", {"step": 10, "training_loss": 0.4})])
    world.clock.now = START_UNIX + 100
    world.jobs.heartbeat(held, LEASE_S)
    done = succeed(world, held)

    name = "ada:ft-your-org:custom-model-name-2022-02-16-08-28-20"
    assert (done.status, done.fine_tuned_model, done.updated_unix) == ("succeeded", name, START_UNIX + 100)
    assert done == world.jobs.get(world.owner, job.id)
    assert world.messages(job.id) == [
        f"Created fine-tune: {job.id}",
        "Fine-tune costs $0.00",
        "Fine-tune enqueued. Queue number: 0",
        "Fine-tune started",
        "Completed epoch 1/4",
        f"Uploaded model: {name}",
        f"Uploaded result file: {done.result_files[0].id}",
        "Fine-tune succeeded",
    ]
    events = world.events.list(job.id)
    assert [event.id for event in events] == list(range(1, 9))
    assert events[4].data == {"step": 10, "training_loss": 0.4}
    assert {event.level for event in events} == {"info"}
    assert world.models.resolve(world.owner, name).adapter_dir is not None
    assert_lost(world, held)


def test_a_failure_is_told_in_words(world: World) -> None:
    held = claim(world, "d" if world.job() else "")
    world.jobs.fail(held, "The majority of examples are empty.")
    job = world.jobs.get(world.owner, held.job.id)
    assert (job.status, job.error) == ("failed", "The majority of examples are empty.")
    event = world.events.list(job.id)[-1]
    assert (event.level, event.message) == ("error", "Fine-tune failed. The majority of examples are empty.")
    assert_lost(world, held)


def test_a_job_claimed_before_it_was_enqueued_has_all_its_events(world: World) -> None:
    job = world.job()
    start(world, claim(world))
    world.jobs.enqueue()
    assert world.messages(job.id)[1:] == [
        "Fine-tune costs $0.00",
        "Fine-tune enqueued. Queue number: 0",
        "Fine-tune started",
    ]


def test_a_held_job_is_not_claimed_until_its_lease_runs_out(world: World) -> None:
    world.job()
    first = claim(world, "one")
    world.clock.now += LEASE_S - 1
    assert world.jobs.claim("two", LEASE_S) is None
    world.jobs.heartbeat(first, LEASE_S)
    world.clock.now += LEASE_S - 1
    assert world.jobs.claim("two", LEASE_S) is None
    world.clock.now += 1
    second = claim(world, "two")
    assert second.job.id == first.job.id
    assert second.lease == first.lease + 1
    assert second.run_id == first.run_id
    assert_lost(world, first)
    succeed(world, second)


def test_a_late_heartbeat_saves_a_lease_that_nobody_took(world: World) -> None:
    world.job()
    held = claim(world)
    world.clock.now += 10 * LEASE_S
    world.jobs.heartbeat(held, LEASE_S)
    assert world.jobs.claim("two", LEASE_S) is None


def test_the_successor_goes_on_where_the_first_stood(world: World) -> None:
    job = world.job()
    first = claim(world, "one")
    start(world, first)
    lines = [ProgressLine(seq, "info", f"line {seq}") for seq in range(1, 5)]
    world.jobs.record(first, lines[:2])
    world.jobs.record(first, lines[:2])
    world.clock.now += LEASE_S
    second = claim(world, "two")
    assert (second.handle, second.progress_seq) == ("handle", 2)
    world.jobs.started(second, "another handle", resolve(job.asked, 999_999))
    world.jobs.record(second, lines)  # a resumed trainer repeats its lines
    told = ["Fine-tune started", "line 1", "line 2", INTERRUPTED, "line 3", "line 4"]
    assert world.messages(job.id)[3:] == told
    assert [event.level for event in world.events.list(job.id) if event.message == INTERRUPTED] == ["warn"]
    resolved = world.jobs.get(world.owner, job.id).hyperparameters
    assert resolved is not None
    assert resolved.batch_size == 1  # as first resolved
    world.jobs.release(second)
    assert claim(world, "three").handle == "another handle"


def test_a_released_job_is_claimed_at_once_before_pending_ones(world: World) -> None:
    world.job()
    second = world.job()
    held = claim(world)
    world.jobs.release(held)
    assert world.jobs.get(world.owner, held.job.id).status is JobStatus.RUNNING
    again = claim(world)
    assert again.job.id == held.job.id
    assert_lost(world, held)
    assert claim(world).job.id == second.id


def test_a_restarted_dispatcher_frees_what_its_predecessor_held(world: World) -> None:
    for _ in range(3):
        world.job()
    mine, also_mine, others = claim(world, "me"), claim(world, "me"), claim(world, "other")
    world.jobs.release_all("me")
    again = [claim(world, "me").job.id, claim(world, "me").job.id]
    assert again == [mine.job.id, also_mine.job.id]
    assert world.jobs.claim("me", LEASE_S) is None
    world.jobs.heartbeat(others, LEASE_S)


def test_a_cancelled_job_is_lost_to_its_dispatcher(world: World) -> None:
    job = world.job()
    held = claim(world)
    world.jobs.cancel(world.owner, job.id)
    assert_lost(world, held)
    assert world.messages(job.id)[-1] == "Fine-tune cancelled"
    assert world.jobs.claim("d", LEASE_S) is None


def test_a_pending_job_whose_file_is_gone_fails_in_words(world: World) -> None:
    """Deleting it is refused; a row restored from an older backup is not."""
    job, other = world.job(), world.job()
    with world.store.transaction() as connection:
        connection.execute(update(files).where(files.c.id == job.training_file.id).values(status="deleted"))
    assert claim(world).job.id == other.id
    failed = world.jobs.get(world.owner, job.id)
    assert failed.status is JobStatus.FAILED
    assert world.messages(job.id)[-1].startswith(f"Fine-tune failed. The file {job.training_file.id} (train.jsonl) was")


def test_queue_numbers_count_the_jobs_ahead_and_change_only_with_them(world: World) -> None:
    first, second, third = world.job(), world.job(), world.job()
    for _ in range(3):
        world.jobs.enqueue()
    assert world.messages(third.id)[1:] == ["Fine-tune costs $0.00", "Fine-tune enqueued. Queue number: 2"]
    claim(world)
    world.jobs.cancel(world.owner, second.id)
    world.jobs.enqueue()
    world.jobs.enqueue()
    assert world.messages(third.id)[3:] == ["Fine-tune is in the queue. Queue number: 0"]
    assert world.messages(first.id)[2:] == ["Fine-tune enqueued. Queue number: 0"]


def test_organizations_take_turns(world: World) -> None:
    mine = [world.job() for _ in range(4)]
    other = [world.job(world.stranger) for _ in range(2)]
    taken = [claim(world).job.id for _ in range(6)]
    assert taken == [job.id for job in (mine[0], other[0], mine[1], other[1], mine[2], mine[3])]
    late, later = world.job(), world.job(world.stranger)
    assert claim(world).job.id == later.id  # their last turn is longer ago
    assert claim(world).job.id == late.id


def test_the_queue_is_the_order_of_claims(world: World) -> None:
    third = world.accounts.create_organization("Third")
    callers = [
        world.owner,
        world.stranger,
        world.accounts.authenticate(world.accounts.create_key(third, Role.OWNER, "x")[1]),
    ]
    for caller in (0, 0, 1, 0, 2, 1, 2, 2, 0):
        world.job(callers[caller])
    claim(world)
    world.jobs.enqueue()
    announced = {}
    for caller in callers:
        for job in world.jobs.list(caller):
            if job.status is JobStatus.PENDING:
                announced[int(world.messages(job.id)[-1].rsplit(" ", 1)[1])] = job.id
    assert [announced[number] for number in sorted(announced)] == [claim(world).job.id for _ in range(8)]


def test_in_turn_prefers_who_has_waited_longest_for_a_turn() -> None:
    def waiting(job_id: str, organization_id: str, position: int, last_turn: int) -> Waiting:
        return Waiting(job_id, organization_id, position, last_turn, None, 0.0)

    queue = [waiting("a1", "a", 1, 9), waiting("b1", "b", 2, 4), waiting("c1", "c", 3, 0), waiting("b2", "b", 4, 4)]
    assert [job.job_id for job in in_turn(reversed(queue))] == ["c1", "b1", "a1", "b2"]
    assert in_turn([]) == []


def test_two_dispatchers_never_hold_the_same_job(world: World) -> None:
    """Two threads race for thirty jobs and end them; each job is claimed, and ended, exactly once."""
    training = world.upload(rows(("a", " b")))
    for _ in range(30):
        world.job(training_file=training.id)
    claims: list[Claim] = []
    barrier = threading.Barrier(2)

    def dispatch(holder: str) -> None:
        barrier.wait()
        while (held := world.jobs.claim(holder, LEASE_S)) is not None:
            claims.append(held)
            start(world, held)
            world.jobs.record(held, [ProgressLine(1, "info", f"by {holder}")])
            world.jobs.fail(held, holder)

    threads = [threading.Thread(target=dispatch, args=(holder,)) for holder in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({held.job.id for held in claims}) == len(claims) == 30
    for job in world.jobs.list(world.owner):
        assert job.status is JobStatus.FAILED
        events = world.events.list(job.id)
        assert [event.id for event in events] == list(range(1, len(events) + 1))
        by = [event.message.split()[-1] for event in events if event.message.startswith(("by", "Fine-tune failed"))]
        assert by == [job.error, job.error]


def test_dispatchers_that_steal_from_each_other_end_a_job_once(world: World) -> None:
    """Leases of no length: every claim takes the job from whoever has it, and whoever ends it was the last to claim."""
    job = world.job()
    barrier = threading.Barrier(3)

    def dispatch(holder: str) -> None:
        barrier.wait()
        for seq in range(1, 200):
            held = world.jobs.claim(holder, 0)
            if held is None:
                return
            with suppress(LeaseLost):
                world.jobs.record(held, [ProgressLine(held.progress_seq + 1, "info", f"line {held.progress_seq + 1}")])
                if seq >= 10:
                    succeed(world, held)

    threads = [threading.Thread(target=dispatch, args=(holder,)) for holder in ("one", "two", "three")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ended = world.jobs.get(world.owner, job.id)
    assert ended.status is JobStatus.SUCCEEDED
    messages = world.messages(job.id)
    lines = [message for message in messages if message.startswith("line")]
    assert lines == [f"line {number}" for number in range(1, len(lines) + 1)]
    assert messages.count("Fine-tune succeeded") == 1
    assert messages[-1] == "Fine-tune succeeded"
    assert len(world.models.list(world.owner)) == len(world.bases.list()) + 1
    (adapter,) = (world.home / "adapters").iterdir()  # the losers' copies are gone
    assert {path.name for path in adapter.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert len(world.files.list(world.owner, "fine-tune-results")) == 1


DIES_IN_SUCCEED = """
import os, signal, sys
from pathlib import Path
from tunesmith.core.bases import Bases
from tunesmith.core.blobs import Blobs
from tunesmith.core.events import Events
from tunesmith.core.files import Files
from tunesmith.core.jobs import Jobs
from tunesmith.core.models import Models
from tunesmith.core.store import Store

home, url, step = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
store = Store(url)
files = Files(store, Blobs((home / "files").as_uri()), 10**6)
bases = Bases(home)
models, events = Models(store, bases, home), Events(store)
jobs = Jobs(store, files, models, bases, events)
claim = jobs.claim("doomed", 0)
owner, name = {"files": files, "models": models, "events": events}[step.split(".")[0]], step.split(".")[1]
call = getattr(owner, name)

def die(*args, **kwargs):
    call(*args, **kwargs)
    os.kill(os.getpid(), signal.SIGKILL)

setattr(owner, name, die)
jobs.succeed(claim, adapter_dir=home / "run" / "adapter", results_csv=home / "run" / "results.csv", trained_tokens=1)
"""


@pytest.mark.parametrize("step", ["models.keep", "files.keep", "files.insert", "models.insert", "events.append"])
def test_a_dispatcher_killed_while_it_ends_a_job_can_be_followed(world: World, step: str) -> None:
    job = world.job()
    adapter, results = trained(world.home / "run")
    killed = subprocess.run([sys.executable, "-c", DIES_IN_SUCCEED, world.home, world.database_url, step], timeout=60)
    assert killed.returncode == -signal.SIGKILL

    assert world.jobs.get(world.owner, job.id).status is JobStatus.RUNNING
    assert world.files.list(world.owner, "fine-tune-results") == []
    assert len(world.models.list(world.owner)) == len(world.bases.list())
    world.clock.now = time.time()  # the doomed one looked at the real clock
    done = world.jobs.succeed(claim(world), adapter_dir=adapter, results_csv=results, trained_tokens=1)
    assert world.messages(job.id)[-1] == "Fine-tune succeeded"
    assert len([message for message in world.messages(job.id) if message.startswith("Uploaded")]) == 2

    world.clock.now = time.time() + SWEEP_AFTER_S + 60
    assert world.models.sweep() == 1
    assert world.files.sweep() == (0 if step == "models.keep" else 1)
    assert done.fine_tuned_model is not None
    ref = world.models.resolve(world.owner, done.fine_tuned_model)
    assert ref.adapter_dir is not None
    assert [path.name for path in (world.home / "adapters").iterdir()] == [ref.adapter_dir.name]
    assert b"".join(world.files.content(world.owner, done.result_files[0].id)) == results.read_bytes()


def test_a_run_folder_without_results_leaves_nothing(world: World, tmp_path: Path) -> None:
    world.job()
    held = claim(world)
    before = world.leftovers()
    adapter, _ = trained(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        world.jobs.succeed(held, adapter_dir=adapter, results_csv=tmp_path / "none.csv", trained_tokens=1)
    with pytest.raises(FileNotFoundError):
        world.jobs.succeed(held, adapter_dir=tmp_path / "none", results_csv=tmp_path / "none.csv", trained_tokens=1)
    assert world.leftovers() == before
    world.jobs.heartbeat(held, LEASE_S)
