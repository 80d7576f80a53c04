"""Whole runs on the compiled step, held to what `test_loop`, `test_memory`, `test_metamorphic` and `test_process` say.

The base of those has heads too narrow for it.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.tiles import needs_bf16, needs_tiles
from tests.training.rows import CLASSIFY, examples, make_run
from tests.waiting import until
from tunesmith.rundir import ResolvedHyperparameters, RunDir
from tunesmith.training import loop, step
from tunesmith.training.batches import Schedule
from tunesmith.training.host import Host
from tunesmith.training.loop import train
from tunesmith.training.memory import Room
from tunesmith.training.passes import Piece
from tunesmith.training.together import Shared

pytestmark = needs_tiles

PRODUCTS = ("results.csv", "progress.jsonl", "parity.json", "adapter/adapter_model.safetensors")
PLAIN = ResolvedHyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=0.1, prompt_loss_weight=0.01)
N_ROWS = 11
"""The last batch has two rows."""
ROUNDING = 2e-4
"""As in `test_metamorphic`, for its reason: a row's numbers depend on nothing beside it, in bf16 too. To cut or order a
batch otherwise changes its gradient by the order in which fp32 numbers are added up."""


@pytest.fixture(autouse=True)
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Pieces of each pass of the compiled step; there have to be some."""
    seen: list[int] = []
    learn = step.CompiledLlama.learn

    def counted(self: step.CompiledLlama, pieces: list[Piece], *, single: bool) -> object:
        seen.append(len(pieces))
        return learn(self, pieces, single=single)

    monkeypatch.setattr(step.CompiledLlama, "learn", counted)
    yield seen
    assert seen, "trained by other code"


def _run(folder: Path, base: Path, *, job_id: str = "ft-test", **changes: object) -> RunDir:
    rows = [
        {**row, "prompt": "and so on, " * (index % 3) + row["prompt"]} for index, row in enumerate(examples(N_ROWS))
    ]
    run_dir = make_run(folder, base, train=rows, valid=examples(4), hyperparameters=PLAIN)
    run_dir.write_spec(replace(run_dir.read_spec(), precision="bfloat16", job_id=job_id, **changes))  # type: ignore[arg-type]
    return run_dir


def _assert_same(one: RunDir, other: RunDir) -> None:
    for name in PRODUCTS:
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), name


def _difference(one: RunDir, other: RunDir) -> float:
    tensors, others = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, other))
    return max(float((tensors[name] - others[name]).abs().max()) for name in tensors)


@pytest.mark.parametrize("threads", [1, 2])
def test_stopped_at_every_step_and_under_another_name_the_bytes_stay(
    tiled_base: Path, tmp_path: Path, threads: int
) -> None:
    whole = _run(tmp_path / "whole", tiled_base, threads=threads, hyperparameters=CLASSIFY)
    halting = _run(tmp_path / "halting", tiled_base, threads=threads, hyperparameters=CLASSIFY, job_id="ft-other")
    train(whole)
    starts = 1
    while train(halting, stop_asked=lambda: True) is None:
        starts += 1

    assert starts == 10  # nine steps, then the end
    _assert_same(whole, halting)


@pytest.mark.parametrize("what", ["micro-batches", "order of rows", "threads"])
def test_what_must_not_matter_changes_an_adapter_by_rounding(
    tiled_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[int], what: str
) -> None:
    plain = _run(tmp_path / "plain", tiled_base)
    other = _run(tmp_path / "other", tiled_base, threads=3 if what == "threads" else 1)
    train(plain)
    n_passes = len(passes)
    if what == "micro-batches":
        monkeypatch.setattr(loop, "Room", lambda run_dir: Room(run_dir, 32))
    if what == "order of rows":
        chance, batches = random.Random(5), Schedule.batches
        shuffled = lambda self, after: (chance.sample(batch, len(batch)) for batch in batches(self, after))  # noqa: E731
        monkeypatch.setattr(Schedule, "batches", shuffled)
    train(other)

    assert (len(passes) > 2 * n_passes) == (what != "order of rows")
    assert _difference(plain, other) < ROUNDING


def test_another_seed_does_matter(tiled_base: Path, tmp_path: Path) -> None:
    plain, other = _run(tmp_path / "plain", tiled_base), _run(tmp_path / "other", tiled_base, seed=12)
    for run_dir in (plain, other):
        train(run_dir)
    assert _difference(plain, other) > 100 * ROUNDING


def test_where_memory_runs_out_smaller_parts_give_the_same_within_rounding(
    tiled_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    roomy, tight = _run(tmp_path / "roomy", tiled_base), _run(tmp_path / "tight", tiled_base)
    train(roomy)
    learn = step.CompiledLlama.learn

    def bounded(self: step.CompiledLlama, pieces: list[Piece], *, single: bool) -> object:
        if sum(len(piece.batch.token_ids_N) for piece in pieces) > 32:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate too much")
        return learn(self, pieces, single=single)

    monkeypatch.setattr(step.CompiledLlama, "learn", bounded)
    train(tight)

    assert tight.count_shortages() > 0
    assert _difference(roomy, tight) < ROUNDING


def test_runs_in_one_trainer_get_the_bytes_they_get_alone(tiled_base: Path, tmp_path: Path, passes: list[int]) -> None:
    changes = [{}, {"seed": 4}, {"lora_rank": 8, "lora_alpha": 16.0}, {"seed": 9, "hyperparameters": CLASSIFY}]
    alone, together = (
        [_run(tmp_path / where / str(index), tiled_base, **each) for index, each in enumerate(changes)]  # type: ignore[arg-type]
        for where in ("alone", "together")
    )
    for run_dir in alone:
        train(run_dir)
    passes.clear()
    with Shared(lambda: 0.0) as shared:
        host = Host(shared, lambda: False, None)
        for run_dir in together:
            host.take(run_dir)
        while host.working:
            host.step()

    assert max(passes) == len(changes)
    for one, other in zip(alone, together, strict=True):
        _assert_same(one, other)


@needs_bf16
def test_killed_at_random_moments_it_ends_as_if_undisturbed(tiled_base: Path, tmp_path: Path) -> None:
    chance = random.Random(3)
    whole, killed = (
        _run(tmp_path / name, tiled_base, checkpoint_interval_s=0.0, hyperparameters=replace(PLAIN, n_epochs=40))
        for name in ("whole", "killed")
    )
    train(whole)
    for steps in (2, 13, 25):
        child = subprocess.Popen([sys.executable, "-m", "tunesmith.training", str(killed.path)])
        until(lambda: killed.results.exists() and killed.results.read_bytes().count(b"\n") > steps, within_s=120.0)  # noqa: B023
        until(lambda: chance.random() < 0.1)
        child.kill()
        child.wait()
    assert killed.read_outcome() is None
    train(killed)

    _assert_same(whole, killed)
