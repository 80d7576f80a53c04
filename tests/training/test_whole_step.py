"""The compiled step of all weights against autograd over the decoder, and whole runs that take it."""

from __future__ import annotations

import subprocess
import sys
from array import array
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiles import needs_bf16, needs_tiles
from tests.training.rows import examples, make_run, random_model, random_rows
from tests.waiting import until
from tunesmith.decoder.llama import Llama
from tunesmith.rundir import ResolvedHyperparameters, RunDir
from tunesmith.training.batches import Row
from tunesmith.training.loop import train
from tunesmith.training.metrics import Tally
from tunesmith.training.whole import TrainableWeights, WholeLearner
from tunesmith.training.whole_step import WholeStep
from tunesmith.training.workers import Workers

pytestmark = needs_tiles

FEW = random_rows([(5, 1), (31, 1), (1, 4), (60, 2), (33, 32)])
MANY = random_rows([(300, 3), (150, 40), (64, 1), (256, 1), (20, 20), (1, 200)] * 3)
FULL = ResolvedHyperparameters(
    n_epochs=2, batch_size=4, learning_rate_multiplier=0.1, prompt_loss_weight=0.01, method="full"
)
N_ROWS = 11
"""The last batch has two rows."""


def _learn(
    weights: TrainableWeights,
    rows: Sequence[Row],
    *,
    dtype: torch.dtype,
    threads: int = 1,
    max_tokens: int = 2_048,
    prompt_loss_weight: float = 0.1,
) -> Tally:
    with Workers(threads) as workers:
        learner = WholeLearner(weights, workers, beat=lambda: None, dtype=dtype)
        return learner.learn(rows, prompt_loss_weight=prompt_loss_weight, max_tokens=max_tokens)


def _assert_alike(weights: TrainableWeights, expected: torch.Tensor) -> None:
    """Each weight by itself: small gradients would hide in the whole."""
    pairs = zip(weights.parts(weights.flat_gradient), weights.parts(expected), strict=True)
    for index, (mine, exact) in enumerate(pairs):
        assert (mine - exact).norm() < 0.05 * exact.norm(), index
        assert exact.norm() > 1e-4, index


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(
    "model",
    [
        random_model(),
        random_model(heads=3, kv_heads=3, bias=True),
        random_model(head_width=64, heads=4, kv_heads=1, tied=False),
        random_model(vocabulary=1_003),
    ],
    ids=["grouped", "bias", "wide heads, untied", "odd vocabulary"],
)
def test_loss_and_gradients_are_those_of_autograd(model: Llama, rows: list[Row]) -> None:
    size = model.config.vocabulary_size
    rows = [replace(row, token_ids=array("i", [token % size for token in row.token_ids])) for row in rows]
    weights = TrainableWeights(model)
    theirs = _learn(weights, rows, dtype=torch.float32)
    expected = weights.flat_gradient.clone()

    ours = _learn(weights, rows, dtype=torch.bfloat16)

    assert weights.compiled is not None
    assert ours.loss == pytest.approx(theirs.loss, abs=0.01)
    assert ours.sequence_accuracy == theirs.sequence_accuracy
    _assert_alike(weights, expected)


@pytest.mark.parametrize(
    ("lengths", "prompt_loss_weight"),
    [([(100, 250)] * 4, 0.0), ([(9, 9)] * 60, 0.1), ([(100, 180)] * 4, 0.0)],
    ids=["1,000 of 1,400 predict", "short rows", "720 of 1,120 predict"],
)
def test_spans_of_the_last_layer_are_not_those_of_the_others(
    lengths: list[tuple[int, int]], prompt_loss_weight: float
) -> None:
    weights = TrainableWeights(random_model())
    rows = random_rows(lengths)
    _learn(weights, rows, dtype=torch.float32, prompt_loss_weight=prompt_loss_weight)
    expected = weights.flat_gradient.clone()
    _learn(weights, rows, dtype=torch.bfloat16, prompt_loss_weight=prompt_loss_weight)
    _assert_alike(weights, expected)


def test_how_rows_are_cut_and_shared_changes_the_gradient_by_rounding() -> None:
    weights = TrainableWeights(random_model())
    _learn(weights, MANY, dtype=torch.bfloat16)
    whole = weights.flat_gradient.clone()
    for threads, max_tokens in ((1, 300), (2, 2_048)):
        _learn(weights, MANY, dtype=torch.bfloat16, threads=threads, max_tokens=max_tokens)
        changed = weights.flat_gradient.clone()
        for index, (one, other) in enumerate(zip(weights.parts(whole), weights.parts(changed), strict=True)):
            assert (one - other).norm() < 0.01 * one.norm(), index  # a product's inputs are rounded to 0.2 %
        _learn(weights, MANY, dtype=torch.bfloat16, threads=threads, max_tokens=max_tokens)
        assert torch.equal(weights.flat_gradient, changed)


def test_a_step_adds_nothing_to_the_next_and_reads_the_weights_of_now() -> None:
    weights = TrainableWeights(random_model())
    _learn(weights, FEW, dtype=torch.bfloat16)
    first = weights.flat_gradient.clone()
    _learn(weights, MANY, dtype=torch.bfloat16)
    _learn(weights, FEW, dtype=torch.bfloat16)
    assert torch.equal(weights.flat_gradient, first)

    weights.flat.mul_(1.1)
    _learn(weights, FEW, dtype=torch.bfloat16)
    now = weights.flat_gradient.clone()
    _learn(weights, FEW, dtype=torch.float32)

    assert (now - weights.flat_gradient).norm() < 0.05 * now.norm() < (now - first).norm()


def test_what_is_not_covered_is_left_to_autograd() -> None:
    model = random_model()
    for config in (replace(model.config, width=80), replace(model.config, head_width=16)):
        weights = TrainableWeights(model)
        weights.model.config = config
        assert weights.compiled is None


# -- whole runs


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens of each pass of compiled code."""
    seen: list[int] = []
    learn = WholeStep.learn

    def counted(self: WholeStep, token_ids_N: torch.Tensor, *rest: Any, **more: Any) -> object:
        seen.append(len(token_ids_N))
        return learn(self, token_ids_N, *rest, **more)

    monkeypatch.setattr(WholeStep, "learn", counted)
    return seen


def _run(folder: Path, base: Path, **changes: Any) -> RunDir:
    run_dir = make_run(
        folder, base, train=examples(N_ROWS), valid=examples(4), hyperparameters=FULL, base_learning_rate=0.02
    )
    run_dir.write_spec(replace(run_dir.read_spec(), precision="bfloat16", **changes))
    return run_dir


def _assert_same(one: RunDir, other: RunDir) -> None:
    for name in ("results.csv", "progress.jsonl", "parity.json", "adapter/model.safetensors"):
        assert (one.path / name).read_bytes() == (other.path / name).read_bytes(), name


def test_stopped_at_every_step_the_bytes_stay(tiled_base: Path, tmp_path: Path, passes: list[int]) -> None:
    whole, halting = (_run(tmp_path / name, tiled_base, threads=2) for name in ("whole", "halting"))
    train(whole)
    assert len(passes) == 6 * 2
    starts = 1
    while train(halting, stop_asked=lambda: True) is None:
        starts += 1

    assert starts == 7  # six steps, then the end
    assert whole.kernels.read_text().startswith("tiles, ")
    _assert_same(whole, halting)


@needs_bf16
def test_killed_it_ends_as_if_undisturbed(tiled_base: Path, tmp_path: Path) -> None:
    asked = replace(FULL, n_epochs=4)
    whole, killed = (
        _run(tmp_path / name, tiled_base, checkpoint_interval_s=0.0, hyperparameters=asked)
        for name in ("whole", "killed")
    )
    train(whole)
    child = subprocess.Popen([sys.executable, "-m", "tunesmith.training", str(killed.path)])
    until(lambda: killed.results.exists() and killed.results.read_bytes().count(b"\n") > 3, within_s=120.0)
    child.kill()
    child.wait()
    assert killed.read_outcome() is None
    train(killed)

    _assert_same(whole, killed)
