from __future__ import annotations

import errno
import os
import signal
import sys
import threading
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.runs.platform import Clock, Platform, Watched, finish
from tests.waiting import until
from tunesmith.core.jobs import INTERRUPTED, JobStatus
from tunesmith.errors import EngineUnavailable
from tunesmith.rundir import Outcome, RunDir, RunSpec, Snapshot
from tunesmith.runs.dispatcher import FAULTS, FRUITLESS_STARTS, TIDY_EVERY_S
from tunesmith.runs.executor import InlineExecutor, RunState
from tunesmith.runs.local import LocalExecutor


def test_with_nothing_to_do_no_writer_is_kept_waiting(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher = platform.dispatcher(InlineExecutor(finish))
    dispatcher.tick()  # tidies first
    transaction = Mock(wraps=platform.store.transaction)
    monkeypatch.setattr(platform.store, "transaction", transaction)
    dispatcher.tick()
    transaction.assert_not_called()

    job = platform.create()
    transaction.reset_mock()
    dispatcher.tick()
    transaction.assert_called()
    assert platform.get(job).status is not JobStatus.PENDING


def test_a_job_becomes_a_model(platform: Platform, tiny_base: Path) -> None:
    specs: list[RunSpec] = []

    def train(path: Path) -> None:
        specs.append(RunDir(path).read_spec())
        assert RunDir(path).training_file.read_bytes().count(b"\n") == 3
        assert RunDir(path).validation_file.read_bytes().count(b"\n") == 3
        finish(path)

    job = platform.create(validation=True, n_epochs=2)
    dispatcher = platform.dispatcher(InlineExecutor(train), trainer_threads=3, checkpoint_interval_s=7.0)
    dispatcher.tick()
    dispatcher.tick()

    ended = platform.get(job)
    assert ended.status is JobStatus.SUCCEEDED
    assert ended.fine_tuned_model is not None
    assert platform.messages(job) == [
        f"Created fine-tune: {job.id}",
        "Fine-tune costs $0.00",
        "Fine-tune enqueued. Queue number: 0",
        "Fine-tune started",
        "Completed epoch 1/1",
        f"Uploaded model: {ended.fine_tuned_model}",
        f"Uploaded result file: {ended.result_files[0].id}",
        "Fine-tune succeeded",
    ]
    adapter_dir = platform.models.get(platform.caller, ended.fine_tuned_model).adapter_dir
    assert adapter_dir is not None
    assert (adapter_dir / "adapter_model.safetensors").read_bytes() == b"weights"
    (spec,) = specs
    assert (spec.job_id, spec.threads, spec.checkpoint_interval_s, spec.seed) == (job.id, 3, 7.0, job.seed)
    assert (spec.base_dir, spec.parent_adapter_dir) == (str(tiny_base), None)
    assert spec.hyperparameters == ended.hyperparameters
    assert spec.hyperparameters.n_epochs == 2

    dispatcher.tick()
    left = {path.name for path in platform.run_dir().path.iterdir()}
    assert left == {"spec.json", "progress.jsonl", "results.csv", "outcome.json"}


def test_tuning_a_tuned_model_starts_from_its_adapter(platform: Platform) -> None:
    dispatcher = platform.dispatcher(InlineExecutor(finish))
    first = platform.create()
    for _ in range(3):
        dispatcher.tick()
    parent = platform.get(first).fine_tuned_model
    assert parent is not None
    second = platform.create(model=parent)
    for _ in range(3):
        dispatcher.tick()
    assert platform.get(second).status is JobStatus.SUCCEEDED
    specs = [RunDir(path).read_spec() for path in (platform.home / "runs").iterdir()]
    adapters = {spec.job_id: spec.parent_adapter_dir for spec in specs}
    assert adapters == {
        first.id: None,
        second.id: str(platform.models.get(platform.caller, parent).adapter_dir),
    }


def test_what_the_trainer_says_is_the_users_reason(platform: Platform) -> None:
    job = platform.create()
    dispatcher = platform.dispatcher(
        InlineExecutor(lambda path: RunDir(path).write_outcome(Outcome("failed", error="The loss was not a number.")))
    )
    dispatcher.tick()
    dispatcher.tick()
    assert platform.get(job).status is JobStatus.FAILED
    assert platform.get(job).error == "The loss was not a number."
    assert platform.messages(job)[-1] == "Fine-tune failed. The loss was not a number."


def test_an_adapter_that_does_not_serve_as_it_trained_is_not_registered(platform: Platform) -> None:
    platform.parity = lambda run_dir, spec: "token 1 of row 3 differs"
    job = platform.create()
    dispatcher = platform.dispatcher(InlineExecutor(finish))
    dispatcher.tick()
    dispatcher.tick()
    assert platform.get(job).error == "token 1 of row 3 differs"
    assert platform.get(job).fine_tuned_model is None
    assert len(platform.models.list(platform.caller)) == len(platform.bases.list())


def test_a_trainer_that_dies_is_started_again_and_goes_on(platform: Platform) -> None:
    starts = 0

    def train(path: Path) -> None:
        nonlocal starts
        starts += 1
        if starts < 8:  # more often than fruitless starts are allowed, but each gets further
            (RunDir(path).checkpoints / f"step-{starts}").mkdir(parents=True)
            raise MemoryError
        finish(path)

    job = platform.create()
    dispatcher = platform.dispatcher(InlineExecutor(train))
    for _ in range(10):
        dispatcher.tick()
    assert platform.get(job).status is JobStatus.SUCCEEDED
    assert platform.messages(job).count("Fine-tune started") == 1
    assert platform.messages(job).count(INTERRUPTED) == 7


def test_a_trainer_that_keeps_dying_at_one_place_fails_the_job_with_its_last_words(platform: Platform) -> None:
    starts = 0

    def train(path: Path) -> None:
        nonlocal starts
        starts += 1
        raise MemoryError("no room for 3 GiB")

    job = platform.create()
    dispatcher = platform.dispatcher(InlineExecutor(train))
    began = platform.clock.now
    while platform.get(job).status is not JobStatus.FAILED:
        dispatcher.tick()
        platform.clock.now += 0.5
    assert starts == 1 + FRUITLESS_STARTS
    assert 60 < platform.clock.now - began < 120
    assert "MemoryError: no room for 3 GiB" in (platform.get(job).error or "")


def test_a_full_disk_that_has_room_again_within_a_minute_fails_nothing(platform: Platform) -> None:
    full_until = platform.clock.now + 55

    def train(path: Path) -> None:
        if platform.clock.now < full_until:
            raise OSError(errno.ENOSPC, "No space left on device")
        finish(path)

    job = platform.create()
    dispatcher = platform.dispatcher(InlineExecutor(train))
    while platform.get(job).status in {JobStatus.PENDING, JobStatus.RUNNING}:
        dispatcher.tick()
        platform.clock.now += 0.5
    assert platform.get(job).status is JobStatus.SUCCEEDED


def test_a_start_that_the_store_could_not_take_is_noted_later(platform: Platform) -> None:
    def train(path: Path) -> None:
        rename(platform, "events", "misplaced")
        finish(path)

    job = platform.create()
    dispatcher = platform.dispatcher(InlineExecutor(train))
    dispatcher.tick()
    rename(platform, "misplaced", "events")
    platform.clock.now += 31
    dispatcher.tick()
    assert platform.get(job).status is JobStatus.SUCCEEDED
    assert platform.get(job).hyperparameters is not None
    assert platform.messages(job)[3:5] == ["Fine-tune started", "Completed epoch 1/1"]


def test_a_store_out_of_order_for_a_minute_fails_nothing(platform: Platform) -> None:
    """At any moment of a lease: also while it is due for renewal, which is tried at every tick."""
    job = platform.create()
    executor = Watched()
    dispatcher = platform.dispatcher(executor, stalled_after_s=3600.0)
    dispatcher.tick()
    platform.clock.now += 50
    rename(platform, "jobs", "misplaced")
    for _ in range(120):
        platform.clock.now += 0.5
        dispatcher.tick()
    rename(platform, "misplaced", "jobs")
    platform.clock.now += 31
    dispatcher.tick()
    assert platform.get(job).status is JobStatus.RUNNING
    (handle,) = executor.states
    finish(platform.run_dir().path)
    executor.states[handle] = RunState.EXITED
    dispatcher.tick()
    assert platform.get(job).status is JobStatus.SUCCEEDED


def rename(platform: Platform, table: str, name: str) -> None:
    """Makes every use of a table fail, or work again."""
    with platform.store.transaction() as connection:
        connection.exec_driver_sql(f"ALTER TABLE {table} RENAME TO {name}")


def test_as_many_are_trained_at_once_as_there_are_places(platform: Platform) -> None:
    executor = Watched()
    jobs = [platform.create(method="full") for _ in range(3)]
    dispatcher = platform.dispatcher(executor, max_concurrent_runs=2)
    dispatcher.tick()
    assert [platform.get(job).status for job in jobs] == [JobStatus.RUNNING, JobStatus.RUNNING, JobStatus.PENDING]
    (ended,) = (path for path in (platform.home / "runs").iterdir() if RunDir(path).read_spec().job_id == jobs[0].id)
    RunDir(ended).write_outcome(Outcome("failed", error="The loss was not a number."))
    executor.states[next(handle for handle in executor.states if handle.startswith(ended.name))] = RunState.EXITED
    dispatcher.tick()
    assert [platform.get(job).status for job in jobs] == [JobStatus.FAILED, JobStatus.RUNNING, JobStatus.RUNNING]
    assert len(executor.states) == 3


def test_one_bad_job_never_blocks_the_rest(platform: Platform) -> None:
    bad, good = platform.create(), platform.create()

    def train(path: Path) -> None:
        if RunDir(path).read_spec().job_id == bad.id:
            RunDir(path).progress.write_text("not JSON\n")
        else:
            finish(path)

    dispatcher = platform.dispatcher(InlineExecutor(train), max_concurrent_runs=2)
    for _ in range(3):
        dispatcher.tick()
    assert platform.get(good).status is JobStatus.SUCCEEDED
    assert platform.get(bad).status is JobStatus.RUNNING
    for _ in range(FAULTS + 2):
        platform.clock.now += 31
        dispatcher.tick()
    assert platform.get(bad).status is JobStatus.FAILED
    assert "JSONDecodeError" in (platform.get(bad).error or "")


def test_an_engine_that_is_starting_again_delays_a_job_and_does_not_fail_it(platform: Platform) -> None:
    asked = 0

    def parity(run_dir: RunDir, spec: RunSpec) -> str | None:
        nonlocal asked
        asked += 1
        if asked < 4:
            raise EngineUnavailable("The engine is being started again.")
        return None

    platform.parity = parity
    job = platform.create()
    dispatcher = platform.dispatcher(InlineExecutor(finish))
    for _ in range(2):
        dispatcher.tick()
    dispatcher.tick()
    assert asked == 1, "asked again without a pause"
    for _ in range(4):
        platform.clock.now += 31
        dispatcher.tick()
    assert platform.get(job).status is JobStatus.SUCCEEDED


def test_a_model_is_loaded_before_anybody_hears_of_it(platform: Platform) -> None:
    job = platform.create()
    seen = []

    def warm(base_dir: Path, adapter_dir: Path) -> None:
        seen.append((base_dir, sorted(path.name for path in adapter_dir.iterdir()), platform.get(job).status))

    dispatcher = platform.dispatcher(InlineExecutor(finish), warm=warm)
    for _ in range(2):
        dispatcher.tick()

    assert platform.get(job).status is JobStatus.SUCCEEDED
    ((base_dir, files, status),) = seen
    assert base_dir.is_dir()
    assert files == ["adapter_config.json", "adapter_model.safetensors"]
    assert status is JobStatus.RUNNING


def test_leases_are_renewed_before_expired_ones_are_taken_over(platform: Platform) -> None:
    job = platform.create()
    dispatcher = platform.dispatcher(Watched(), max_concurrent_runs=2, lease_s=60.0)
    dispatcher.tick()
    platform.clock.now += 3600  # the machine slept
    dispatcher.tick()
    dispatcher.tick()
    assert platform.get(job).status is JobStatus.RUNNING
    assert len(dispatcher._runs) == 1
    assert dispatcher._runs[platform.run_dir().path.name].claim.lease == 1


def test_a_cancelled_job_is_stopped_at_once_and_its_folder_pruned(platform: Platform) -> None:
    executor = Watched()
    executor.deaf = True
    job = platform.create()
    dispatcher = platform.dispatcher(executor)
    dispatcher.tick()
    (handle,) = executor.states
    platform.jobs.cancel(platform.caller, job.id)
    dispatcher.tick()
    assert executor.stopped[0] == (handle, 0.0)
    assert platform.run_dir().training_file.exists(), "pruned under a living trainer"
    executor.deaf = False
    dispatcher.tick()
    dispatcher.tick()
    assert not platform.run_dir().training_file.exists()
    assert platform.get(job).status is JobStatus.CANCELLED


def test_a_paused_job_saves_what_it_has_and_makes_room_and_goes_on(platform: Platform) -> None:
    executor = Watched()
    executor.deaf = True
    first, second = platform.create(), platform.create()
    dispatcher = platform.dispatcher(executor)
    dispatcher.tick()
    (handle,) = executor.states
    platform.jobs.pause(platform.caller, first.id)
    dispatcher.tick()
    assert executor.stopped == [(handle, dispatcher.drain_s)], "it was not given time for a checkpoint"
    assert len(dispatcher._runs) == 1
    executor.states[handle] = RunState.EXITED
    dispatcher.tick()
    assert {run.claim.job.id for run in dispatcher._runs.values()} == {second.id}

    platform.jobs.cancel(platform.caller, second.id)
    executor.deaf = False
    platform.jobs.resume(platform.caller, first.id)
    dispatcher.tick()
    dispatcher.tick()
    (run,) = dispatcher._runs.values()
    assert run.claim.job.id == first.id
    assert run.handle is not None and run.handle.startswith(run.claim.run_id)
    assert INTERRUPTED not in platform.messages(first)


def test_a_job_paused_as_it_ended_succeeds(platform: Platform) -> None:
    executor = Watched()
    job = platform.create()
    dispatcher = platform.dispatcher(executor)
    dispatcher.tick()
    finish(platform.run_dir().path)
    platform.jobs.pause(platform.caller, job.id)
    for _ in range(2):
        dispatcher.tick()
    assert platform.get(job).status is JobStatus.SUCCEEDED
    assert not platform.get(job).paused


def test_a_job_cancelled_while_it_rests_is_pruned(platform: Platform) -> None:
    executor = Watched()
    job = platform.create()
    dispatcher = platform.dispatcher(executor)
    dispatcher.tick()
    platform.jobs.pause(platform.caller, job.id)
    for _ in range(2):
        dispatcher.tick()
    assert not dispatcher._runs
    platform.jobs.cancel(platform.caller, job.id)
    platform.clock.now += TIDY_EVERY_S
    dispatcher.tick()
    assert not platform.run_dir().training_file.exists()


def test_kept_epochs_become_models(platform: Platform) -> None:
    def train(path: Path) -> None:
        for step in (3, 6):
            folder = RunDir(path).snapshot(step)
            folder.adapter.mkdir(parents=True)
            (folder.adapter / "adapter_model.safetensors").write_bytes(b"epoch %d" % step)
            folder.write_snapshot(Snapshot(step, {"step": step}))
        finish(path)

    job = platform.create(epoch_checkpoints=2)
    dispatcher = platform.dispatcher(InlineExecutor(train))
    for _ in range(3):
        dispatcher.tick()
    found = platform.jobs.checkpoints(platform.caller, job.id)
    assert [model.step for model in found] == [6, 3]
    assert found[0].adapter_dir is not None
    assert (found[0].adapter_dir / "adapter_model.safetensors").read_bytes() == b"epoch 6"
    assert not platform.run_dir().epochs.exists()


@pytest.mark.parametrize(("number", "words"), [(errno.EROFS, "can only be read"), (errno.ENOSPC, "no room")])
def test_a_disk_that_fails_for_long_fails_the_job_in_words(platform: Platform, number: int, words: str) -> None:
    class Broken(Watched):
        def start(self, run_dir: Path, beside: str | None = None) -> str:
            raise OSError(number, "as the system says it", str(run_dir))

    job = platform.create()
    dispatcher = platform.dispatcher(Broken())
    for _ in range(FAULTS + 2):
        platform.clock.now += 31
        dispatcher.tick()
    error = platform.get(job).error or ""
    assert words in error
    assert str(platform.home) not in error


@pytest.mark.parametrize("jump_s", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_costs_no_job_its_dispatcher(platform: Platform, jump_s: float) -> None:
    """Wall-clock time alone jumps: the dispatcher measures silence by a clock that nobody sets."""
    wall = Clock()
    platform.store.clock = wall
    job = platform.create()
    executor = Watched()
    dispatcher = platform.dispatcher(executor, max_concurrent_runs=2)
    dispatcher.tick()
    wall.now += jump_s
    dispatcher.tick()
    dispatcher.tick()
    (run,) = dispatcher._runs.values()
    assert (run.claim.lease, executor.stopped, len(executor.states)) == (1, [], 1)
    finish(platform.run_dir().path)
    executor.states = dict.fromkeys(executor.states, RunState.EXITED)
    dispatcher.tick()
    assert platform.get(job).status is JobStatus.SUCCEEDED


def test_a_trainer_stopped_by_sigstop_is_killed_and_the_next_goes_on(platform: Platform) -> None:
    """A real process, frozen for longer than its lease and its heartbeat allow."""
    executor = LocalExecutor(threads=1, niceness=0, command=(sys.executable, "-c", TRAINER))
    platform.create()
    dispatcher = platform.dispatcher(executor, lease_s=60.0, stalled_after_s=120.0)
    dispatcher.tick()
    (run,) = dispatcher._runs.values()
    until(run.run_dir.heartbeat.exists)
    dispatcher.tick()
    first = run.handle
    assert first is not None
    os.kill(int(first.partition(":")[0]), signal.SIGSTOP)
    platform.clock.now += 121
    dispatcher.tick()
    until(lambda: executor.state(first) is not RunState.RUNNING)
    dispatcher.tick()
    assert run.handle not in (None, first)
    assert run.claim.lease == 1
    assert run.handle is not None
    executor.stop(run.handle, 0.0)
    until(lambda: executor.state(run.handle or "") is not RunState.RUNNING)


def test_a_job_taken_over_is_let_go_but_not_pruned(platform: Platform) -> None:
    executor = Watched()
    platform.create()
    first = platform.dispatcher(executor, lease_s=60.0)
    first.tick()
    platform.clock.now += 61
    second = platform.dispatcher(executor, lease_s=60.0)
    second.holder = "elsewhere"
    second.tick()
    first.tick()
    first.tick()
    assert not first._runs
    assert platform.run_dir().training_file.exists()
    assert len(second._runs) == 1


def test_a_successor_takes_up_a_living_run_by_its_handle(platform: Platform) -> None:
    executor = Watched()
    job = platform.create()
    platform.dispatcher(executor).tick()
    successor = platform.dispatcher(executor)
    platform.jobs.release_all("here")
    successor.tick()
    assert len(executor.states) == 1, "started a second trainer on the folder of a living one"
    finish(platform.run_dir().path)
    executor.states = dict.fromkeys(executor.states, RunState.EXITED)
    successor.tick()
    assert platform.get(job).status is JobStatus.SUCCEEDED


def test_a_crash_after_training_only_registers(platform: Platform) -> None:
    executor = Watched()
    job = platform.create()
    platform.dispatcher(executor).tick()
    finish(platform.run_dir().path)
    platform.jobs.release_all("here")
    after_restart = Watched()
    platform.dispatcher(after_restart).tick()
    assert platform.get(job).status is JobStatus.SUCCEEDED
    assert not after_restart.states


def test_a_frozen_trainer_is_killed_and_started_again(platform: Platform) -> None:
    executor = Watched()
    platform.create()
    dispatcher = platform.dispatcher(executor, stalled_after_s=120.0)
    dispatcher.tick()
    heartbeat = platform.run_dir().heartbeat
    for beat in range(1, 5):
        platform.clock.now += 100
        heartbeat.touch()
        os.utime(heartbeat, (beat, beat))
        dispatcher.tick()
    assert executor.stopped == []
    platform.clock.now += 119
    dispatcher.tick()
    assert executor.stopped == []
    platform.clock.now += 2
    dispatcher.tick()
    (handle,) = executor.states
    assert executor.stopped == [(handle, 0.0)]
    dispatcher.tick()
    assert len(executor.states) == 2


def test_the_spec_a_run_began_with_stays(platform: Platform) -> None:
    executor = Watched()
    platform.create()
    platform.dispatcher(executor, trainer_threads=1).tick()
    before = platform.run_dir().spec.read_bytes()
    platform.jobs.release_all("here")
    executor.states.clear()
    platform.dispatcher(executor, trainer_threads=8).tick()
    assert platform.run_dir().spec.read_bytes() == before


def test_a_model_deleted_before_its_child_began_fails_the_child_by_name(platform: Platform) -> None:
    dispatcher = platform.dispatcher(InlineExecutor(finish))
    first = platform.create()
    for _ in range(3):
        dispatcher.tick()
    job = platform.create()
    (platform.home / "files" / job.training_file.id).unlink()  # as if an operator had removed it
    for _ in range(3):
        dispatcher.tick()
    assert platform.get(first).status is JobStatus.SUCCEEDED
    assert platform.get(job).status is JobStatus.FAILED
    assert job.training_file.id in (platform.get(job).error or "")


TRAINER = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
def checkpoint(*_):
    (folder / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
    os._exit(75)
signal.signal(signal.SIGTERM, checkpoint)
(folder / "heartbeat").touch()
time.sleep(600)
"""


def test_the_loop_drains_real_trainers_and_a_second_one_goes_on(platform: Platform) -> None:
    executor = LocalExecutor(threads=1, niceness=0, command=(sys.executable, "-c", TRAINER))
    jobs = [platform.create(), platform.create()]
    dispatcher = platform.dispatcher(executor, max_concurrent_runs=2, tick_s=0.02)
    stop = threading.Event()
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    folders = until(lambda: (found := list((platform.home / "runs").glob("*/heartbeat"))) and len(found) == 2 and found)
    assert dispatcher.silent_s < 60
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    for folder in folders:
        assert (folder.parent / "checkpoints" / "step-1").is_dir()
        assert RunDir(folder.parent).log.read_text() == "The trainer process exited with code 75.\n"
    assert {platform.get(job).status for job in jobs} == {JobStatus.RUNNING}
    assert platform.jobs.claim("anyone", 60.0) is not None  # the leases are given back
