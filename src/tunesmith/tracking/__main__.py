"""`python -m tunesmith.tracking <tracking folder>`: tells a tracker of one job, as it trains. See `tracking.folder`.

A process of its own, so that whatever a tracker's package does, hangs in or dies of stays here. It ends with the
process that started it; started again, it goes on with the same run, and no point is there twice.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from pathlib import Path

from tunesmith.rundir import write_json
from tunesmith.tracking.base import Tracker, TrackerUnusable, open_run
from tunesmith.tracking.folder import TrackingDir, TrackingOutcome, read_json
from tunesmith.training.process import die_with_parent

POLL_S = 0.5
SECRET_NAMES = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def main(folder: TrackingDir) -> int:
    """Follows until the job has ended and the tracker has everything; 0, or 1 if starting it again may help."""
    die_with_parent()
    folder.heartbeat.touch()
    spec = folder.read_spec()
    try:
        tracker = open_run(spec.kind, spec.subject, folder=folder.path, resume=True)
        write_json(folder.began, {"where": tracker.where})
        _follow(folder, tracker)
    except TrackerUnusable as error:
        folder.write_outcome(TrackingOutcome("unusable", without_secrets(error.message)))
        return 0
    except Exception:  # of a package that we do not know: the log has it, and the server starts us again
        sys.stderr.write(without_secrets(traceback.format_exc()))
        return 1
    folder.write_outcome(TrackingOutcome("done"))
    return 0


def _follow(folder: TrackingDir, tracker: Tracker) -> None:
    """Every row once, in order; then how it ended."""
    seen = 0
    while True:
        ended = read_json(folder.end)  # before the rows: of a job that has ended, all rows are there
        for row in folder.read_rows(seen):
            seen = row.event
            if row.step > tracker.logged_step:
                tracker.log(row.step, row.values)
        folder.heartbeat.touch()
        if ended is not None:
            break
        time.sleep(POLL_S)
    tracker.end(ended)


def without_secrets(text: str) -> str:
    """The text without the values of environment variables that are named like secrets."""
    for name, value in os.environ.items():
        if len(value) >= 6 and any(word in name.upper() for word in SECRET_NAMES):
            text = text.replace(value, f"<{name}>")
    return text


if __name__ == "__main__":
    sys.exit(main(TrackingDir(Path(sys.argv[1]))))
