from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.rundir import RunDir
from tunesmith.runs import folder


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def test_checkpoints_are_ordered_by_number(run_dir: RunDir) -> None:
    assert folder.newest_checkpoint(run_dir) is None
    for name in ("step-9", "step-100", "step-20", "step-101.tmp", "other"):
        (run_dir.checkpoints / name).mkdir(parents=True)
    assert folder.newest_checkpoint(run_dir) == "step-100"


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("", "nothing"),
        ("Traceback\n  File x\nValueError: loss is not finite\n", "ValueError: loss is not finite"),
        (
            "Traceback\nValueError: loss is not finite\nThe trainer process exited with code 1.\n",
            "ValueError: loss is not finite",
        ),
        ("step 3\nThe trainer process was ended by SIGKILL.\n", "The trainer process was ended by SIGKILL."),
        ("The trainer process exited with code 3.\n", "The trainer process exited with code 3."),
        ("x" * 1000, "x" * folder.LAST_WORDS_CHARACTERS),
    ],
)
def test_last_words(run_dir: RunDir, log: str, expected: str) -> None:
    run_dir.log.write_text(log)
    assert folder.last_words(run_dir) == expected


def test_last_words_of_a_trainer_that_never_spoke(run_dir: RunDir) -> None:
    assert folder.last_words(run_dir) == "nothing"


def test_pruning_keeps_what_tells_how_a_run_went(run_dir: RunDir) -> None:
    kept = {run_dir.spec, run_dir.results, run_dir.progress, run_dir.parity, run_dir.outcome, run_dir.log}
    for path in [*kept, run_dir.training_file, run_dir.validation_file]:
        path.touch()
    for path in (run_dir.checkpoints / "step-1", run_dir.adapter):
        path.mkdir(parents=True)
    folder.prune(run_dir)
    folder.prune(run_dir)
    assert set(run_dir.path.iterdir()) == kept
