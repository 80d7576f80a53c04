"""Pausing, going on and cancelling in each phase of a job, on a real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.drill import copy_inputs, run_dir_of, traces, undisturbed
from tests.e2e.harness import CANCELLED_WITHIN_S, TRAINER, Server, messages, put_base, reviews, upload, wait_for
from tests.waiting import until
from tunesmith.client import Client
from tunesmith.rundir import RunDir

STEPS_AN_EPOCH, BATCH = 3, 40


@pytest.fixture(scope="module")
def server(tiled_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    put_base(home, "ada", tiled_base)
    with Server(home, {"TUNESMITH_TRAINER_NICENESS": "0"}) as server:
        yield server


def create(client: Client, n_epochs: int) -> str:
    """The id of a job that takes long, with data to validate on."""
    asked = {
        "training_file": upload(client, reviews(STEPS_AN_EPOCH * BATCH, 1)),
        "validation_file": upload(client, reviews(400, 2)),
        "model": "ada",
        "batch_size": BATCH,
        "n_epochs": n_epochs,
    }
    job_id: str = client.post("fine-tunes", body=asked)["id"]
    return job_id


def _loading(server: Server, run_dir: RunDir) -> bool:
    return bool(server.processes(TRAINER)) and not run_dir.results.exists()


def _steps(run_dir: RunDir) -> int:
    return max(0, run_dir.results.read_bytes().count(b"\n") - 1) if run_dir.results.exists() else 0


def _training(server: Server, run_dir: RunDir) -> bool:
    return _steps(run_dir) % STEPS_AN_EPOCH > 0


def _validating(server: Server, run_dir: RunDir) -> bool:
    """The last step of an epoch is among the results, and the end of the epoch is not told of yet."""
    epochs, rest = divmod(_steps(run_dir), STEPS_AN_EPOCH)
    told = sum(line.message.startswith("Completed epoch") for line in run_dir.read_progress(0))
    return rest == 0 and told < epochs


PHASES: dict[str, Callable[[Server, RunDir], bool]] = {
    "loading": _loading,
    "training": _training,
    "validating": _validating,
}


@pytest.mark.parametrize("phase", PHASES)
def test_cancelling_takes_effect_at_once(server: Server, phase: str) -> None:
    with server.client() as client:
        job_id = create(client, n_epochs=50)
        run_dir = run_dir_of(server, job_id)
        until(lambda: PHASES[phase](server, run_dir), within_s=120.0, every_s=0.002)
        assert client.post("fine-tunes", job_id, "cancel")["status"] == "cancelled"
        until(lambda: not server.processes(TRAINER), within_s=CANCELLED_WITHIN_S)
        until(lambda: not run_dir.training_file.exists())
        job = client.get("fine-tunes", job_id)
    assert (job["status"], job["fine_tuned_model"], job["result_files"]) == ("cancelled", None, [])
    assert messages(job)[-1] == "Fine-tune cancelled"


@pytest.mark.slow
def test_paused_in_every_phase_a_job_gives_what_an_undisturbed_one_gives(server: Server, tmp_path: Path) -> None:
    with server.client() as client:
        before = create(client, n_epochs=50)  # it shares its trainer with nobody, so the next one waits
        job_id = create(client, n_epochs=4)
        client.post("fine-tunes", job_id, "pause")
        client.post("fine-tunes", before, "cancel")
        until(lambda: not server.processes(TRAINER))
        assert "Fine-tune started" not in messages(client.get("fine-tunes", job_id))
        client.post("fine-tunes", job_id, "resume")
        run_dir = run_dir_of(server, job_id)
        inputs = copy_inputs(run_dir, tmp_path / "undisturbed")
        for at in PHASES.values():
            until(lambda: at(server, run_dir), within_s=120.0, every_s=0.002)  # noqa: B023
            assert client.post("fine-tunes", job_id, "pause")["paused"]
            until(lambda: not server.processes(TRAINER), within_s=60.0)
            assert client.get("fine-tunes", job_id)["status"] == "running"
            client.post("fine-tunes", job_id, "resume")
        job = wait_for(client, job_id)
        assert job["status"] == "succeeded", messages(job)
        found = traces(server, client, job)
    assert found.events.count("Fine-tune paused") == found.events.count("Fine-tune resumed") == 1 + len(PHASES)
    news = {"Fine-tune paused", "Fine-tune resumed"}
    # It may have been told its place before it was paused, or after.
    found.events[:] = [message.replace("number: 1", "number: 0") for message in found.events if message not in news]
    assert found.difference(undisturbed(inputs)) is None
