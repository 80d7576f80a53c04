"""What a tracker is told of a job, and what it is asked to do. Knows no tracker's package and nothing of the platform.

A tracker is made by one of `KINDS`; each is a module of its own here, imported when it is asked for, since its package
may not be installed.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tunesmith.errors import TunesmithError

PREFIXES = {"training_files": "train-", "validation_files": "valid-"}
"""Before the names of data files, as the published `openai wandb sync` has them."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A job, as a tracker is told of it. Holds no secrets."""

    job_id: str
    """Also the identity of the run: the same job is never two runs of one project."""
    project: str
    config: Mapping[str, Any] = field(default_factory=dict)
    """JSON: what the job was asked and trained with."""
    name: str | None = None
    """What people call the run; None: by the id of the job."""
    entity: str | None = None
    """The user or team, where a tracker has such."""
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that goes with a run."""

    path: Path
    name: str
    """What it is called there, with its ending."""
    kind: Literal["training_files", "validation_files", "result_files", "fine_tune_details", "model"]
    file_id: str
    """Tells versions of the same name apart: the id of a file or of a job."""

    @property
    def artifact_name(self) -> str:
        """What trackers call it that version files by name, in the characters they take."""
        return re.sub(r"[^\w.-]", "_", PREFIXES.get(self.kind, "") + self.name, flags=re.ASCII)


class Tracker(Protocol):
    """One run, being written."""

    @property
    def where(self) -> str:
        """Where people find it: a URL, a folder, a database."""

    @property
    def logged_step(self) -> int:
        """The last step that it held when it was opened; 0 for a new run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add the numbers of a step. Steps rise."""

    def attach(self, attachment: Attachment) -> None:
        """Add a file."""

    def end(self, summary: Mapping[str, Any]) -> None:
        """Close the run; all of it is where it belongs when this returns. `summary` is small and has a `status`."""


class TrackerUnusable(TunesmithError):
    """A tracker cannot work as it is set up; trying again would not help. The message tells the way out."""


class TrackerUnreachable(TunesmithError):
    """A tracker does not answer, or not as it should; trying again later may help."""


class AlreadyTracked(TunesmithError):
    """There is a whole run of this job already."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A tracker that there is."""

    title: str
    package: str | None
    """What has to be installed: the distribution and its extra have this name too. None: nothing."""
    make: str
    """The module and function that opens a run; see `open_run`."""


KINDS = {
    "wandb": Kind("Weights & Biases", "wandb", "tunesmith.tracking.weights_and_biases:open_run"),
    "trackio": Kind("Trackio", "trackio", "tunesmith.tracking.trackio_runs:open_run"),
    "mlflow": Kind("MLflow", "mlflow", "tunesmith.tracking.mlflow_runs:open_run"),
    "csv": Kind("CSV", None, "tunesmith.tracking.csv_folders:open_run"),
}


def open_run(kind: str, subject: Subject, *, folder: Path | None, force: bool = False, resume: bool = False) -> Tracker:
    """The run of a job at a tracker of KINDS.

    `folder` is where a tracker keeps what it keeps on this machine; None: where its package or the environment says.
    With `force` a run that is there already is replaced, with `resume` it is gone on with; with neither a whole one
    raises AlreadyTracked. Raises TrackerUnusable and TrackerUnreachable.
    """
    known = KINDS[kind]
    try:
        make: Callable[..., Tracker] = pkgutil.resolve_name(known.make)
    except ModuleNotFoundError as error:
        if known.package is None or (error.name or "").partition(".")[0] != known.package:
            raise
        raise TrackerUnusable(
            f"the Python package {known.package} is not installed beside tunesmith; it comes with "
            f"pip install 'tunesmith[{known.package}]'"
        ) from error
    return make(subject, folder=folder, force=force, resume=resume)
