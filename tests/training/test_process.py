"""The trainer as the platform meets it: a process that is killed, stopped, started twice and orphaned."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.rows import CLASSIFY, examples, make_run
from tunesmith.rundir import Outcome, RunDir
from tunesmith.training.loop import train
from tunesmith.training.process import AlreadyRunning, only_trainer

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
PATIENCE_S = 60
PRODUCTS = (
    "results.csv",
    "progress.jsonl",
    "parity.json",
    "outcome.json",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
)


def test_killed_at_random_moments_it_ends_as_if_undisturbed(tiny_base: Path, tmp_path: Path) -> None:
    chance = random.Random(1)
    whole, killed = (_make(tmp_path / name, tiny_base) for name in ("whole", "killed"))
    outcome = train(whole)
    assert outcome is not None
    whole.write_outcome(outcome)

    for _ in range(3):
        trainer = _start(killed)
        goal = _steps(killed) + chance.randint(1, 10)
        _until(lambda goal=goal: _steps(killed) >= goal)  # type: ignore[misc]
        trainer.kill()
        assert trainer.wait(PATIENCE_S) == -signal.SIGKILL
        assert killed.read_outcome() is None
    assert _start(killed).wait(PATIENCE_S) == 0

    for name in PRODUCTS:
        assert (whole.path / name).read_bytes() == (killed.path / name).read_bytes(), name


def test_sigterm_leaves_a_checkpoint_and_the_next_start_goes_on(tiny_base: Path, tmp_path: Path) -> None:
    run_dir = _make(tmp_path / "run", tiny_base, checkpoint_interval_s=1e9)
    trainer = _start(run_dir)
    _until(lambda: _steps(run_dir) >= 3)

    trainer.send_signal(signal.SIGTERM)

    assert trainer.wait(PATIENCE_S) == 75
    assert run_dir.read_outcome() is None
    (saved,) = run_dir.checkpoints.iterdir()
    assert saved.name == f"step-{_steps(run_dir)}"
    before = run_dir.results.read_bytes()
    assert _start(run_dir).wait(PATIENCE_S) == 0
    assert run_dir.results.read_bytes().startswith(before)
    undisturbed = _make(tmp_path / "undisturbed", tiny_base)
    train(undisturbed)
    assert run_dir.results.read_bytes() == undisturbed.results.read_bytes()


def test_a_second_trainer_leaves_the_folder_alone(tiny_base: Path, tmp_path: Path) -> None:
    run_dir = _make(tmp_path / "run", tiny_base, n_epochs=4_000)
    first = _start(run_dir)
    _until(lambda: _steps(run_dir) >= 1)

    second = subprocess.run(
        _command(run_dir), env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )

    assert second.returncode == 1
    assert "another trainer" in second.stderr
    assert first.poll() is None
    first.kill()
    first.wait(PATIENCE_S)


def test_it_dies_with_its_parent(tiny_base: Path, tmp_path: Path) -> None:
    run_dir = _make(tmp_path / "run", tiny_base, n_epochs=400)
    starter = f"import subprocess, sys; subprocess.Popen({_command(run_dir)!r}).wait()"
    parent = subprocess.Popen([sys.executable, "-c", starter], env=ENVIRONMENT, stderr=subprocess.DEVNULL)
    _until(lambda: _steps(run_dir) >= 1)

    parent.kill()
    parent.wait(PATIENCE_S)

    _until(lambda: _is_free(run_dir))  # the kernel lets go of the lock when the trainer is gone
    assert run_dir.read_outcome() is None


def test_bad_data_ends_with_a_sentence_for_the_user(tiny_base: Path, tmp_path: Path) -> None:
    run_dir = make_run(
        tmp_path / "run",
        tiny_base,
        train=[*examples(5), {"prompt": "word " * 40, "completion": " positive"}],
        hyperparameters=replace(CLASSIFY, compute_classification_metrics=False),
        context_tokens=32,
    )

    finished = subprocess.run(
        _command(run_dir), env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )

    assert finished.returncode == 0
    outcome = run_dir.read_outcome()
    assert outcome is not None
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert outcome.error.startswith("Line 6 of the training_file has ")
    assert not run_dir.adapter.exists()


def test_a_fault_of_ours_is_in_the_log_and_not_in_the_sentence(tiny_base: Path, tmp_path: Path) -> None:
    run_dir = _make(tmp_path / "run", tiny_base)
    spec = json.loads(run_dir.spec.read_text())
    run_dir.spec.write_text(json.dumps(spec | {"nowhere": "a field that no version knows"}))

    finished = subprocess.run(
        _command(run_dir), env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )

    assert finished.returncode == 0
    outcome = run_dir.read_outcome()
    assert outcome is not None
    assert outcome.status == "failed"
    assert outcome.error is not None
    assert "nowhere" not in outcome.error
    assert "Traceback" in finished.stderr
    assert "nowhere" in finished.stderr


def test_a_full_disk_is_no_outcome_and_the_next_start_goes_on(tiny_base: Path, tmp_path: Path) -> None:
    """A limit of file size stands for the disk: it says no to a checkpoint, which is larger than all else."""
    run_dir, undisturbed = (_make(tmp_path / name, tiny_base, checkpoint_interval_s=0.0) for name in ("run", "other"))
    limit = "import resource, runpy; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    run = "runpy.run_module('tunesmith.training', run_name='__main__', alter_sys=True)"
    died = subprocess.run(
        [sys.executable, "-c", limit + run, str(run_dir.path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert died.returncode == 1
    assert died.stderr.splitlines()[-1].startswith("There is no room on the server's disk")
    assert run_dir.read_outcome() is None
    assert _start(run_dir).wait(PATIENCE_S) == _start(undisturbed).wait(PATIENCE_S) == 0
    for name in PRODUCTS:
        assert (run_dir.path / name).read_bytes() == (undisturbed.path / name).read_bytes(), name


FAULTS = {
    "a read-only disk": ("OSError(errno.EROFS, 'Read-only file system')", "can only be read", 0),
    "no memory": ('RuntimeError("DefaultCPUAllocator: can\'t allocate memory")', "too little memory", 1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_machine_is_no_outcome(tiny_base: Path, tmp_path: Path, fault: str) -> None:
    """Raised where the third checkpoint is saved; the next trainer goes on from the second."""
    error, words, shortages = FAULTS[fault]
    run_dir, undisturbed = (_make(tmp_path / name, tiny_base, n_epochs=3, checkpoint_interval_s=0.0) for name in "ab")
    break_third = (
        "import errno, runpy\n"
        "from tunesmith.training import checkpoint\n"
        "save = checkpoint.save\n"
        "def failing(folder, position, state):\n"
        f"    if position.step == 3: raise {error}\n"
        "    save(folder, position, state)\n"
        "checkpoint.save = failing\n"
        "runpy.run_module('tunesmith.training', run_name='__main__', alter_sys=True)"
    )
    died = subprocess.run(
        [sys.executable, "-c", break_third, str(run_dir.path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert died.returncode == 1
    assert words in died.stderr.splitlines()[-1]
    assert run_dir.read_outcome() is None
    assert run_dir.count_shortages() == shortages
    assert train(run_dir) == train(undisturbed)
    for name in set(PRODUCTS) - {"outcome.json"}:
        assert (run_dir.path / name).read_bytes() == (undisturbed.path / name).read_bytes(), name


def test_a_finished_run_stays_as_it_is(tiny_base: Path, tmp_path: Path) -> None:
    run_dir = _make(tmp_path / "run", tiny_base)
    run_dir.write_outcome(Outcome("failed", error="as it was"))
    before = {path.name for path in run_dir.path.iterdir()}

    assert _start(run_dir).wait(PATIENCE_S) == 0

    assert {path.name for path in run_dir.path.iterdir()} == before | {"lock"}
    assert run_dir.read_outcome() == Outcome("failed", error="as it was")


def _make(folder: Path, base: Path, *, n_epochs: int = 16, checkpoint_interval_s: float = 0.0) -> RunDir:
    asked = replace(CLASSIFY, n_epochs=n_epochs)
    return make_run(
        folder,
        base,
        train=examples(9),
        valid=examples(4),
        hyperparameters=asked,
        checkpoint_interval_s=checkpoint_interval_s,
    )


def _command(run_dir: RunDir) -> list[str]:
    return [sys.executable, "-m", "tunesmith.training", str(run_dir.path)]


def _start(run_dir: RunDir) -> subprocess.Popen[bytes]:
    return subprocess.Popen(_command(run_dir), env=ENVIRONMENT, stderr=subprocess.DEVNULL)


def _steps(run_dir: RunDir) -> int:
    """Steps whose rows are in results.csv."""
    return run_dir.results.read_bytes().count(b"\n") - 1 if run_dir.results.exists() else 0


def _is_free(run_dir: RunDir) -> bool:
    try:
        with only_trainer(run_dir.lock):
            return True
    except AlreadyRunning:
        return False


def _until(condition: Callable[[], bool]) -> None:
    """Waits for something another process does."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
