"""Runs of MLflow: at `MLFLOW_TRACKING_URI`, or in a SQLite database and a folder of files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from tunesmith.tracking.base import AlreadyTracked, Attachment, Subject, TrackerUnusable

JOB_TAG = "tunesmith.job_id"
MAX_PARAM_CHARACTERS = 6_000
BATCH = 1_000
"""Metrics that one request may have."""


def open_run(subject: Subject, *, folder: Path | None, force: bool, resume: bool) -> MlflowRun:
    """See `tracking.base.open_run`."""
    uri, artifacts = os.environ.get("MLFLOW_TRACKING_URI"), None
    if folder is not None or uri is None:
        home = (folder or Path()).absolute()
        home.mkdir(parents=True, exist_ok=True)
        uri, artifacts = f"sqlite:///{home / 'mlflow.db'}", (home / "mlartifacts").as_uri()
    try:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(subject.project)
        experiment = (
            client.create_experiment(subject.project, artifact_location=artifacts)
            if found is None
            else found.experiment_id
        )
        there = client.search_runs([experiment], f"tags.`{JOB_TAG}` = '{subject.job_id}'")
        if there and not (force or resume):
            raise AlreadyTracked(f"{subject.job_id} is in {uri} already. Replace it with --force.")
        for run in there:
            client.delete_run(run.info.run_id)
        tags = {JOB_TAG: subject.job_id} | dict.fromkeys(subject.tags, "")
        run_id = client.create_run(experiment, run_name=subject.name or subject.job_id, tags=tags).info.run_id
    except MlflowException as error:
        raise TrackerUnusable(f"MLflow does not take this run: {error.message}") from error
    return MlflowRun(client, run_id, uri, subject)


class MlflowRun:
    """See `tracking.base.Tracker`. Always begun anew, so nothing is there twice."""

    logged_step = 0

    def __init__(self, client: MlflowClient, run_id: str, uri: str, subject: Subject) -> None:
        self._client = client
        self._run_id = run_id
        self._metrics: list[Metric] = []
        self.where = f"{uri}, experiment {subject.project}, run {run_id}"
        params = [Param(name, str(value)[:MAX_PARAM_CHARACTERS]) for name, value in flat(subject.config)]
        self._client.log_batch(run_id, params=params)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Kept until there are enough for a request."""
        run = self._client.get_run(self._run_id) if not self._metrics else None
        started_ms = run.info.start_time if run is not None else self._metrics[0].timestamp
        self._metrics += [Metric(name, value, started_ms, step) for name, value in values.items()]
        if len(self._metrics) >= BATCH:
            self._send()

    def attach(self, attachment: Attachment) -> None:
        """A file of the run's, in a folder named after its kind."""
        with tempfile.TemporaryDirectory() as folder:
            named = Path(folder) / attachment.name
            named.symlink_to(attachment.path.absolute())
            self._client.log_artifact(self._run_id, str(named), attachment.kind)

    def end(self, summary: Mapping[str, Any]) -> None:
        """The summary becomes tags."""
        self._send()
        for name, value in summary.items():
            self._client.set_tag(self._run_id, name, value)
        self._client.set_terminated(self._run_id, "FINISHED" if summary["status"] == "succeeded" else "FAILED")

    def _send(self) -> None:
        while self._metrics:
            self._client.log_batch(self._run_id, metrics=self._metrics[:BATCH])
            del self._metrics[:BATCH]


def flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested objects, by dotted names.

    >>> dict(flat({"model": "ada", "hyperparams": {"n_epochs": 4}}))
    {'model': 'ada', 'hyperparams.n_epochs': 4}
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{before}{name}.")
        else:
            yield f"{before}{name}", value
