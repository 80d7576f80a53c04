"""What the platform reads from a run folder between trainers, and what it leaves of one. Knows files, not jobs."""

from __future__ import annotations

import shutil

from tunesmith.rundir import RunDir

LAST_WORDS_CHARACTERS = 400


def newest_checkpoint(run_dir: RunDir) -> str | None:
    """Name of the last checkpoint folder, None while there is none."""
    names = (path.name for path in run_dir.checkpoints.glob("step-*") if not path.suffix)  # .tmp is half written
    return max(names, key=lambda name: (len(name), name), default=None)


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


def prune(run_dir: RunDir) -> None:
    """Leaves what tells how an ended run went: spec, results, progress, parity rows, outcome and log. Idempotent."""
    for folder in (run_dir.checkpoints, run_dir.epochs, run_dir.adapter):
        shutil.rmtree(folder, ignore_errors=True)
    for file in (run_dir.validation_file, run_dir.training_file):  # last the one by which unpruned folders are found
        file.unlink(missing_ok=True)
