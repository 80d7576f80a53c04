"""Runs of Trackio, in its local database: `TRACKIO_DIR`, or its own default."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tunesmith.tracking.base import AlreadyTracked, Attachment, Subject, TrackerUnusable


def open_run(subject: Subject, *, folder: Path | None, force: bool, resume: bool) -> TrackioRun:
    """See `tracking.base.open_run`."""
    if folder is not None:
        os.environ["TRACKIO_DIR"] = str(folder.absolute())
    import trackio  # now: it reads once, at its import, where it works

    return TrackioRun(trackio, subject, replace=force or resume)


class TrackioRun:
    """See `tracking.base.Tracker`. Always begun anew, so nothing is there twice."""

    logged_step = 0

    def __init__(self, trackio: ModuleType, subject: Subject, *, replace: bool) -> None:
        self._trackio = trackio
        name = subject.name or subject.job_id
        with _quiet():
            try:
                there = [run for run in trackio.Api().runs(subject.project) if run.name == name]
            except ValueError:  # there is no such project yet
                there = []
            if there and not replace:
                raise AlreadyTracked(f"{name} is in project {subject.project} already. Replace it with --force.")
            for run in there:
                run.delete()
            try:
                self._run = trackio.init(
                    project=subject.project,
                    name=name,
                    config={**subject.config, "tags": list(subject.tags)},
                    resume="never",
                    embed=False,
                    auto_log_gpu=False,
                    auto_log_cpu=False,
                )
            except ValueError as error:
                raise TrackerUnusable(f"Trackio does not take this run: {error}") from error
        self.where = f"Trackio project {subject.project}, run {name}; to look at it: trackio show"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Queued; written by a thread of Trackio's."""
        self._run.log(dict(values), step=step)

    def attach(self, attachment: Attachment) -> None:
        """An artifact of Trackio's."""
        artifact = self._trackio.Artifact(attachment.artifact_name, attachment.kind)
        artifact.add_file(attachment.path, name=attachment.name)
        with _quiet():
            self._run.log_artifact(artifact, aliases=[attachment.file_id])

    def end(self, summary: Mapping[str, Any]) -> None:
        """Waits for the thread. Trackio has no summary: it goes with the details."""
        with _quiet():
            self._trackio.finish()  # and not the run's own: Trackio would end it again at exit, and say so


def _quiet() -> contextlib.AbstractContextManager[Any]:
    """Trackio tells people about itself on standard output, which is ours."""
    return contextlib.redirect_stdout(io.StringIO())
