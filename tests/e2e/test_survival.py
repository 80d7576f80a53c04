"""kill -9 and SIGTERM: a job ends by itself with what an undisturbed run gives, and nothing is left running."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.drill import copy_inputs, run_dir_of, traces, undisturbed
from tests.e2e.harness import ENGINE, SERVER, TRAINER, Server, messages, put_base, reviews, upload, wait_for
from tests.waiting import until
from tunesmith.client import Client
from tunesmith.core.jobs import INTERRUPTED

# Other work on the testing machine should not starve the trainer.
SETTINGS = {"TUNESMITH_CHECKPOINT_INTERVAL_S": "0.1", "TUNESMITH_TRAINER_NICENESS": "0"}
EXAMPLES, EPOCHS = 120, 3
STEPS = EXAMPLES * EPOCHS  # the default batch for so few examples is one


@pytest.fixture
def home(tiny_base: Path, tmp_path: Path) -> Path:
    put_base(tmp_path / "home", "ada", tiny_base)
    return tmp_path / "home"


def _create(client: Client) -> str:
    job_id: str = client.post(
        "fine-tunes",
        body={
            "training_file": upload(client, reviews(EXAMPLES, 1)),
            "validation_file": upload(client, reviews(20, 2)),
            "model": "ada",
            "n_epochs": EPOCHS,
        },
    )["id"]
    return job_id


def _steps(results: Path) -> int:
    return max(0, results.read_bytes().count(b"\n") - 1) if results.exists() else 0


def test_kill_nine_at_three_moments_changes_nothing(home: Path, tmp_path: Path) -> None:
    chance = random.Random(20230418)
    moments = sorted(chance.randrange(1, STEPS) for _ in range(3))
    with Server(home, SETTINGS) as server:
        with server.client() as client:
            job_id = _create(client)
        run_dir = run_dir_of(server, job_id)
        inputs = copy_inputs(run_dir, tmp_path / "undisturbed")
        for moment, victim in zip(moments, ("trainer", "server", "tree"), strict=True):
            until(lambda: _steps(run_dir.results) >= moment, within_s=120.0)  # noqa: B023
            time.sleep(chance.uniform(0, 0.05))
            match victim:
                case "trainer":
                    server.one(TRAINER).kill()
                case "server":
                    server.kill_server()
                    assert server.gone(), f"left without a parent: {server.processes()}"
                    server.start()
                case _:
                    server.kill_tree()
                    server.start()
        with server.client() as client:
            job = wait_for(client, job_id)
            assert job["status"] == "succeeded", messages(job)
            notices = [event["level"] for event in job["events"] if event["message"] == INTERRUPTED]
            assert set(notices) == {"warn"}
            assert len(notices) <= len(moments)
            disturbed = traces(server, client, job)
        until(lambda: not server.processes(TRAINER))
        assert server.terminate() == 0
        assert server.gone(), f"left after the end: {server.processes()}"
    assert disturbed.difference(undisturbed(inputs)) is None


def test_sigterm_drains_and_a_restart_goes_on(home: Path) -> None:
    with Server(home, SETTINGS | {"TUNESMITH_CHECKPOINT_INTERVAL_S": "3600"}) as server:
        with server.client() as client:
            job_id = _create(client)
        run_dir = run_dir_of(server, job_id)
        until(lambda: _steps(run_dir.results) >= 20, within_s=120.0)
        assert len(server.processes(TRAINER)) == len(server.processes(SERVER)) == 1
        assert server.terminate() == 0
        assert server.gone(within_s=1.0)
        assert run_dir.outcome.exists() is False
        # The trainer was asked and answered with a checkpoint: none would have been due for an hour.
        assert any(run_dir.checkpoints.iterdir())
        steps = _steps(run_dir.results)

        server.start()
        with server.client() as client:
            assert client.get("fine-tunes", job_id)["status"] == "running"
            until(lambda: _steps(run_dir.results) > steps, within_s=60.0)
            job = wait_for(client, job_id)
            assert job["status"] == "succeeded", messages(job)
            assert messages(job).count("Fine-tune started") == 1
            assert messages(job).count(INTERRUPTED) == 1
            assert len(client.get("models")["data"]) == len({model["id"] for model in client.get("models")["data"]})


def test_a_frozen_server_group_leaves_no_orphans(home: Path) -> None:
    """A trainer that cannot run, not even to notice that its parent died, must not outlive it."""
    with Server(home, SETTINGS) as server:
        with server.client() as client:
            job_id = _create(client)
            client.post("completions", body={"model": "ada", "prompt": "x", "max_tokens": 1})
        until(lambda: _steps(run_dir_of(server, job_id).results) >= 1, within_s=120.0)
        server.one(TRAINER).kill(signal.SIGSTOP)
        server.one(ENGINE).kill(signal.SIGSTOP)
        server.kill_server()
        assert server.gone(), f"left without a parent: {server.processes()}"
