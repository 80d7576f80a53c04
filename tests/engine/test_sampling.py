from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from tunesmith.engine import sampling
from tunesmith.engine.base import SamplingParams
from tunesmith.engine.chance import derive, uniform
from tunesmith.engine.sampling import Draw, choose, score

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -30.0])


def draw(step: int = 0, counts: dict[int, int] | None = None, **values: float) -> Draw:
    return Draw(SamplingParams(**values), step, Counter(counts))  # type: ignore[arg-type]


def frequencies(draws: list[Draw]) -> Counter[int]:
    return Counter(choose(LOGITS.expand(len(draws), -1), draws))


@pytest.mark.parametrize(
    ("values", "kept"),
    [({}, 4), ({"temperature": 2.0}, 4), ({"temperature": 0.5}, 4), ({"top_p": 0.9}, 3), ({"top_p": 0.6}, 1)],
)
def test_frequencies_are_the_shaped_probabilities(values: dict[str, float], kept: int) -> None:
    weights = (LOGITS.double() / values.get("temperature", 1.0)).softmax(-1)[:kept]
    expected = weights / weights.sum()
    n = 4000
    counts = frequencies([draw(seed=seed, **values) for seed in range(n)])
    assert set(counts) <= set(range(kept))
    for token_id in range(kept):
        deviation = math.sqrt(float(expected[token_id] * (1 - expected[token_id])) / n)
        assert counts[token_id] / n == pytest.approx(float(expected[token_id]), abs=5 * deviation + 1e-9)


def test_each_step_draws_anew() -> None:
    assert len(frequencies([draw(step=step, seed=1) for step in range(200)])) >= 3


def test_temperature_zero_and_almost_zero_take_the_best() -> None:
    assert choose(LOGITS[None] * 1e30, [draw(temperature=0.0)]) == [0]
    assert choose(LOGITS[None], [draw(temperature=1e-300)]) == [0]
    assert choose(LOGITS[None], [draw(temperature=0.01)]) == [0]


def test_rows_of_one_batch_do_not_touch_each_other() -> None:
    draws = [
        draw(temperature=0.0),
        draw(temperature=0.0, counts={0: 1}, presence_penalty=1.5),
        draw(temperature=0.0, counts={0: 3}, frequency_penalty=0.7),
        draw(top_p=0.0),
        Draw(SamplingParams(temperature=0.0, logit_bias={4: 100.0}), 0, Counter()),
        draw(seed=5),
    ]
    together = choose(LOGITS.expand(6, -1), draws)
    assert together[:5] == [0, 1, 1, 0, 4]
    assert [choose(LOGITS[None], [one])[0] for one in draws] == together


def test_scores_are_of_the_logits_as_they_are() -> None:
    expected = LOGITS.log_softmax(-1)
    first, second = score(LOGITS.expand(2, -1).to(torch.bfloat16), [3, 0], [2, 0])
    assert first.token_id == 3
    assert first.logprob == pytest.approx(float(expected[3]), abs=1e-6)
    assert [token_id for token_id, _ in first.top] == [0, 1]
    assert second.top == ()


def test_chance_depends_on_seed_and_step_alone() -> None:
    values = [uniform(seed, step) for seed in range(50) for step in range(50)]
    assert all(0 <= value < 1 for value in values)
    assert len(set(values)) == 2500
    assert sum(values) / 2500 == pytest.approx(0.5, abs=0.03)
    assert uniform(3, 4) == 0.10435084488140922  # the same on every machine and in every release
    assert derive(1, 2, 3) != derive(1, 3, 2)
    assert 0 <= derive(7) < 2**63


@pytest.mark.parametrize("spread", [0.1, 3.0, 8.0])  # flat: the best few do not come to the share; and peaked
def test_a_nucleus_is_the_same_however_it_is_found(monkeypatch: pytest.MonkeyPatch, spread: float) -> None:
    logits_BV = torch.randn(20, 3_000, generator=torch.Generator().manual_seed(5)) * spread
    shares = [0.0, 0.2, 0.5, 0.9, 0.999]
    draws = [Draw(SamplingParams(seed=row, top_p=shares[row % 5]), step=row, counts=Counter()) for row in range(20)]
    among_the_best = choose(logits_BV, draws)
    monkeypatch.setattr(sampling, "NUCLEUS_TOKENS", 3_000)
    assert choose(logits_BV, draws) == among_the_best
    weights_BV = logits_BV.double().softmax(-1)
    for row, token_id in enumerate(among_the_best):
        likelier = weights_BV[row][weights_BV[row] > weights_BV[row, token_id]].sum()
        assert likelier == 0 or likelier < shares[row % 5]
