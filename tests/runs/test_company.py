"""Many runs beside each other in one trainer: who joins whom, and how one ends without the others."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.e2e.harness import reviews
from tests.runs.platform import Clock, Platform, Watched, finish
from tests.waiting import until
from tunesmith.core.jobs import Job, JobStatus
from tunesmith.core.requests import FineTuneRequest
from tunesmith.rundir import ResolvedHyperparameters, RunDir
from tunesmith.runs import company
from tunesmith.runs.executor import RunState, trainer_of
from tunesmith.runs.local import LET_GO_WITHIN_S, LocalExecutor
from tunesmith.training.loop import train

# Follows orders as a trainer does, and notes them; a run folder with a file `deaf` is never let go of.
OBEDIENT = """
import os, signal, sys
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
runs = {sys.argv[1]}
(Path(sys.argv[1]) / "ready").touch()
for line in sys.stdin:
    verb, _, folder = line.rstrip().partition(" ")
    path = Path(folder)
    with (path / "orders").open("a") as file:
        file.write(verb + " ")
    if verb == "take":
        runs.add(folder)
    elif not (path / "deaf").exists():
        runs.discard(folder)
        (path / "released").touch()
    if not runs:
        os._exit(75)
"""
ASKED = ResolvedHyperparameters(n_epochs=2, batch_size=1, learning_rate_multiplier=0.1, prompt_loss_weight=0.01)


class Crowd(Watched):
    """Runs that last until they are told otherwise, each beside the one it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.trainers: dict[str, str] = {}
        self.started: list[str] = []

    def start(self, run_dir: Path, beside: str | None = None) -> str:
        trainer = run_dir.name if beside is None else trainer_of(beside)
        handle = f"{trainer}/{len(self.started)}"
        self.started.append(run_dir.name)
        self.states[handle] = RunState.RUNNING
        self.trainers[run_dir.name] = trainer
        return handle


def _run_id(platform: Platform, job: Job) -> str:
    (found,) = [
        path.parent.name
        for path in (platform.home / "runs").glob("*/spec.json")
        if RunDir(path.parent).read_spec().job_id == job.id
    ]
    return found


def test_small_runs_of_one_base_keep_company(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    together = company.company(tmp_path, ASKED, 2)
    assert together is not None
    assert company.company(tmp_path, replace(ASKED, n_epochs=9, batch_size=company.LARGEST_BATCH), 2) == together
    assert company.company(tmp_path, ASKED, 3) != together
    assert company.company(tmp_path / "other", ASKED, 2) != together


@pytest.mark.parametrize("changes", [{"batch_size": company.LARGEST_BATCH + 1}, {"method": "full"}])
def test_a_run_that_fills_the_machine_goes_alone(tmp_path: Path, changes: dict[str, object]) -> None:
    assert company.company(tmp_path, replace(ASKED, **changes), 2) is None  # type: ignore[arg-type]


def test_a_large_base_is_trained_by_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr(company, "LARGEST_BASE_BYTES", 6)
    assert company.company(tmp_path, ASKED, 2) is None


def test_queued_jobs_join_a_trainer_at_work_as_far_as_there_is_room(platform: Platform) -> None:
    executor = Crowd()
    dispatcher = platform.dispatcher(executor, jobs_per_run=3)
    first = platform.create()
    dispatcher.tick()
    rest = [platform.create() for _ in range(3)]
    dispatcher.tick()

    assert executor.trainers == {_run_id(platform, job): _run_id(platform, first) for job in [first, *rest[:2]]}
    assert platform.get(rest[2]).status is JobStatus.PENDING
    platform.jobs.cancel(platform.caller, rest[0].id)
    dispatcher.tick()
    dispatcher.tick()
    assert platform.get(rest[2]).status is JobStatus.RUNNING
    assert executor.trainers[_run_id(platform, rest[2])] == _run_id(platform, first)
    assert [platform.get(job).status for job in (first, rest[1])] == [JobStatus.RUNNING] * 2


def test_nobody_is_passed_over_by_those_who_could_join(platform: Platform) -> None:
    dispatcher = platform.dispatcher(Crowd(), jobs_per_run=3)
    small, large, late = platform.create(), platform.create(batch_size=16), platform.create()
    dispatcher.tick()
    assert [platform.get(job).status for job in (small, large, late)] == [
        JobStatus.RUNNING,
        JobStatus.PENDING,
        JobStatus.PENDING,
    ]


def test_runs_of_a_trainer_that_died_go_on_together_and_one_that_gets_nowhere_alone(platform: Platform) -> None:
    executor = Crowd()
    dispatcher = platform.dispatcher(executor, jobs_per_run=4)
    jobs = [platform.create() for _ in range(3)]
    dispatcher.tick()
    runs = [RunDir(platform.home / "runs" / _run_id(platform, job)) for job in jobs]
    for run_dir in runs:
        (run_dir.checkpoints / "step-1").mkdir(parents=True)
    executor.states = dict.fromkeys(executor.states, RunState.EXITED)
    dispatcher.tick()
    assert set(executor.trainers.values()) == {runs[0].path.name}
    assert len(executor.started) == 6

    (runs[0].checkpoints / "step-2").mkdir()
    (runs[2].checkpoints / "step-2").mkdir()
    executor.states = dict.fromkeys(executor.states, RunState.EXITED)
    platform.clock.now += 31
    dispatcher.tick()
    names = [run_dir.path.name for run_dir in runs]
    assert [executor.trainers[name] for name in names] == [names[0], names[1], names[0]]


def test_each_job_of_a_trainer_ends_by_itself(platform: Platform) -> None:
    executor = Crowd()
    dispatcher = platform.dispatcher(executor, jobs_per_run=4)
    jobs = [platform.create() for _ in range(3)]
    dispatcher.tick()
    finish(platform.home / "runs" / _run_id(platform, jobs[0]))
    handles = {handle.rpartition("/")[2]: handle for handle in executor.states}
    executor.states[handles["0"]] = RunState.EXITED
    platform.jobs.pause(platform.caller, jobs[1].id)
    for _ in range(3):
        dispatcher.tick()

    assert platform.get(jobs[0]).status is JobStatus.SUCCEEDED
    assert platform.get(jobs[1]).paused
    assert platform.get(jobs[2]).status is JobStatus.RUNNING
    assert executor.states[handles["2"]] is RunState.RUNNING
    assert (handles["1"], dispatcher.drain_s) in executor.stopped
    assert handles["2"] not in {handle for handle, _ in executor.stopped}


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def executor(clock: Clock) -> LocalExecutor:
    return LocalExecutor(threads=1, niceness=0, command=(sys.executable, "-c", OBEDIENT), monotonic=clock)


def _folders(tmp_path: Path, count: int) -> list[Path]:
    folders = [tmp_path / f"run-{index}" for index in range(count)]
    for folder in folders:
        folder.mkdir()
    return folders


def _together(executor: LocalExecutor, folders: list[Path]) -> list[str]:
    first = executor.start(folders[0])
    until((folders[0] / "ready").exists)
    return [first, *(executor.start(folder, first) for folder in folders[1:])]


def _orders(folder: Path) -> str:
    return (folder / "orders").read_text() if (folder / "orders").exists() else ""


def test_one_run_is_let_go_of_and_the_others_go_on(executor: LocalExecutor, tmp_path: Path) -> None:
    folders = _folders(tmp_path, 3)
    handles = _together(executor, folders)
    assert len({trainer_of(handle) for handle in handles}) == 1
    assert len(set(handles)) == 3

    executor.stop(handles[1], 10.0)
    executor.stop(handles[1], 10.0)
    until(lambda: executor.state(handles[1]) is RunState.EXITED)
    executor.stop(handles[0], 0.0)
    until(lambda: executor.state(handles[0]) is RunState.EXITED)

    assert executor.state(handles[2]) is RunState.RUNNING
    assert [_orders(folder) for folder in folders] == ["drop ", "take save ", "take "]
    executor.stop(handles[2], 10.0)  # the last: the process itself
    until(lambda: executor.state(handles[2]) is RunState.EXITED)
    assert "run-0" in RunDir(folders[2]).log.read_text()
    assert RunDir(folders[2]).log.read_text().endswith("The trainer process exited with code 75.\n")


def test_a_run_comes_back_to_the_trainer_that_let_go_of_it(executor: LocalExecutor, tmp_path: Path) -> None:
    folders = _folders(tmp_path, 2)
    first, second = _together(executor, folders)
    executor.stop(second, 10.0)
    until(lambda: executor.state(second) is RunState.EXITED)
    again = executor.start(folders[1], first)
    assert again not in (first, second)
    assert (executor.state(again), executor.state(second)) == (RunState.RUNNING, RunState.EXITED)
    executor.stop(first, 0.0)
    until(lambda: executor.state(first) is RunState.EXITED)
    executor.stop(again, 0.0)
    until(lambda: executor.state(again) is RunState.EXITED)


def test_a_trainer_that_does_not_let_go_is_killed(executor: LocalExecutor, clock: Clock, tmp_path: Path) -> None:
    folders = _folders(tmp_path, 2)
    (folders[1] / "deaf").touch()
    first, deaf = _together(executor, folders)
    executor.stop(deaf, 0.0)
    clock.now += LET_GO_WITHIN_S - 1
    executor.stop(deaf, 0.0)
    assert executor.state(deaf) is RunState.RUNNING
    clock.now += 2
    executor.stop(deaf, 0.0)
    until(lambda: executor.state(deaf) is RunState.EXITED)
    assert executor.state(first) is RunState.EXITED
    assert RunDir(folders[0]).log.read_text().endswith("was ended by SIGKILL.\n")


def test_nobody_joins_a_trainer_that_is_gone(executor: LocalExecutor, tmp_path: Path) -> None:
    folders = _folders(tmp_path, 2)
    first = executor.start(folders[0])
    until((folders[0] / "ready").exists)
    os.kill(int(first.split(":")[0]), signal.SIGKILL)
    until(lambda: executor.state(first) is RunState.EXITED)
    second = executor.start(folders[1], first)
    assert trainer_of(second) != trainer_of(first)
    executor.stop(second, 0.0)
    until(lambda: executor.state(second) is RunState.EXITED)


def test_jobs_of_one_trainer_become_the_models_they_become_alone(platform: Platform, tmp_path: Path) -> None:
    executor = LocalExecutor(threads=1, niceness=0)
    dispatcher = platform.dispatcher(executor, jobs_per_run=8, checkpoint_interval_s=0.1)
    jobs = []
    for seed in range(4):
        content = "".join(json.dumps(row) + "\n" for row in reviews(12 + seed, seed)).encode()
        upload = platform.files.create(
            platform.caller, filename="t.jsonl", purpose="fine-tune", chunks=io.BytesIO(content)
        )
        asked = FineTuneRequest(training_file=upload.id, model="ada", n_epochs=3, seed=seed)
        jobs.append(platform.jobs.create(platform.caller, asked))

    def ended() -> bool:
        dispatcher.tick()
        platform.clock.now += 0.1
        return all(platform.get(job).status is JobStatus.SUCCEEDED for job in jobs)

    def under_way() -> bool:
        dispatcher.tick()
        return len(list((platform.home / "runs").glob("*/checkpoints/step-*/manifest.json"))) >= 3

    until(under_way, within_s=90.0)
    handles = {run.handle for run in dispatcher._runs.values() if run.handle is not None}
    assert len({trainer_of(handle) for handle in handles}) == 1
    os.kill(int(next(iter(handles)).split(":")[0]), signal.SIGKILL)
    until(ended, within_s=90.0)
    dispatcher.drain()

    for job in jobs:
        run_dir = RunDir(platform.home / "runs" / _run_id(platform, job))
        copy = RunDir(tmp_path / job.id)
        copy.path.mkdir()
        copy.spec.write_text(run_dir.spec.read_text())
        platform.files.fetch(job.training_file, copy.training_file)
        train(copy)
        assert copy.results.read_bytes() == run_dir.results.read_bytes()
        found = platform.models.resolve_in(job.organization_id, platform.get(job).fine_tuned_model or "")
        assert found.adapter_dir is not None
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (copy.adapter / name).read_bytes() == (found.adapter_dir / name).read_bytes()
        assert json.loads(copy.parity.read_text()) == json.loads(run_dir.parity.read_text())
