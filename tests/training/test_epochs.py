"""The ends of epochs: the best one, an early end, and the last ones as models of their own."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.training.rows import CLASSIFY, LABELS, examples, make_run
from tunesmith.rundir import Outcome, ResolvedHyperparameters, RunDir
from tunesmith.training.epochs import Standing
from tunesmith.training.loop import train

WRONG = [e | {"completion": LABELS[i % 2 == 0]} for i, e in enumerate(examples(6))]
"""Validation rows with every label swapped: what is learnt makes them less likely, so the loss soon rises."""
ASKED = ResolvedHyperparameters(n_epochs=6, batch_size=3, learning_rate_multiplier=0.5, prompt_loss_weight=0.0)
ADAPTER = "adapter/adapter_model.safetensors"


def _run(folder: Path, base: Path, asked: ResolvedHyperparameters, **options: object) -> RunDir:
    return make_run(folder, base, train=examples(7), valid=WRONG, hyperparameters=asked, **options)  # type: ignore[arg-type]


def _losses(run_dir: RunDir) -> dict[int, float]:
    """Full validation loss by the step that ended an epoch."""
    data = [line.data or {} for line in run_dir.read_progress(0) if line.kind == "message"]
    return {int(each["step"]): each["full_validation_loss"] for each in data if "full_validation_loss" in each}


def test_standing_counts_epochs_since_the_lowest_loss() -> None:
    standing = Standing()
    for step, loss in [(3, 0.5), (6, 0.4), (9, 0.4), (12, float("inf"))]:
        standing = standing.after(step, loss)
    assert standing == Standing(best_step=6, best_loss=0.4, worse_epochs=2)


def test_the_best_epoch_is_the_model_and_training_ends_early(tiny_base: Path, tmp_path: Path) -> None:
    whole = _run(tmp_path / "whole", tiny_base, replace(ASKED, epoch_checkpoints=6))
    train(whole)
    losses = _losses(whole)
    best = min(losses, key=lambda step: losses[step])
    ends = sorted(losses)
    assert best != ends[-1], "these data do not show what they are for"
    stop = ends[ends.index(best) + 2]

    asked = replace(ASKED, best_epoch=True, early_stopping_patience=2)
    early = _run(tmp_path / "early", tiny_base, asked)
    outcome = train(early)

    with early.results.open() as file:
        rows = list(csv.DictReader(file))
    assert outcome == Outcome("succeeded", trained_tokens=int(rows[-1]["elapsed_tokens"]), steps=stop)
    assert [int(row["step"]) for row in rows] == list(range(1, stop + 1))
    assert (early.path / ADAPTER).read_bytes() == (whole.snapshot(best).path / ADAPTER).read_bytes()
    assert early.parity.read_bytes() == whole.snapshot(best).parity.read_bytes()
    said = [line.message for line in early.read_progress(0) if line.kind == "message"]
    assert said[-2:] == [
        f"Stopped after epoch {ends.index(stop) + 1}/6: the validation loss was lowest at step {best}",
        f"The model is that of step {best}, where the validation loss was lowest",
    ]


def test_the_last_epochs_are_kept_with_their_numbers(tiny_base: Path, tmp_path: Path) -> None:
    run_dir = _run(tmp_path / "run", tiny_base, replace(ASKED, epoch_checkpoints=2))

    train(run_dir)

    losses = _losses(run_dir)
    kept = run_dir.snapshots()
    assert [snapshot.step for snapshot, _ in kept] == sorted(losses)[-2:]
    for snapshot, folder in kept:
        assert snapshot.metrics["full_validation_loss"] == losses[snapshot.step]
        assert json.loads(folder.parity.read_text())["rows"]
    first, last = (load_file(folder.path / ADAPTER) for _, folder in kept)
    assert any((first[name] != last[name]).any() for name in first)
    assert (kept[-1][1].path / ADAPTER).read_bytes() == (run_dir.path / ADAPTER).read_bytes()


def test_none_of_it_is_lost_or_changed_by_interruptions(tiny_base: Path, tmp_path: Path) -> None:
    asked = replace(ASKED, best_epoch=True, early_stopping_patience=2, epoch_checkpoints=2)
    whole, halting = (_run(tmp_path / name, tiny_base, asked) for name in ("whole", "halting"))
    expected = train(whole)

    while (outcome := train(halting, stop_asked=lambda: True)) is None:
        pass

    assert outcome == expected
    for path in whole.path.rglob("*"):
        name = path.relative_to(whole.path)
        if path.is_file() and name.name not in ("heartbeat", "spec.json") and name.parts[0] != "checkpoints":
            assert path.read_bytes() == (halting.path / name).read_bytes(), name
    assert [s for s, _ in whole.snapshots()] == [s for s, _ in halting.snapshots()]


@pytest.mark.parametrize(("ending", "warned"), [("", False), (" thing\n", True)])
def test_classes_of_several_tokens_are_warned_of_once(
    tiny_base: Path, tmp_path: Path, ending: str, warned: bool
) -> None:
    data = [e | {"completion": e["completion"] + ending} for e in examples(6)]
    asked = replace(CLASSIFY, n_epochs=1, classification_positive_class=LABELS[0] + ending)
    run_dir = make_run(tmp_path / "r", tiny_base, train=data, valid=data, hyperparameters=asked)

    while train(run_dir, stop_asked=lambda: True) is None:
        pass

    warnings = [line.message for line in run_dir.read_progress(0) if line.level == "warn"]
    assert len(warnings) == warned
    assert not warned or ("' positive thing\\n'" in warnings[0] and "first token" in warnings[0])
