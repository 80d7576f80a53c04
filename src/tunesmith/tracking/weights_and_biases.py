"""Runs at Weights & Biases, through its package: on its servers, or offline in a folder that `wandb sync` uploads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import wandb

from tunesmith.tracking.base import PREFIXES, AlreadyTracked, Attachment, Subject, TrackerUnreachable, TrackerUnusable

MAX_TABLE_ROWS = 10_000
"""Of a data file shown as a table; the file itself is there whole. W&B shows no more of a table."""
INIT_TIMEOUT_S = 90
WHOLE = "tunesmith.json"
"""Written into the folder of an offline run once all of the run is in it."""


def open_run(subject: Subject, *, folder: Path | None, force: bool, resume: bool) -> WandbRun:
    """See `tracking.base.open_run`."""
    home = Path(folder or os.environ.get("WANDB_DIR") or ".").absolute()
    if not force and not resume:
        _refuse_whole(subject, home)
    try:
        run = wandb.init(
            id=subject.job_id,
            project=subject.project,
            entity=subject.entity,
            name=subject.name or subject.job_id,
            tags=subject.tags,
            job_type="fine-tune",
            config=dict(subject.config),
            resume="allow" if resume else None,
            dir=home,
            settings=wandb.Settings(
                init_timeout=INIT_TIMEOUT_S,
                silent=True,
                console="off",
                # The run is of the job, not of the process that happens to tell of it.
                disable_git=True,
                disable_code=True,
                disable_job_creation=True,
                x_disable_meta=True,
                x_disable_stats=True,
                x_save_requirements=False,
            ),
        )
    except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
        raise TrackerUnusable(
            "it takes no API key from this environment, or not the one that is there: set WANDB_API_KEY, or "
            f"WANDB_MODE=offline to keep runs on this machine ({type(error).__name__})"
        ) from error
    except wandb.errors.CommError as error:
        raise TrackerUnreachable(f"Weights & Biases does not answer as it should: {error}") from error
    if run.offline:
        # An offline run cannot be gone on with: what was not yet written when its process died is lost, and a second
        # folder of the same run would hold points twice. So it is written anew, whole, and the old one goes.
        for old in _offline_folders(subject, home):
            if old != Path(run.dir).parent.absolute():
                shutil.rmtree(old)
    return WandbRun(run)


class WandbRun:
    """See `tracking.base.Tracker`."""

    def __init__(self, run: wandb.Run) -> None:
        self._run = run
        self._folder = Path(run.dir).parent.absolute()

    @property
    def where(self) -> str:
        """Its page; offline its folder."""
        return str(self._folder) if self._run.offline else str(self._run.url)

    @property
    def logged_step(self) -> int:
        """W&B knows how far it got; an offline run always begins anew."""
        next_step: int = self._run.starting_step
        return max(0, next_step - 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Handed to W&B's own process, which sends it in its own time."""
        self._run.log(dict(values), step=step)

    def attach(self, attachment: Attachment) -> None:
        """An artifact; of training data also a table of its rows."""
        artifact = wandb.Artifact(attachment.artifact_name, type=attachment.kind, metadata={"id": attachment.file_id})
        artifact.add_file(str(attachment.path), name=attachment.name)
        if attachment.kind in PREFIXES:
            rows = list(islice(_rows(attachment.path), MAX_TABLE_ROWS))
            columns = list(dict.fromkeys(name for row in rows for name in row))
            data = [[_cell(row.get(name)) for name in columns] for row in rows]
            artifact.add(wandb.Table(columns=columns, data=data), Path(attachment.name).stem)
        self._run.log_artifact(artifact, aliases=["latest", attachment.file_id])

    def end(self, summary: Mapping[str, Any]) -> None:
        """Waits until W&B has everything; offline, until it is in the folder."""
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=0 if summary["status"] == "succeeded" else 1)
        if self._run.offline:
            (self._folder / WHOLE).write_text(json.dumps(summary))


def _refuse_whole(subject: Subject, home: Path) -> None:
    whole = [folder for folder in _offline_folders(subject, home) if (folder / WHOLE).exists()]
    where = str(whole[0]) if whole else _online_run(subject)
    if where is not None:
        raise AlreadyTracked(f"{subject.job_id} is there already: {where}. Replace it with --force.")


def _offline_folders(subject: Subject, home: Path) -> list[Path]:
    return sorted((home / "wandb").glob(f"offline-run-*-{subject.job_id}"))


def _online_run(subject: Subject) -> str | None:
    """The page of a run that ended well; None where there is none, or W&B cannot be asked."""
    if wandb.setup().settings.mode in ("offline", "disabled"):
        return None
    path = "/".join(part for part in (subject.entity, subject.project, subject.job_id) if part is not None)
    try:
        run = wandb.Api().run(path)
    except (wandb.errors.Error, ValueError):
        return None
    return str(run.url) if run.summary.get("status") == "succeeded" else None


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _cell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
