"""What the platform does to a run folder before, after and between trainers. Knows files, nothing of jobs or processes.

Each function may be cut short by a crash at any line and called again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from tunesmith.rundir import RunDir, sync_folder

LAST_WORDS_CHARACTERS = 400


def place(path: Path, fetch: Callable[[Path], None]) -> None:
    """Puts at `path` what `fetch` writes: whole and durable when this returns, or not there at all."""
    beside = path.with_name(path.name + ".tmp")
    fetch(beside)
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync_folder(path.parent)


def count_examples(path: Path) -> int:
    """Lines that hold something; the file was checked line by line when it was uploaded."""
    with path.open("rb") as file:
        return sum(1 for line in file if not line.isspace())


def newest_checkpoint(run_dir: RunDir) -> str | None:
    """Name of the last checkpoint folder, None while there is none."""
    if not run_dir.checkpoints.is_dir():
        return None
    folders = [entry for entry in run_dir.checkpoints.iterdir() if entry.name.startswith("step-")]
    return max((entry.name for entry in folders), key=lambda name: (len(name), name), default=None)


def last_words(run_dir: RunDir) -> str:
    """The last line the trainer wrote about itself, for a user; an exception's line rather than its traceback."""
    try:
        lines = run_dir.log.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return "nothing"
    lines = [line.strip() for line in lines if line.strip()]
    # The executor's note of how the process ended tells less than what the process said before.
    said = [line for line in lines if not line.startswith("The trainer process ")]
    killed = bool(lines) and "was ended by" in lines[-1]
    return (lines if killed or not said else said)[-1][-LAST_WORDS_CHARACTERS:] if lines else "nothing"


def keep_adapter(adapter: Path, kept: Path) -> None:
    """Moves a finished adapter to where it stays. A second call finds it there."""
    if kept.exists():
        return
    kept.parent.mkdir(parents=True, exist_ok=True)
    for file in adapter.iterdir():
        with file.open("rb") as content:
            os.fsync(content.fileno())
    sync_folder(adapter)
    os.rename(adapter, kept)
    sync_folder(kept.parent)
    sync_folder(adapter.parent)


def prune(run_dir: RunDir) -> None:
    """Leaves what tells how an ended run went: spec, results, progress, parity rows, outcome and log."""
    for folder in (run_dir.checkpoints, run_dir.adapter):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (run_dir.training_file, run_dir.validation_file):
        file.unlink(missing_ok=True)
