"""What must not matter to a run does not: how its batches are cut, in which order their rows lie, who is at work."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.rows import examples, make_run, random_lora, random_rows
from tunesmith.decoder import llama
from tunesmith.rundir import ResolvedHyperparameters, RunDir
from tunesmith.training import gradients, loop
from tunesmith.training.batches import Schedule
from tunesmith.training.factors import TrainableLora
from tunesmith.training.gradients import Learner, Lesson
from tunesmith.training.memory import Room
from tunesmith.training.packing import MicroBatch, micro_batches
from tunesmith.training.workers import Workers

ASKED = ResolvedHyperparameters(n_epochs=2, batch_size=4, learning_rate_multiplier=0.1, prompt_loss_weight=0.01)
N_ROWS = 11
"""Not a multiple of the batch: a batch spans the epochs, and the last one has two rows."""
ROUNDING = 2e-4
"""Sums in another order differ by about 1e-7 of the gradient. The optimizer divides by the gradient's own size, so that
a factor whose gradient is nearly nothing may move by a share of the learning rate: these bounds are 4 % of one step."""


def _run(folder: Path, base: Path, **changes: int) -> RunDir:
    rows = [
        {**row, "prompt": "and so on, " * (index % 3) + row["prompt"]} for index, row in enumerate(examples(N_ROWS))
    ]
    run_dir = make_run(folder, base, train=rows, valid=examples(4), hyperparameters=ASKED)
    run_dir.write_spec(replace(run_dir.read_spec(), **changes))  # type: ignore[arg-type]
    return run_dir


def _difference(one: RunDir, other: RunDir) -> float:
    """Between two adapters, at most."""
    tensors, others = (load_file(run.adapter / "adapter_model.safetensors") for run in (one, other))
    return max(float((tensors[name] - others[name]).abs().max()) for name in tensors)


def test_the_schedule_ends_with_a_partial_batch() -> None:
    assert [len(batch) for batch in Schedule(N_ROWS, 2, 4, seed=0).batches(0)] == [4, 4, 4, 4, 4, 2]


@pytest.mark.parametrize("what", ["micro-batches", "order of rows", "threads"])
def test_what_must_not_matter_changes_an_adapter_by_rounding(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    plain = _run(tmp_path / "plain", tiny_base)
    other = _run(tmp_path / "other", tiny_base, threads=3 if what == "threads" else 1)
    cut: list[int] = []

    def counted(*arguments: Any, **options: Any) -> list[MicroBatch]:
        parts = micro_batches(*arguments, **options)
        cut.append(len(parts))
        return parts

    monkeypatch.setattr(gradients, "micro_batches", counted)
    loop.train(plain)
    assert set(cut) == {1}
    match what:
        case "micro-batches":
            monkeypatch.setattr(loop, "Room", lambda run_dir: Room(run_dir, 32))
        case "order of rows":
            chance = random.Random(5)
            batches = Schedule.batches
            monkeypatch.setattr(
                Schedule,
                "batches",
                lambda self, after: (chance.sample(batch, len(batch)) for batch in batches(self, after)),
            )
        case _:
            pass

    loop.train(other)

    assert (max(cut) > 1) == (what == "micro-batches")
    assert len(cut) > 2 * Schedule(N_ROWS, 2, 4, seed=0).n_steps or what != "threads"
    assert _difference(plain, other) < ROUNDING


def test_another_seed_does_matter(tiny_base: Path, tmp_path: Path) -> None:
    """The bounds above would not let a real difference pass."""
    plain, other = _run(tmp_path / "plain", tiny_base), _run(tmp_path / "other", tiny_base, seed=12)
    for run_dir in (plain, other):
        loop.train(run_dir)
    assert _difference(plain, other) > 100 * ROUNDING


@pytest.mark.parametrize("prompt_loss_weight", [0.0, 0.3])
def test_the_order_of_rows_in_a_batch_changes_its_gradient_by_rounding(
    tiny_base: Path, prompt_loss_weight: float
) -> None:
    model = llama.load(tiny_base)
    rows = random_rows([(5, 1), (12, 3), (1, 4), (30, 1), (7, 2), (12, 3)])
    found = []
    for order in (rows, rows[::-1], rows[3:] + rows[:3]):
        factors = TrainableLora(random_lora(model.config.layout, rank=4, alpha=8.0))
        with Workers(1) as workers:
            learner = Learner(model, factors.site_outputs, workers, beat=lambda: None)
            loss = learner.learn([Lesson(factors, order, prompt_loss_weight, max_tokens=40)])[0].loss
        found.append((loss, factors.flat_gradient.clone()))
    for loss, gradient in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-6)
        assert torch.allclose(gradient, found[0][1], rtol=0, atol=1e-6 * float(found[0][1].abs().max()))
