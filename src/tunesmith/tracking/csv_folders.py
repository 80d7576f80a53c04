"""Runs as folders of plain files: `<folder>/<job>/results.csv`, `config.json`, and what goes with them."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunesmith.tracking.base import AlreadyTracked, Attachment, Subject, TrackerUnusable

SUMMARY = "summary.json"
"""Written last: what has none is no run of ours, and is never replaced."""


def open_run(subject: Subject, *, folder: Path | None, force: bool, resume: bool) -> CsvFolder:
    """See `tracking.base.open_run`."""
    final = (folder or Path()) / re.sub(r"^[.]|[^\w.-]", "_", subject.name or subject.job_id)
    if final.exists() and not (final / SUMMARY).is_file():
        raise TrackerUnusable(f"{final} is there already and is no run. Choose another folder or name")
    if final.exists() and not (force or resume):
        raise AlreadyTracked(f"{final} is there already. Replace it with --force.")
    beside = final.with_name(final.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    (beside / "config.json").write_text(json.dumps(dict(subject.config), indent=2))
    return CsvFolder(final, beside)


class CsvFolder:
    """See `tracking.base.Tracker`. Whole once `end` has renamed it."""

    logged_step = 0

    def __init__(self, final: Path, beside: Path) -> None:
        self._final = final
        self._beside = beside
        self._rows: list[dict[str, float]] = []
        self.where = str(final)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Kept: the columns are known when all rows are."""
        self._rows.append({"step": step, **values})

    def attach(self, attachment: Attachment) -> None:
        """A copy, in a folder named after its kind."""
        folder = self._beside / attachment.kind
        folder.mkdir(exist_ok=True)
        shutil.copyfile(attachment.path, folder / attachment.name)

    def end(self, summary: Mapping[str, Any]) -> None:
        """Writes the rows and puts the folder in place."""
        columns = list(dict.fromkeys(name for row in self._rows for name in row))
        with (self._beside / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns or ["step"], lineterminator="\n")
            writer.writeheader()
            writer.writerows(self._rows)
        (self._beside / SUMMARY).write_text(json.dumps(dict(summary), indent=2))
        if self._final.exists():
            shutil.rmtree(self._final)
        self._beside.rename(self._final)
