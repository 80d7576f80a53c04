from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.rundir import RunDir
from tunesmith.runs import folder


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path)


def test_what_is_placed_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"

    def torn(target: Path) -> None:
        target.write_bytes(b"half")
        raise OSError("the store went away")

    with pytest.raises(OSError, match="went away"):
        folder.place(path, torn)
    assert not path.exists()
    folder.place(path, lambda target: target.write_bytes(b"whole") and None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["train.jsonl"]
    assert path.read_bytes() == b"whole"


def test_examples_are_the_lines_that_hold_something(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"a": 1}\n\n  \r\n{"b": 2}\r\n{"c": 3}')
    assert folder.count_examples(path) == 3


def test_checkpoints_are_ordered_by_number(run_dir: RunDir) -> None:
    assert folder.newest_checkpoint(run_dir) is None
    for name in ("step-9", "step-100", "step-20", "other"):
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


def test_an_adapter_is_moved_once(tmp_path: Path) -> None:
    adapter, kept = tmp_path / "runs" / "1" / "adapter", tmp_path / "adapters" / "1"
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    folder.keep_adapter(adapter, kept)
    folder.keep_adapter(adapter, kept)  # after a crash between the move and the transaction
    assert not adapter.exists()
    assert (kept / "adapter_model.safetensors").read_bytes() == b"weights"


def test_pruning_keeps_what_tells_how_a_run_went(run_dir: RunDir) -> None:
    kept = {run_dir.spec, run_dir.results, run_dir.progress, run_dir.parity, run_dir.outcome, run_dir.log}
    for path in [*kept, run_dir.training_file, run_dir.validation_file]:
        path.touch()
    for path in (run_dir.checkpoints / "step-1", run_dir.adapter):
        path.mkdir(parents=True)
    folder.prune(run_dir)
    folder.prune(run_dir)
    assert set(run_dir.path.iterdir()) == kept
