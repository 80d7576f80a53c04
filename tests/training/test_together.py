"""Many jobs in one step: each gets the bytes that it gets alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from pretraining.shapes import SHAPES, random_llama
from tests.training.rows import VOCABULARY, random_lora, random_rows
from tunesmith.training import frozen, gradients, native
from tunesmith.training.factors import TrainableLora
from tunesmith.training.gradients import Learner, Lesson
from tunesmith.training.kernels import Eager, Kernels
from tunesmith.training.metrics import Tally
from tunesmith.training.workers import Workers

MODEL = random_llama(replace(SHAPES["ada"], layers=3, vocabulary_size=VOCABULARY), torch.Generator().manual_seed(0))


def _lessons(n_jobs: int, *, longest_prompt: int = 60) -> list[Lesson]:
    """Of jobs that differ in everything that may differ."""
    chance = random.Random(1)
    return [
        Lesson(
            TrainableLora(random_lora(MODEL.config.layout, rank=(4, 16, 32)[job % 3], alpha=8.0 + job, seed=job)),
            random_rows(
                [(chance.randint(1, longest_prompt), chance.randint(1, 5)) for _ in range(chance.randint(1, 4))],
                seed=job,
            ),
            prompt_loss_weight=(0.01, 0.0, 0.3)[job % 3],
            max_tokens=(2_048, 50)[job % 5 == 4],
        )
        for job in range(n_jobs)
    ]


def _learn(
    lessons: Sequence[Lesson], dtype: torch.dtype, threads: int, kernels: Kernels | None = None
) -> list[tuple[Tally, torch.Tensor]]:
    with Workers(threads) as workers:
        outputs = lessons[0].factors.site_outputs
        learner = Learner(MODEL, outputs, workers, beat=lambda: None, dtype=dtype, kernels=kernels)
        tallies = learner.learn(lessons)
    return [(tally, lesson.factors.flat_gradient.clone()) for tally, lesson in zip(tallies, lessons, strict=True)]


@pytest.mark.parametrize(
    ("dtype", "kernels"),
    [(torch.float32, None), (torch.int16, None), (torch.bfloat16, None), (torch.bfloat16, native.available())],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_job_among_others_gets_the_bytes_that_it_gets_alone(
    dtype: torch.dtype, kernels: Kernels | None, threads: int
) -> None:
    lessons = _lessons(8)
    alone = [_learn([lesson], dtype, threads, kernels)[0] for lesson in lessons]

    together = _learn(lessons, dtype, threads, kernels)
    others = _learn(lessons[6:2:-1], dtype, threads, kernels)

    for (tally, gradient), (expected_tally, expected) in zip(together + others, alone + alone[6:2:-1], strict=True):
        assert tally == expected_tally
        assert torch.equal(gradient, expected)


def test_where_a_job_lies_in_a_pass_changes_no_byte() -> None:
    """A pass is walked in chunks of 256 tokens, and what a job learns from is not to be cut between two of them."""
    lengths = [(90, 70), (50, 10), (90, 40), (4, 90), (60, 31), (91, 2)]
    lessons = [
        Lesson(TrainableLora(random_lora(MODEL.config.layout, rank=4 + job, alpha=8.0, seed=job)), rows, 0.3)
        for job, rows in enumerate(random_rows([length], seed=job) for job, length in enumerate(lengths))
    ]
    alone = [_learn([lesson], torch.bfloat16, 1)[0] for lesson in lessons]

    for (tally, gradient), (expected_tally, expected) in zip(_learn(lessons, torch.bfloat16, 1), alone, strict=True):
        assert tally == expected_tally
        assert torch.equal(gradient, expected)


def test_jobs_of_many_tokens_and_of_few_go_together(monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = _lessons(6)
    monkeypatch.setattr(gradients, "ALONE_FROM_TOKENS", 100)
    assert len({lesson.n_tokens >= 100 for lesson in lessons}) == 2
    alone = [_learn([lesson], torch.bfloat16, 1)[0] for lesson in lessons]

    together = _learn(lessons, torch.bfloat16, 1)

    assert [tally for tally, _ in together] == [tally for tally, _ in alone]
    assert all(torch.equal(gradient, expected) for (_, gradient), (_, expected) in zip(together, alone, strict=True))


def test_a_job_that_is_no_longer_a_number_spoils_no_other() -> None:
    lessons = _lessons(4)
    expected = _learn(lessons, torch.bfloat16, 1)
    lessons[1].factors.flat.fill_(torch.nan)

    found = _learn(lessons, torch.bfloat16, 1)

    assert found[1][1].isnan().any()
    for job in (0, 2, 3):
        assert found[job][0] == expected[job][0]
        assert torch.equal(found[job][1], expected[job][1])


def test_in_a_large_model_every_job_is_computed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = _lessons(3, longest_prompt=12)
    monkeypatch.setattr(gradients, "ALONE_FROM_TOKENS", 10_000)
    monkeypatch.setattr(frozen, "MOST_SHARED_WEIGHTS", 1_000)
    monkeypatch.setattr(Learner, "_together", lambda *_, **__: pytest.fail("jobs were computed together"))
    expected = [_learn([lesson], torch.bfloat16, 1, Eager())[0] for lesson in lessons]

    found = _learn(lessons, torch.bfloat16, 1, Eager())

    assert all(torch.equal(gradient, other) for (_, gradient), (_, other) in zip(found, expected, strict=True))


def test_what_autograd_computes_for_other_models_is_computed_job_by_job(monkeypatch: pytest.MonkeyPatch) -> None:
    lessons = _lessons(3, longest_prompt=12)
    by_hand = _learn(lessons, torch.float32, 1)
    monkeypatch.setattr(gradients, "covers", lambda model: False)

    found = _learn(lessons, torch.float32, 1)

    for (_, gradient), (_, expected) in zip(found, by_hand, strict=True):
        assert (gradient - expected).abs().max() < 1e-5 * expected.abs().max()
