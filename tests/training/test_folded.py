"""The step by hand against autograd over the decoder, which the tests of the decoder hold against transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch

from tests.training.rows import random_lora, random_model, random_rows
from tunesmith.decoder.llama import Llama
from tunesmith.training import attention, folded, gradients, panels, passes
from tunesmith.training.factors import TrainableLora
from tunesmith.training.gradients import Learner, Lesson
from tunesmith.training.kernels import Eager, Kernels
from tunesmith.training.metrics import Tally
from tunesmith.training.passes import Piece
from tunesmith.training.workers import Workers

ROWS = random_rows([(5, 1), (12, 3), (1, 4), (60, 2), (7, 2), (33, 9)])


def _step(
    model: Llama, dtype: torch.dtype, prompt_loss_weight: float = 0.1, kernels: Kernels | None = None
) -> tuple[Tally, torch.Tensor]:
    factors = TrainableLora(random_lora(model.config.layout, rank=4, alpha=8.0))
    with Workers(1) as workers:
        learner = Learner(model, factors.site_outputs, workers, beat=lambda: None, dtype=dtype, kernels=kernels)
        (tally,) = learner.learn([Lesson(factors, ROWS, prompt_loss_weight, max_tokens=100)])
    return tally, factors.flat_gradient


def _by_autograd(model: Llama, monkeypatch: pytest.MonkeyPatch) -> tuple[Tally, torch.Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(gradients, "covers", lambda model: False)
        return _step(model, torch.float32)


@pytest.mark.parametrize("kernels", [None, Eager()], ids=["available", "eager"])
@pytest.mark.parametrize("alone_from_tokens", [0, 512])
@pytest.mark.parametrize("longest_plain_row", [0, 512])
@pytest.mark.parametrize(("heads", "kv_heads", "qkv_bias"), [(4, 2, False), (4, 4, True), (6, 1, False)])
def test_loss_and_gradients_are_those_of_autograd(
    heads: int,
    kv_heads: int,
    qkv_bias: bool,
    longest_plain_row: int,
    alone_from_tokens: int,
    kernels: Kernels | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = random_model(heads=heads, kv_heads=kv_heads, bias=qkv_bias)
    theirs, expected = _by_autograd(model, monkeypatch)

    monkeypatch.setattr(attention, "LONGEST_PLAIN_ROW", longest_plain_row)
    monkeypatch.setattr(gradients, "ALONE_FROM_TOKENS", alone_from_tokens)
    ours, gradient = _step(model, torch.float32, kernels=kernels)

    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
    assert ours.sequence_accuracy == theirs.sequence_accuracy
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


# In fixed point without a compiler, products are fp32: nearer still.
@pytest.mark.parametrize(
    ("dtype", "of_loss", "likeness"),
    [(torch.bfloat16, 0.02, 0.998), (torch.int16, 0.001, 0.99999)],
    ids=["bf16", "fixed"],
)
@pytest.mark.parametrize("alone_from_tokens", [0, 512])
def test_rounded_products_give_a_gradient_that_points_the_same_way(
    monkeypatch: pytest.MonkeyPatch, alone_from_tokens: int, dtype: torch.dtype, of_loss: float, likeness: float
) -> None:
    monkeypatch.setattr(gradients, "ALONE_FROM_TOKENS", alone_from_tokens)
    model = random_model()
    theirs, expected = _by_autograd(model, monkeypatch)

    ours, gradient = _step(model, dtype)

    assert ours.loss == pytest.approx(theirs.loss, abs=of_loss)
    assert torch.cosine_similarity(gradient, expected, dim=0) > likeness
    assert gradient.norm() == pytest.approx(float(expected.norm()), rel=of_loss)


def test_in_fixed_point_a_base_that_is_no_numbers_has_no_loss_either() -> None:
    model = random_model()
    model.layers[0].down[3, 3] = torch.inf
    tally, _ = _step(model, torch.int16)
    assert not math.isfinite(tally.loss)


def test_rounding_up_tokens_and_cells_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model()
    _, plain = _step(model, torch.float32)

    monkeypatch.setattr(passes, "PIECE_ROUNDING", 128)
    monkeypatch.setattr(passes, "CELL_ROUNDING", 64)
    _, rounded = _step(model, torch.float32)

    assert (plain - rounded).abs().max() < 1e-6 * plain.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int16, torch.bfloat16])
def test_norms_of_heads_are_for_attention_by_rows_and_else_for_autograd(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model = random_model(qk_norm=True)
    theirs, expected = _by_autograd(model, monkeypatch)
    seen: list[folded.FoldedLlama] = []
    learn = folded.FoldedLlama.learn

    def seen_to_learn(self: folded.FoldedLlama, pieces: Sequence[Piece], *, single: bool) -> object:
        seen.append(self)
        return learn(self, pieces, single=single)

    monkeypatch.setattr(folded.FoldedLlama, "learn", seen_to_learn)

    ours, gradient = _step(model, dtype)
    assert bool(seen) == (panels.library() is not None)
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5 if dtype == torch.float32 else 0.001)
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.99999

    seen.clear()
    ours, gradient = _step(model, torch.float32, kernels=Eager())
    assert not seen
    assert ours.loss == pytest.approx(theirs.loss, abs=1e-5)
    assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()


def test_precision_is_as_asked() -> None:
    processor, device = torch.device("cpu"), torch.device("cuda")
    assert folded.product_dtype("float32", processor) == folded.product_dtype("float32", device) == torch.float32
    assert folded.product_dtype("bfloat16", processor) == folded.product_dtype("bfloat16", device) == torch.bfloat16
    assert folded.product_dtype("auto", processor) in (torch.int16, torch.bfloat16)
    assert folded.product_dtype("auto", device) == torch.bfloat16
