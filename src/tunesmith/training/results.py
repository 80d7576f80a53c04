"""results.csv and progress.jsonl: columns, their meaning, and files that grow a line at a time."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Literal, Self

from tunesmith.rundir import ProgressLine, ResolvedHyperparameters, sync_folder
from tunesmith.training.classes import metric_names

TRAINING_COLUMNS = (
    "step",
    "elapsed_tokens",
    "elapsed_examples",
    "training_loss",
    "training_sequence_accuracy",
    "training_token_accuracy",
)
"""Measured at every step, on its batch. Elapsed counts are cumulative, repeats included."""

VALIDATION_COLUMNS = ("validation_loss", "validation_sequence_accuracy", "validation_token_accuracy")
"""Measured on one validation batch, about a hundred times a run and at the end of every epoch."""

FULL_VALIDATION = ("full_validation_loss", "full_validation_token_accuracy")
"""Measured over the whole validation set at the end of every epoch; reported with it, and no column of results.csv."""

Level = Literal["info", "warn", "error"]
Kind = Literal["message", "metrics"]

CLASSIFICATION_PREFIX = "classification/"
"""Metrics of the whole validation set, measured at the end of every epoch."""


def columns(hyperparameters: ResolvedHyperparameters, *, has_validation: bool) -> tuple[str, ...]:
    """The header of results.csv."""
    validation = VALIDATION_COLUMNS if has_validation else ()
    return (
        *TRAINING_COLUMNS,
        *validation,
        *(CLASSIFICATION_PREFIX + name for name in metric_names(hyperparameters)),
    )


class GrowingFile:
    """A file that only grows, line by line, from a length that is known to be good. To be closed (`with`)."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        """Cuts the file to `size_bytes`: what a crash left behind them goes. Raises OSError, also if it is shorter."""
        self._file = path.open("ab", buffering=0)
        actual_bytes = os.fstat(self._file.fileno()).st_size
        if actual_bytes < size_bytes:
            raise OSError(f"{path} has {actual_bytes} bytes; the checkpoint says {size_bytes}")
        self._file.truncate(size_bytes)
        sync_folder(path.parent)  # a checkpoint counts on the file being there

    def write_line(self, line: str) -> None:
        """Readers see the line when this returns."""
        content = line.encode() + b"\n"
        while content:
            content = content[self._file.write(content) :]

    def sync(self) -> int:
        """Makes the content durable; its size in bytes."""
        os.fsync(self._file.fileno())
        return os.fstat(self._file.fileno()).st_size

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


class Results(GrowingFile):
    """results.csv: a header, then one row a step. Numbers or nothing; a cell that was not measured is empty."""

    def __init__(self, path: Path, size_bytes: int, header: tuple[str, ...]) -> None:
        super().__init__(path, size_bytes)
        self._header = header
        if size_bytes == 0:
            self.write_line(",".join(header))

    def write(self, cells: Mapping[str, float | None]) -> None:
        """One row. Floats are written with the fewest digits that read back as the same number, `nan` and `inf` not at
        all: not every reader takes them for numbers.
        """
        assert cells.keys() <= set(self._header)
        values = (cells.get(name) for name in self._header)
        self.write_line(",".join("" if value is None or not math.isfinite(value) else repr(value) for value in values))


class Progress(GrowingFile):
    """progress.jsonl: what the trainer reports, one `ProgressLine` a line."""

    def __init__(self, path: Path, size_bytes: int, seq: int) -> None:
        """`seq` is that of the last line within `size_bytes`."""
        super().__init__(path, size_bytes)
        self.seq = seq

    def say(self, message: str, data: dict[str, float] | None = None, *, level: Level = "info") -> None:
        """Tells the user something."""
        self._report(level, message, data, "message")

    def epoch_completed(self, epoch: int, n_epochs: int, data: dict[str, float]) -> None:
        """Reports the end of an epoch, counted from 1."""
        self.say(f"Completed epoch {epoch}/{n_epochs}", data)

    def metrics(self, step: int, n_steps: int, data: dict[str, float]) -> None:
        """Reports the numbers of a step, in the words of the modern service."""
        self._report("info", f"Step {step}/{n_steps}: training loss={data['training_loss']:.2f}", data, "metrics")

    def _report(self, level: Level, message: str, data: dict[str, float] | None, kind: Kind) -> None:
        self.seq += 1
        line = ProgressLine(self.seq, level, message, data, kind)
        self.write_line(json.dumps(asdict(line), ensure_ascii=False))
