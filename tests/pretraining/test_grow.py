"""A grown model computes what the small one does, learns in all of it, and reads on where the small one stopped."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pretraining import train
from pretraining.grow import grow, tokens_read
from pretraining.kernels import CausalRows
from pretraining.optimizer import Optimizer
from pretraining.recipe import Recipe
from pretraining.rows import rows
from pretraining.shapes import SHAPES, random_llama
from tunesmith.decoder.llama import Llama

torch.set_num_threads(1)

FAMILY = ("ada", "babbage", "curie", "davinci")


def _trained(name: str) -> Llama:
    """Random weights, none of them zero, large beside the epsilon of the norms, as after training."""
    generator = torch.Generator().manual_seed(1)
    model = random_llama(SHAPES[name], generator)
    for parameter in model.parameters():
        parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model


def _logits(model: Llama, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model.hidden(ids, torch.arange(len(ids)), CausalRows(1)))


@pytest.mark.parametrize(("small", "large"), [*pairwise(FAMILY), ("tiny", "ada")])
def test_each_model_grows_into_a_larger_one(small: str, large: str) -> None:
    with torch.no_grad():
        model = _trained(small)
        grown = grow(model, SHAPES[large], torch.Generator().manual_seed(2))
        ids = torch.randint(0, 16_384, (24,), generator=torch.Generator().manual_seed(3))
        before, after = _logits(model, ids), _logits(grown, ids)
    assert [p.shape for p in grown.parameters()] == [
        p.shape for p in random_llama(SHAPES[large], torch.Generator()).parameters()
    ]
    assert (before - after).norm() < 1e-3 * before.norm()  # the epsilon of the norms counts a little more


def test_everything_new_learns_within_two_steps() -> None:
    with torch.no_grad():
        grown = grow(_trained("tiny"), replace(SHAPES["ada"], heads=4, kv_heads=2, layers=3), torch.Generator())
    start = [p.clone() for p in grown.parameters()]
    parameters = [p.requires_grad_() for p in grown.parameters()]
    ids = torch.randint(0, 16_384, (33,), generator=torch.Generator().manual_seed(3))
    for rate in (0.01, 0.02):  # what is written with zeros moves first, then what writes it
        torch.nn.functional.cross_entropy(_logits(grown, ids[:-1]), ids[1:]).backward()
        with torch.no_grad():
            for parameter in parameters:
                assert parameter.grad is not None
                parameter -= rate * parameter.grad.sign()  # like Muon and Adam, whatever its size
                parameter.grad = None
    moved = [float((p != s).float().mean()) for p, s in zip(parameters, start, strict=True)]
    assert min(moved[1:]) > 0.95, moved  # in the embedding only what was read moves


def test_a_shape_that_is_smaller_somewhere_is_refused() -> None:
    with pytest.raises(ValueError, match="layers"):
        grow(_trained("tiny"), replace(SHAPES["ada"], layers=1), torch.Generator())
    with pytest.raises(ValueError, match="no place"):
        grow(_trained("ada"), replace(SHAPES["babbage"], heads=9, kv_heads=3), torch.Generator())


def test_a_grown_model_reads_on_where_the_small_one_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_llama(SHAPES["tiny"], torch.Generator().manual_seed(0))
    train.save(tmp_path, Optimizer.over(list(model.parameters())), train.Progress(step=0, tokens_before=1_000))
    assert tokens_read(tmp_path, batch_tokens=256) == 1_000

    (np.arange(3_000) % 16_384).astype(np.uint16).tofile(tmp_path / "train.bin")
    read: list[int] = []

    def noted(stream: NDArray[np.uint16], first: int, count: int, length: int) -> NDArray[np.int64]:
        read.extend(range(first, first + count))
        return rows(stream, first, count, length)

    monkeypatch.setattr(train, "rows", noted)
    recipe = Recipe(tokens=512, batch_tokens=256, micro_batch_tokens=256, row_tokens=64, long_share=0.0)
    train.train("tiny", tmp_path / "train.bin", tmp_path, recipe, train.Run())
    assert read == list(range(1_000 // 64, 1_000 // 64 + 512 // 64))
    assert tokens_read(tmp_path, batch_tokens=256) == 1_512
