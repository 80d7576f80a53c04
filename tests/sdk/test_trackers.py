"""Jobs brought to trackers: by the unmodified `openai wandb sync` of 0.28.1, and by ours. Runs are read back."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import OWNER_KEY, Server, reviews, upload, wait_for
from tests.sdk.environments import HERE, client_environment, packages_of, python_with

pytestmark = pytest.mark.sdk

COMMAND_WITHIN_S = 180.0


@dataclass(frozen=True)
class Done:
    """A job that has succeeded, and its numbers."""

    job: dict[str, Any]
    rows: dict[int, dict[str, float]]
    """{step: {column: value}} of results.csv."""

    @property
    def columns(self) -> dict[str, dict[int, float]]:
        """{column: {step: value}}."""
        names = dict.fromkeys(name for row in self.rows.values() for name in row)
        return {name: {step: row[name] for step, row in self.rows.items() if name in row} for name in names}


@pytest.fixture(scope="module")
def done(server: Server) -> Done:
    with server.client() as client:
        body = {
            "training_file": upload(client, reviews(24, seed=1), "training rows.jsonl"),
            "validation_file": upload(client, reviews(8, seed=2), "valid.jsonl"),
            "model": "ada",
            "n_epochs": 2,
            "compute_classification_metrics": True,
            "classification_positive_class": " positive",
        }
        job = wait_for(client, client.post("fine-tunes", body=body)["id"])
        assert job["status"] == "succeeded", job["events"]
        table = csv.DictReader(io.StringIO(client.content(job["result_files"][0]["id"]).decode()))
        rows = {int(row.pop("step")): {name: float(cell) for name, cell in row.items() if cell} for row in table}
    assert len(rows) == 48
    return Done(job, rows)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path


def environment(server: Server, **more: str) -> dict[str, str]:
    kept = {
        name: value for name, value in client_environment(server.base_url, OWNER_KEY).items() if "WANDB" not in name
    }
    return kept | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", **more}


class NotHere(BaseHTTPRequestHandler):
    """In place of W&B's server: it has nothing, and says so at once."""

    def do_POST(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def nowhere() -> Iterator[str]:
    """URL of a server that is not W&B's."""
    with ThreadingHTTPServer(("127.0.0.1", 0), NotHere) as http:
        threading.Thread(target=http.serve_forever).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def tunesmith(server: Server, folder: Path, python: Path | None, *words: str, code: int = 0) -> str:
    """Standard output of our command line beside the packages of an environment."""
    more = {} if python is None else {"PYTHONPATH": packages_of(python)}
    command = [sys.executable, "-m", "tunesmith", *words]
    return run(command, environment(server, **more), folder, code=code)


def run(command: list[str], environment: Mapping[str, str], folder: Path, *, code: int = 0) -> str:
    done = subprocess.run(
        command, env=dict(environment), cwd=folder, capture_output=True, text=True, timeout=COMMAND_WITHIN_S
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def read_runs(python: Path, folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        text = run([str(python), str(HERE / "programs" / "read_wandb.py"), str(path)], os.environ, folder)
        yield json.loads(text)


def check_points(found: dict[str, Any], done: Done) -> None:
    points = {
        point["_step"]: {name: value for name, value in point.items() if not name.startswith("_")}
        for point in found["history"]
    }
    assert points == done.rows


@pytest.fixture(scope="module")
def python_028() -> Path:
    return python_with("openai[wandb]==0.28.1", "wandb==0.19.11")  # newer ones verify every login over the network


@pytest.fixture(scope="module")
def python_wandb() -> Path:
    return python_with("wandb")


def test_the_published_command(python_028: Path, server: Server, done: Done, nowhere: str, folder: Path) -> None:
    """It logs in before all else, which W&B refuses offline but for one setting of its own.

    Numbers, config, summary and details are there. Data files are not, and no server can have them there: for a job
    that names them, `_log_artifact_inputs` (openai/wandb_logger.py) ends in `use_artifact`, see the next test. So the
    answer in the shape of late 2023, which names ids alone, is the one with which the command gets to its end. A model
    artifact it never makes. `tunesmith wandb sync` leaves all of them.
    """
    offline = {"WANDB_X_CLI_ONLY_MODE": "true", "WANDB_BASE_URL": nowhere, "WANDB_API_KEY": "k" * 40}
    command = [str(python_028.parent / "openai"), "wandb", "sync", "-i", done.job["id"], "--project", "GPT-3"]
    output = run(command, environment(server, **offline), folder)
    assert "wandb sync completed successfully" in output
    (found,) = read_runs(python_028, folder)
    check_points(found, done)
    assert found["run"]["run_id"] == done.job["id"]
    assert found["run"]["project"] == "GPT-3"
    assert found["config"]["hyperparameters"]["n_epochs"] == 2
    assert found["summary"]["status"] == "succeeded"
    assert found["summary"]["fine_tuned_model"] == done.job["fine_tuned_model"]
    (details,) = found["artifacts"]
    assert (details["name"], details["files"]) == ("fine_tune_details", ["fine_tune_details.json"])


OFFLINE_USE = """
import wandb
artifact = wandb.Artifact("train-data.jsonl", type="training_files")
with artifact.new_file("data.jsonl", mode="w") as file:
    file.write("{}")
run = wandb.init(project="p", mode="offline")
try:
    run.use_artifact(artifact, aliases=["latest"])
except TypeError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("version", ["0.19.11", "newest"])
def test_wandb_itself_takes_no_data_file_offline_as_the_published_command_gives_it(
    version: str, python_028: Path, python_wandb: Path, folder: Path
) -> None:
    """Line 3203 of wandb/sdk/wandb_run.py in 0.19.11, 3112 in 0.31.0: the first thing that `use_artifact` does."""
    python = python_028 if version == "0.19.11" else python_wandb
    said = run([str(python), "-c", OFFLINE_USE], os.environ | {"WANDB_SILENT": "true"}, folder)
    assert "refused: Cannot use artifact when in offline mode." in said


def test_our_sync(python_wandb: Path, server: Server, done: Done, folder: Path) -> None:
    words = ("wandb", "sync", "-i", done.job["id"], "--project", "reviews", "--entity", "a-team", "--weights")
    assert "🎉 wandb sync completed successfully" in tunesmith(server, folder, python_wandb, *words)
    (found,) = read_runs(python_wandb, folder)
    check_points(found, done)
    assert found["run"] | {"tags": None} == {
        **{"run_id": done.job["id"], "project": "reviews", "entity": "a-team", "display_name": done.job["id"]},
        "tags": None,
    }
    assert found["config"]["hyperparams"] == done.job["hyperparams"]
    assert found["config"]["training_file"] == done.job["training_files"][0]
    assert found["summary"]["status"] == "succeeded"
    assert found["summary"]["fine_tuned_model"] == done.job["fine_tuned_model"]
    artifacts = {artifact["name"]: artifact for artifact in found["artifacts"]}
    assert {name: artifact["type"] for name, artifact in artifacts.items()} == {
        "train-training_rows.jsonl": "training_files",
        "valid-valid.jsonl": "validation_files",
        "compiled_results.csv": "result_files",
        "fine_tune_details.json": "fine_tune_details",
        "model_metadata.json": "model",
        "model.zip": "model",
    }
    data = artifacts["train-training_rows.jsonl"]
    assert data["files"] == ["training rows.jsonl", "training rows.table.json"]
    assert sorted(data["aliases"]) == sorted(["latest", done.job["training_files"][0]["id"]])

    again = tunesmith(server, folder, python_wandb, *words)
    assert f"{done.job['id']} is there already" in again
    assert "No new successful fine-tunes were found" in again
    assert len(list(read_runs(python_wandb, folder))) == 1
    tunesmith(server, folder, python_wandb, *words, "--force")
    (found,) = read_runs(python_wandb, folder)  # in place of the first
    check_points(found, done)


@pytest.mark.slow
def test_wandb_that_cannot_be_used_is_told_in_words(
    python_wandb: Path, server: Server, done: Done, nowhere: str, folder: Path
) -> None:
    def said(**environ: str) -> str:
        command = [sys.executable, "-m", "tunesmith", "wandb", "sync", "-i", done.job["id"]]
        more = {"PYTHONPATH": packages_of(python_wandb), "HOME": str(folder), "WANDB_MODE": "online", **environ}
        return run(command, environment(server, **more), folder, code=1)

    assert "Weights & Biases cannot be used: it takes no API key from this environment" in said()
    assert "Weights & Biases does not answer as it should" in said(WANDB_BASE_URL=nowhere, WANDB_API_KEY="k" * 40)


@pytest.mark.slow
def test_our_sync_of_many(python_wandb: Path, server: Server, done: Done, tuned: str, folder: Path) -> None:
    with server.client() as client:
        jobs = client.get("fine-tunes")["data"]
    succeeded = [job["id"] for job in jobs if job["status"] == "succeeded"]
    assert len(succeeded) >= 2
    told = json.loads(tunesmith(server, folder, python_wandb, "--json", "wandb", "sync", "-n", "1"))
    assert [one["job"] for one in told] == [jobs[-1]["id"]]
    told = json.loads(tunesmith(server, folder, python_wandb, "--json", "wandb", "sync"))
    assert [one["job"] for one in told] == [job["id"] for job in jobs]
    assert sorted(found["run"]["run_id"] for found in read_runs(python_wandb, folder)) == sorted(succeeded)


def test_export_to_csv(server: Server, done: Done, folder: Path) -> None:
    job_id = done.job["id"]
    words = ("export", job_id, "--to", "csv", "--folder", "out")
    tunesmith(server, folder, None, *words)
    there = folder / "out" / job_id
    with (there / "results.csv").open(newline="") as file:
        rows = {
            int(row.pop("step")): {name: float(cell) for name, cell in row.items() if cell}
            for row in csv.DictReader(file)
        }
    assert rows == done.rows
    assert json.loads((there / "config.json").read_text())["hyperparams"] == done.job["hyperparams"]
    assert json.loads((there / "summary.json").read_text())["fine_tuned_model"] == done.job["fine_tuned_model"]
    assert (there / "training_files" / "training rows.jsonl").stat().st_size == done.job["training_files"][0]["bytes"]
    assert json.loads((there / "model" / "model_metadata.json").read_text())["id"] == done.job["fine_tuned_model"]
    assert "is there already" in tunesmith(server, folder, None, *words, code=1)
    tunesmith(server, folder, None, *words, "--force")
    assert [path.name for path in (folder / "out").iterdir()] == [job_id]
    (folder / "mine").mkdir()
    said = tunesmith(server, folder, None, "export", job_id, "--to", "csv", "--name", "mine", "--force", code=1)
    assert "is there already and is no run" in said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["trackio", "mlflow"])
def test_export_to_a_local_store(kind: str, server: Server, done: Done, folder: Path) -> None:
    python = python_with("trackio") if kind == "trackio" else python_with("mlflow-skinny", "sqlalchemy", "alembic")
    job_id = done.job["id"]
    words = ("export", job_id, "--to", kind, "--folder", "store", "--project", "reviews", "--tag", "small")
    said = json.loads(tunesmith(server, folder, python, "--json", *words))
    assert said["job"] == job_id
    assert "is in" in tunesmith(server, folder, python, *words, code=1)
    tunesmith(server, folder, python, *words, "--force")

    program = HERE / "programs" / "read_trackers.py"
    found = json.loads(run([str(python), str(program), kind, str(folder / "store"), "reviews"], os.environ, folder))
    metrics = {
        name: {int(step): value for step, value in history.items()}
        for name, history in found[job_id]["metrics"].items()
    }
    assert metrics == done.columns
    assert {"training_files", "validation_files", "result_files", "model", "fine_tune_details"} == set(found["kinds"])
    if kind == "mlflow":
        assert found[job_id]["status"] == "FINISHED"
        assert found[job_id]["config"]["hyperparams.n_epochs"] == "2"
        assert found[job_id]["tags"]["fine_tuned_model"] == done.job["fine_tuned_model"]
        assert "training_files/training rows.jsonl" in found[job_id]["files"]
    else:
        assert found[job_id]["config"]["hyperparams"] == done.job["hyperparams"]


def test_a_tracker_that_is_not_installed(server: Server, done: Done, folder: Path) -> None:
    said = tunesmith(server, folder, None, "export", done.job["id"], "--to", "mlflow", code=1)
    assert "MLflow cannot be used: the Python package mlflow is not installed" in said
    assert "pip install 'tunesmith[mlflow]'" in said
