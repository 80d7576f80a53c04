"""How fast this machine has trained a base so far, from the run folders that are left. Asks no server."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

from tunesmith.rundir import RunDir

RECENT_RUNS = 20


def tokens_per_s(home: Path, base_dir: Path) -> float | None:
    """Trained tokens a second, the median of the latest runs that started from this checkpoint folder.

    A run counts from its start to its end, with the loading of the model and the saving of adapters in it. None where
    no such run has succeeded here.
    """
    newest = sorted((home / "runs").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True)
    rates = list(_rates(newest, base_dir))
    return statistics.median(rates) if rates else None


def _rates(run_dirs: list[Path], base_dir: Path) -> Iterator[float]:
    found = 0
    for path in run_dirs:
        run_dir = RunDir(path)
        try:
            spec, outcome = json.loads(run_dir.spec.read_text()), run_dir.read_outcome()
            took_s = run_dir.outcome.stat().st_mtime - run_dir.spec.stat().st_mtime
        except (OSError, ValueError, TypeError):  # not a run, one still under way, or one of another version
            continue
        if outcome is None or outcome.status != "succeeded" or not outcome.trained_tokens or took_s <= 0:
            continue
        if isinstance(spec, dict) and spec.get("base_dir") == str(base_dir):
            yield outcome.trained_tokens / took_s
            found += 1
            if found == RECENT_RUNS:
                return
