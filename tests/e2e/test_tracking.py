"""Weights & Biases, the real package, beside a real job: it follows live, and whatever happens to it, the job goes on.

Runs are offline, in files that are read back. The package is in an environment of its own, put on the server's path.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Server, messages, put_base, reviews, upload, wait_for
from tests.e2e.wandb_server import wandb_server
from tests.sdk.environments import HERE, packages_of, python_with
from tests.waiting import until
from tunesmith.client import ApiError, Client
from tunesmith.tracking.folder import TrackingDir

TRACKER = "tunesmith.tracking"
SECRET = "0123456789abcdef0123456789abcdef01234567"
LONG = {"n_epochs": 4, "batch_size": 1}
"""Enough steps to be paused in their midst."""


@pytest.fixture(scope="module")
def python_wandb() -> Path:
    return python_with("wandb")


@pytest.fixture
def tracked(tiny_base: Path, tmp_path: Path, python_wandb: Path) -> Iterator[Server]:
    """A server that has the package, a key for it, and no way out."""
    put_base(tmp_path / "home", "ada", tiny_base)
    settings = {
        "PYTHONPATH": packages_of(python_wandb),
        "WANDB_MODE": "offline",
        "WANDB_API_KEY": SECRET,
        "TUNESMITH_TRAINER_NICENESS": "0",
    }
    with Server(tmp_path / "home", settings) as server:
        yield server


def body(client: Client, **fields: object) -> dict[str, Any]:
    return {
        "training_file": upload(client, reviews(40, seed=1)),
        "validation_file": upload(client, reviews(12, seed=2)),
        "model": "ada",
        "n_epochs": 1,
        "batch_size": 8,
        "compute_classification_metrics": True,
        "classification_positive_class": " positive",
        **fields,
    }


WANDB = {"type": "wandb", "wandb": {"project": "reviews", "name": "first try", "tags": ["small", "e2e"]}}


def tracking_dir(server: Server, job_id: str) -> TrackingDir:
    return TrackingDir(server.home / "tracking" / f"{job_id}-0")


def offline_runs(server: Server, job_id: str) -> list[Path]:
    return sorted(tracking_dir(server, job_id).path.glob("wandb/offline-run-*/run-*.wandb"))


def read_run(python: Path, path: Path) -> dict[str, Any]:
    program = HERE / "programs" / "read_wandb.py"
    done = subprocess.run([python, program, path], capture_output=True, text=True, check=True)
    run: dict[str, Any] = json.loads(done.stdout)
    return run


def until_said(client: Client, job_id: str, words: str) -> dict[str, Any]:
    """The job, once an event says so."""

    def heard() -> dict[str, Any] | None:
        job: dict[str, Any] = client.get("fine-tunes", job_id)
        return job if any(words in message for message in messages(job)) else None

    job = until(heard, within_s=60.0, every_s=0.1)
    assert job is not None
    return job


def results(client: Client, job: dict[str, Any]) -> bytes:
    return client.content(job["result_files"][0]["id"])


def holding(folder: Path, text: str) -> list[Path]:
    """Files under a folder that hold some text."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_a_job_is_followed_to_its_end_across_kills(tracked: Server, python_wandb: Path) -> None:
    with tracked.client() as client:
        job = client.post("fine-tunes", body=body(client, integrations=[WANDB], **LONG))
        expected = {"project": "reviews", "name": "first try", "entity": None, "tags": ["small", "e2e"]}
        assert job["integrations"] == [{"type": "wandb", "wandb": expected}]
        until_said(client, job["id"], "Completed epoch 1/")
        client.post("fine-tunes", job["id"], "pause")  # so that it is in its midst whatever takes how long
        until_said(client, job["id"], "Weights & Biases follows this fine-tune: offline")
        tracked.one(TRACKER).kill()
        until_said(client, job["id"], "was ended by SIGKILL and is started again. Training goes on")
    tracked.kill_server()
    assert until(lambda: not tracked.processes(TRACKER), within_s=10.0)
    tracked.start()
    with tracked.client() as client:
        tracked.one(TRACKER)  # at work before the job is
        client.post("fine-tunes", job["id"], "resume")
        ended = wait_for(client, job["id"])
        assert ended["status"] == "succeeded", messages(ended)
        ended = until_said(client, job["id"], "Weights & Biases has all the numbers")
        assert client.get("fine_tuning", "jobs", job["id"])["integrations"] == job["integrations"]

        (path,) = offline_runs(tracked, job["id"])
        run = read_run(python_wandb, path)
        rows = tracking_dir(tracked, job["id"]).read_rows()
        assert [point["_step"] for point in run["history"]] == [row.step for row in rows]
        for point, row in zip(run["history"], rows, strict=True):
            assert {name: point[name] for name in row.values} == row.values
        named = {name for row in rows for name in row.values}
        header = results(client, ended).decode().partition("\n")[0].split(",")
        assert set(header) - {"step"} <= named
        assert run["run"] == {
            **{"run_id": job["id"], "project": "reviews", "entity": "", "display_name": "first try"},
            "tags": ["small", "e2e"],
        }
        assert run["config"]["hyperparams"]["batch_size"] == 1
        assert run["config"]["training_file"]["id"] == job["training_files"][0]["id"]
        assert run["summary"]["fine_tuned_model"] == ended["fine_tuned_model"]
        assert run["exit_code"] == 0
        assert run["artifacts"] == []

        plain = wait_for(client, client.post("fine-tunes", body=body(client, **LONG))["id"])
        assert results(client, plain) == results(client, ended)
    assert holding(tracked.home, SECRET) == []


@pytest.mark.slow
def test_a_run_on_wandbs_server_is_gone_on_with(tracked: Server) -> None:
    tracked.terminate()
    with wandb_server() as wandb:
        tracked.settings |= {"WANDB_MODE": "online", "WANDB_BASE_URL": wandb.url}
        tracked.start()
        with tracked.client() as client:
            job = client.post("fine-tunes", body=body(client, integrations=[WANDB], **LONG))
            until_said(client, job["id"], "Completed epoch 1/")
            client.post("fine-tunes", job["id"], "pause")
            until_said(client, job["id"], f"Weights & Biases follows this fine-tune: {wandb.url}")
            assert until(lambda: wandb.history, within_s=60.0)  # its package sends every 15 s
            tracked.one(TRACKER).kill()
            until_said(client, job["id"], "is started again")
        tracked.kill_server()
        tracked.start()
        with tracked.client() as client:
            client.post("fine-tunes", job["id"], "resume")
            assert wait_for(client, job["id"])["status"] == "succeeded"
            until_said(client, job["id"], "Weights & Biases has all the numbers")
        rows = tracking_dir(tracked, job["id"]).read_rows()
        assert [point["_step"] for point in wandb.history] == [row.step for row in rows]
        assert [point["training_loss"] for point in wandb.history] == [row.values["training_loss"] for row in rows]
        assert wandb.resumed >= 1
        assert (wandb.summary["status"], wandb.exit_code) == ("succeeded", 0)
        assert wandb.config["hyperparams"]["value"]["batch_size"] == 1


def test_a_tracker_that_is_not_installed_is_told_in_words(server: Server, client: Client) -> None:
    job = wait_for(client, client.post("fine-tunes", body=body(client, integrations=[WANDB]))["id"])
    assert job["status"] == "succeeded"
    job = until_said(client, job["id"], "cannot follow")
    said = next(event for event in job["events"] if "cannot follow" in event["message"])
    assert said["level"] == "warn"
    assert said["message"].startswith(
        "Weights & Biases cannot follow this fine-tune: the Python package wandb is not installed beside tunesmith; it "
        "comes with pip install 'tunesmith[wandb]'. Training goes on"
    )
    assert not server.processes(TRACKER)


@pytest.mark.slow
@pytest.mark.parametrize("key", [None, "not-a-key-at-all"])
def test_a_tracker_without_a_good_key_says_so(tracked: Server, key: str | None) -> None:
    tracked.terminate()
    del tracked.settings["WANDB_MODE"], tracked.settings["WANDB_API_KEY"]
    tracked.settings |= {"HOME": str(tracked.home)} | ({} if key is None else {"WANDB_API_KEY": key})
    tracked.start()
    with tracked.client() as client:
        job = client.post("fine-tunes", body=body(client, integrations=[WANDB]))
        said = messages(until_said(client, job["id"], "cannot follow"))
        assert any("set WANDB_API_KEY, or WANDB_MODE=offline" in message for message in said)
        assert wait_for(client, job["id"])["status"] == "succeeded"
    assert key is None or holding(tracked.home, key) == []


@pytest.mark.slow
def test_a_server_of_wandb_that_never_answers_delays_nothing(tracked: Server) -> None:
    tracked.terminate()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        tracked.settings |= {"WANDB_MODE": "online", "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        tracked.start()
        with tracked.client() as client:
            job = client.post("fine-tunes", body=body(client, integrations=[WANDB]))
            ended = wait_for(client, job["id"])
            assert ended["status"] == "succeeded"
            tracked.one(TRACKER)  # it still waits for an answer
            plain = wait_for(client, client.post("fine-tunes", body=body(client))["id"])
            assert results(client, plain) == results(client, ended)
        assert tracked.terminate() == 0  # nor does it hold the server up
        assert not tracked.processes(TRACKER)


@pytest.mark.parametrize(
    ("integrations", "param"),
    [
        ("wandb", "integrations"),
        ([{"type": "mlflow", "mlflow": {}}], "integrations[0].type"),
        ([{"type": "wandb"}], "integrations[0].wandb.project"),
        ([{"type": "wandb", "wandb": {"project": "a/b"}}], "integrations[0].wandb.project"),
        ([{"type": "wandb", "wandb": {"project": "a", "api_key": "k"}}], "integrations[0].wandb.api_key"),
        ([{"type": "wandb", "wandb": {"project": "a", "tags": ["x" * 65]}}], "integrations[0].wandb.tags"),
        ([{"type": "wandb", "wandb": {"project": "a"}}] * 6, "integrations"),
    ],
)
def test_integrations_that_break_a_rule_are_refused_by_name(client: Client, integrations: object, param: str) -> None:
    with pytest.raises(ApiError) as refused:
        client.post("fine-tunes", body={"training_file": "file-x", "model": "ada", "integrations": integrations})
    assert (refused.value.status, refused.value.param) == (400, param)
