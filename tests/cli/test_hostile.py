"""Files made to do harm: refused in words or read, nothing left half. Memory is measured by benchmarks/hostile.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.hostile import HARMS, Harm
from tunesmith.cli.main import main

SMALL = 0.002
"""The share of their size at which the large ones are made here: above every limit all the same."""


@pytest.mark.parametrize("command", [["prepare", "-q"], ["doctor", "--fix", "--yes"]], ids=["prepare", "doctor"])
@pytest.mark.parametrize("harm", HARMS, ids=lambda harm: harm.name)
def test_it_is_refused_in_words_or_read(
    harm: Harm,
    command: list[str],
    tmp_path: Path,
    prepare_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quick_tokenizer: None,
) -> None:
    monkeypatch.setenv("TUNESMITH_HOME", str(prepare_home))
    monkeypatch.chdir(tmp_path)
    harm.make(tmp_path / harm.file, SMALL)
    code = main([command[0], harm.file, *command[1:]])
    told = capsys.readouterr()
    assert all(letter >= " " or letter in "\n\t" for letter in told.out + told.err)
    new = {path.name for path in tmp_path.iterdir()} - {harm.file}
    if harm.said:
        assert code == 1
        assert any(part in told.err for part in harm.said)
        assert len(told.err) < 2_000
        assert not new
    else:
        assert code in (0, 1)  # what only a person can mend may be left
        assert new


@pytest.mark.slow
def test_memory_stays_flat_at_full_size(tmp_path: Path) -> None:
    """Also found by `python -m benchmarks.hostile`."""
    command = [sys.executable, "-m", "benchmarks.hostile", "--folder", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
