"""The compiled step against autograd over the decoder, which the tests of the decoder hold against transformers."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiles import needs_tiles
from tests.training.rows import extreme_attention, extreme_head, random_lora, random_model, random_rows
from tunesmith.decoder.llama import Llama
from tunesmith.training import gradients, native, step
from tunesmith.training.batches import Row
from tunesmith.training.factors import TrainableLora
from tunesmith.training.gradients import Learner, Lesson
from tunesmith.training.kernels import Eager
from tunesmith.training.metrics import Tally
from tunesmith.training.workers import Workers

pytestmark = needs_tiles

FEW = random_rows([(5, 1), (31, 1), (1, 4), (60, 2), (33, 32)])
LENGTHS = [(300, 3), (150, 40), (64, 1), (256, 1), (20, 20), (1, 200)]
MANY = random_rows(LENGTHS)


def _factors(model: Llama, rank: int, *, seed: int = 3, embedding: bool = True) -> TrainableLora:
    layout = model.config.layout
    if not embedding:
        layout = replace(layout, embedding=None)
    return TrainableLora(random_lora(layout, rank=rank, alpha=2.0 * rank, seed=seed))


def _learn(model: Llama, lessons: Sequence[Lesson], *, compiled: bool) -> list[tuple[Tally, torch.Tensor]]:
    dtype, kernels = (torch.bfloat16, None) if compiled else (torch.float32, Eager())
    with Workers(1) as workers:
        outputs = lessons[0].factors.site_outputs
        learner = Learner(model, outputs, workers, beat=lambda: None, dtype=dtype, kernels=kernels)
        tallies = learner.learn(lessons)
    return [(tally, lesson.factors.flat_gradient.clone()) for tally, lesson in zip(tallies, lessons, strict=True)]


def _assert_alike(factors: TrainableLora, found: torch.Tensor, expected: torch.Tensor) -> None:
    """Each factor's gradient by itself: small ones would hide in the whole."""
    pairs = [factors.pairs(gradient) for gradient in (found, expected)]
    ours, theirs = ([tensor for pair in (*sites, *filter(None, [last])) for tensor in pair] for sites, last in pairs)
    for index, (mine, exact) in enumerate(zip(ours, theirs, strict=True)):
        likeness = torch.cosine_similarity(mine.flatten().double(), exact.flatten().double(), dim=0)
        assert likeness > 0.995, (index, likeness)
        assert mine.norm() == pytest.approx(float(exact.norm()), rel=0.03), index


@pytest.mark.parametrize("rows", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(
    ("model", "rank"),
    [
        (random_model(), 4),
        (random_model(heads=3, kv_heads=3, bias=True), 32),
        (random_model(head_width=64, heads=4, kv_heads=1), 48),
        (random_model(vocabulary=1_003), 16),
        (random_model(heads=10, kv_heads=5), 8),
    ],
    ids=["grouped", "bias", "wide heads", "odd vocabulary", "more heads than gates"],
)
def test_loss_and_gradients_are_those_of_autograd(model: Llama, rank: int, rows: list[Row]) -> None:
    size = model.config.vocabulary_size
    rows = [replace(row, token_ids=array("i", [token % size for token in row.token_ids])) for row in rows]
    factors = _factors(model, rank)
    lesson = Lesson(factors, rows, prompt_loss_weight=0.1, max_tokens=600)
    ((theirs, expected),) = _learn(model, [lesson], compiled=False)

    ((ours, gradient),) = _learn(model, [lesson], compiled=True)

    assert ours.loss == pytest.approx(theirs.loss, abs=0.01)
    assert ours.sequence_accuracy == theirs.sequence_accuracy
    _assert_alike(factors, gradient, expected)


@pytest.mark.parametrize("extreme", [extreme_attention, extreme_head])
def test_softmaxes_whose_reference_is_far_below_the_largest(extreme: Callable[[], Llama]) -> None:
    model = extreme()
    factors = _factors(model, 8)
    rows = random_rows(LENGTHS, vocabulary=model.config.vocabulary_size)
    lesson = Lesson(factors, rows, prompt_loss_weight=0.1, max_tokens=600)
    ((theirs, expected),) = _learn(model, [lesson], compiled=False)

    ((ours, gradient),) = _learn(model, [lesson], compiled=True)

    assert ours.loss == pytest.approx(theirs.loss, rel=0.01)
    # Where one weight is nearly all, rounding decides more than elsewhere.
    assert torch.cosine_similarity(gradient, expected, dim=0) > 0.9
    assert gradient.norm() == pytest.approx(float(expected.norm()), rel=0.1)


def test_jobs_of_any_rank_go_together_and_what_is_not_covered_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradients, "ALONE_FROM_TOKENS", 10_000)
    model = random_model()
    lessons = [
        Lesson(_factors(model, rank, seed=rank, embedding=rank != 8), random_rows(lengths, seed=rank), plw)
        for rank, lengths, plw in ((4, [(9, 2), (40, 1)], 0.0), (8, [(70, 5)], 0.5), (40, [(3, 3), (30, 2)], 0.01))
    ]
    expected = [_learn(model, [lesson], compiled=False)[0] for lesson in lessons]

    found = _learn(model, lessons, compiled=True)

    for lesson, (ours, gradient), (theirs, exact) in zip(lessons, found, expected, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, abs=0.01)
        _assert_alike(lesson.factors, gradient, exact)


def test_a_step_adds_nothing_to_the_next() -> None:
    model = random_model()
    factors = _factors(model, 16)
    large, small = Lesson(factors, MANY, 0.1, max_tokens=600), Lesson(factors, FEW, 0.1)
    with Workers(1) as workers:
        learner = Learner(model, factors.site_outputs, workers, beat=lambda: None, dtype=torch.bfloat16)
        learner.learn([small])
        first = factors.flat_gradient.clone()
        learner.learn([large])
        learner.learn([small])

    assert torch.equal(factors.flat_gradient, first)


def test_widths_that_are_not_whole_blocks_are_left_to_others() -> None:
    model = random_model()
    assert step.covers(model)
    for config in (
        replace(model.config, width=80),
        replace(model.config, head_width=16),
        replace(model.config, feed_forward_width=100),
    ):
        assert not step.covers(replace(model, config=config))


def test_a_run_says_that_it_began_with_tiles(tmp_path: Path) -> None:
    native.confirm(tmp_path / "kernels")
    assert (tmp_path / "kernels").read_text().startswith("tiles, ")
