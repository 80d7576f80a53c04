"""Many runs in one trainer: each ends with the bytes that it ends with alone, whatever becomes of the others."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.training.rows import CLASSIFY, examples, make_run
from tests.waiting import until
from tunesmith.rundir import ORDERS, ResolvedHyperparameters, RunDir
from tunesmith.training.gradients import Learner, Lesson
from tunesmith.training.host import Host
from tunesmith.training.loop import train
from tunesmith.training.metrics import Tally
from tunesmith.training.orders import Order, Orders
from tunesmith.training.together import Shared

PLAIN = ResolvedHyperparameters(n_epochs=2, batch_size=1, learning_rate_multiplier=0.1, prompt_loss_weight=0.01)
PRODUCTS = (
    "results.csv",
    "progress.jsonl",
    "parity.json",
    "outcome.json",
    "adapter/adapter_model.safetensors",
    "adapter/adapter_config.json",
)
PATIENCE_S = 60.0


def _runs(folder: Path, base: Path, **changes: Any) -> list[RunDir]:
    """Runs that differ in all that may differ between runs of one base; bf16, where a difference would show."""
    asked = [
        PLAIN,
        replace(PLAIN, batch_size=3, prompt_loss_weight=0.0),
        replace(CLASSIFY, batch_size=2),
        replace(PLAIN, n_epochs=4, learning_rate_multiplier=0.3, best_epoch=True, epoch_checkpoints=2),
    ]
    runs = [
        make_run(
            folder / f"run-{index}",
            base,
            train=examples(6 + index),
            valid=examples(index) or None,
            hyperparameters=each,
        )
        for index, each in enumerate(asked)
    ]
    for index, run_dir in enumerate(runs):
        spec = replace(run_dir.read_spec(), seed=index, lora_rank=(4, 8)[index % 2], precision="bfloat16", **changes)
        run_dir.write_spec(spec)
    return runs


@pytest.fixture(scope="module")
def alone(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[RunDir]:
    runs = _runs(tmp_path_factory.mktemp("alone"), tiny_base)
    for run_dir in runs:
        outcome = train(run_dir)
        assert outcome is not None
        run_dir.write_outcome(outcome)
    return runs


def _assert_same(run_dir: RunDir, other: RunDir) -> None:
    for name in PRODUCTS:
        assert (run_dir.path / name).read_bytes() == (other.path / name).read_bytes(), (run_dir.path.name, name)


def _host(runs: list[RunDir]) -> Host:
    with Shared(time.monotonic) as shared:
        host = Host(shared, lambda: False, None)
        for run_dir in runs:
            host.take(run_dir)
        while host.working:
            host.step()
    return host


def test_each_of_many_runs_ends_with_the_bytes_of_a_run_alone(
    alone: list[RunDir], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = _runs(tmp_path, tiny_base)
    sizes: list[int] = []
    learn = Learner.learn

    def counted(self: Learner, lessons: list[Lesson]) -> list[Tally]:
        sizes.append(len(lessons))
        return learn(self, lessons)

    monkeypatch.setattr(Learner, "learn", counted)

    host = _host(runs)

    assert host.left == 0
    assert sizes[0] == len(runs)
    assert sizes[-1] == 1  # the shorter ones have ended
    for run_dir, expected in zip(runs, alone, strict=True):
        _assert_same(run_dir, expected)
        assert [path.name for path in run_dir.epochs.glob("*")] == [path.name for path in expected.epochs.glob("*")]


def test_what_befalls_one_run_befalls_no_other(alone: list[RunDir], tiny_base: Path, tmp_path: Path) -> None:
    runs = _runs(tmp_path, tiny_base)
    bad_data = make_run(
        tmp_path / "bad-data", tiny_base, train=[{"prompt": "a b c d e f", "completion": " g"}], hyperparameters=PLAIN,
        context_tokens=3,
    )  # fmt: skip
    diverging = make_run(
        tmp_path / "diverging", tiny_base, train=examples(9), hyperparameters=replace(PLAIN, n_epochs=9),
        base_learning_rate=1e30,
    )  # fmt: skip
    broken = make_run(tmp_path / "broken", tiny_base, train=examples(3), hyperparameters=PLAIN)
    broken.spec.write_text("{}")
    for run_dir in (bad_data, diverging):
        run_dir.write_spec(replace(run_dir.read_spec(), precision="bfloat16"))

    _host([runs[0], bad_data, runs[1], diverging, broken, *runs[2:]])

    for run_dir, expected in zip(runs, alone, strict=True):
        _assert_same(run_dir, expected)
    errors = []
    for run_dir in (bad_data, diverging, broken):
        outcome = run_dir.read_outcome()
        assert outcome is not None
        assert outcome.status == "failed"
        errors.append(outcome.error or "")
    assert errors[0].startswith("Line 1 of the training_file has ")
    assert "no longer a number" in errors[1]
    assert "unexpected error" in errors[2]


def test_a_step_that_fails_for_all_is_tried_for_each(
    alone: list[RunDir], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = _runs(tmp_path, tiny_base)
    learn = Learner.learn

    def learn_few(self: Learner, lessons: list[Lesson]) -> list[Tally]:
        if len(lessons) > 2:
            raise MemoryError("no room for so many")
        return learn(self, lessons)

    monkeypatch.setattr(Learner, "learn", learn_few)

    _host(runs)

    for run_dir, expected in zip(runs, alone, strict=True):
        _assert_same(run_dir, expected)
        assert run_dir.count_shortages() == 0


@pytest.mark.slow
def test_killed_and_started_again_in_other_company_the_bytes_stay(
    alone: list[RunDir], tiny_base: Path, tmp_path: Path
) -> None:
    chance = random.Random(4)
    runs = _runs(tmp_path, tiny_base, checkpoint_interval_s=0.0)
    for company in (runs, runs[2:]):
        going = [run_dir for run_dir in company if run_dir.read_outcome() is None]
        trainer = _start(going)
        goal = _steps(going[-1]) + chance.randint(1, 4)
        until(partial(_has_taken, going[-1], goal), within_s=PATIENCE_S)
        trainer.kill()
        assert trainer.wait(PATIENCE_S) == -signal.SIGKILL

    assert _start(runs).wait(PATIENCE_S) == 0

    for run_dir, expected in zip(runs, alone, strict=True):
        _assert_same(run_dir, expected)


def test_runs_come_and_go_while_others_are_trained(alone: list[RunDir], tiny_base: Path, tmp_path: Path) -> None:
    first, saved, dropped, late = runs = _runs(tmp_path, tiny_base)
    long = [replace(run_dir.read_spec().hyperparameters, n_epochs=2_000) for run_dir in runs]
    for run_dir, asked in zip((first, dropped), (long[0], long[2]), strict=True):
        run_dir.write_spec(replace(run_dir.read_spec(), hyperparameters=asked))
    trainer = _start([first, dropped], ORDERS)
    assert trainer.stdin is not None

    def order(verb: str, run_dir: RunDir) -> None:
        assert trainer.stdin is not None
        trainer.stdin.write(f"{verb} {run_dir.path}\n".encode())
        trainer.stdin.flush()

    until(lambda: _steps(dropped) >= 2, within_s=PATIENCE_S)
    order("take", saved)
    order("nonsense", saved)
    order("take", late)
    until(lambda: _steps(saved) >= 1, within_s=PATIENCE_S)
    order("save", saved)
    order("drop", dropped)
    until(dropped.released.exists, within_s=PATIENCE_S)
    until(lambda: saved.released.exists() or saved.read_outcome() is not None, within_s=PATIENCE_S)
    steps_then = _steps(dropped)
    until(lambda: late.read_outcome() is not None, within_s=PATIENCE_S)

    assert not dropped.checkpoints.exists()
    assert _steps(dropped) == steps_then
    assert dropped.read_outcome() is None
    if saved.released.exists():
        assert len(list(saved.checkpoints.iterdir())) == 1
        assert _start([saved]).wait(PATIENCE_S) == 0
    for run_dir in (saved, late):
        _assert_same(run_dir, alone[runs.index(run_dir)])
    assert trainer.poll() is None
    trainer.terminate()
    trainer.communicate(timeout=PATIENCE_S)
    assert trainer.returncode == 75
    assert len(list(first.checkpoints.iterdir())) == 1


def test_a_run_that_is_called_off_before_its_turn_is_never_begun(
    alone: list[RunDir], tiny_base: Path, tmp_path: Path
) -> None:
    first, other, *_ = _runs(tmp_path, tiny_base)
    reading, writing = os.pipe()
    with Shared(time.monotonic) as shared:
        host = Host(shared, lambda: False, Orders(reading))
        host.take(first)
        os.write(writing, f"take {other.path}\ndrop {other.path}\n".encode())
        while host.working:
            host.step()
    os.close(writing)
    os.close(reading)

    _assert_same(first, alone[0])
    assert other.released.exists()
    assert not other.results.exists()


def test_a_dropped_run_writes_nothing_more(tiny_base: Path, tmp_path: Path) -> None:
    first, other, *_ = _runs(tmp_path, tiny_base)
    reading, writing = os.pipe()
    with Shared(time.monotonic) as shared:
        host = Host(shared, lambda: False, Orders(reading))
        host.take(first)
        host.take(other)
        host.step()
        before = {path.name: path.read_bytes() for path in other.path.iterdir() if path.name != "heartbeat"}
        os.write(writing, f"drop {other.path}\n".encode())
        host.step()
        host.step()
    os.close(writing)
    os.close(reading)

    assert other.released.exists()
    assert _steps(first) == 3
    assert {name: (other.path / name).read_bytes() for name in before} == before


def test_one_of_a_busy_group_is_let_go_of_within_two_seconds_and_the_others_keep_their_bytes(
    alone: list[RunDir], tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = _runs(tmp_path, tiny_base)
    asked = replace(PLAIN, batch_size=64, prompt_loss_weight=1.0)
    busy = [
        make_run(tmp_path / f"busy-{index}", tiny_base, train=examples(128), hyperparameters=asked)
        for index in range(4)
    ]  # each step of theirs has as many tokens as the pass of a processor holds
    reading, writing = os.pipe()
    learn, steps, dropped_at = Learner.learn, 0, 0.0

    def learn_and_drop(self: Learner, lessons: list[Lesson]) -> list[Tally]:
        nonlocal steps, dropped_at
        steps += any(len(lesson.rows) == asked.batch_size for lesson in lessons)
        if steps == 3 and not dropped_at:  # while the step of all of them is under way
            os.write(writing, f"drop {busy[2].path}\n".encode())
            dropped_at = time.process_time()
        return learn(self, lessons)

    monkeypatch.setattr(Learner, "learn", learn_and_drop)

    took_s = None
    with Shared(time.monotonic) as shared:
        host = Host(shared, lambda: False, Orders(reading))
        for run_dir in [*busy, *runs]:
            host.take(run_dir)
        while host.working:
            host.step()
            if took_s is None and busy[2].released.exists():
                took_s = time.process_time() - dropped_at
    os.close(writing)
    os.close(reading)

    assert took_s is not None
    assert took_s < 4.0  # of processor time, 0.8 s of it where it is quiet: 2 s is the promise
    assert _steps(busy[2]) == 2
    assert busy[2].read_outcome() is None
    for run_dir in (busy[0], busy[1], busy[3]):
        assert (run_dir.path / "results.csv").read_bytes() == (busy[0].path / "results.csv").read_bytes()
        assert _steps(run_dir) == 4
    for run_dir, expected in zip(runs, alone, strict=True):
        _assert_same(run_dir, expected)


def test_orders_are_read_as_they_come() -> None:
    reading, writing = os.pipe()
    orders = Orders(reading)
    assert orders.new() == []
    os.write(writing, b"take /a b\nsave /c\ndr")
    assert orders.new() == [Order("take", Path("/a b")), Order("save", Path("/c"))]
    os.write(writing, b"op /d\nhello\n\n")
    os.close(writing)
    assert orders.new() == [Order("drop", Path("/d"))]
    assert orders.new() == []
    os.close(reading)


def _start(runs: list[RunDir], *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tunesmith.training", *(str(run_dir.path) for run_dir in runs), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    stdin = subprocess.PIPE if ORDERS in options else subprocess.DEVNULL
    return subprocess.Popen(command, env=environment, stdin=stdin, stderr=subprocess.DEVNULL)


def _has_taken(run_dir: RunDir, steps: int) -> bool:
    return _steps(run_dir) >= steps


def _steps(run_dir: RunDir) -> int:
    return max(0, len(run_dir.results.read_text().splitlines()) - 1) if run_dir.results.exists() else 0
