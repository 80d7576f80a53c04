"""The two ways to a gradient: one may go on with what the other began."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pretraining.shapes import SHAPES, random_llama
from pretraining.steps import CompiledSteps, Steps, TorchSteps, steps
from tests.tiles import needs_tiles
from tunesmith.decoder.llama import Llama

torch.set_num_threads(1)


def _model() -> Llama:
    chance = torch.Generator().manual_seed(2)
    model = random_llama(SHAPES["tiny"], chance)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=chance)
    return model


def _learn(way: Steps, row: int) -> tuple[float, list[torch.Tensor]]:
    ids_N = torch.randint(16_384, (2 * 256 + 1,), generator=torch.Generator().manual_seed(1))
    way.begin()
    losses = [float(way.learn(part[:-1], part[1:], row, 1 / 512)) for part in (ids_N[:257], ids_N[256:])]
    return sum(losses), [parameter.grad.clone() for parameter in way.parameters if parameter.grad is not None]


@needs_tiles
@pytest.mark.parametrize("row", [32, 256])
def test_compiled_code_and_torch_give_the_same_gradients(row: int) -> None:
    model = _model()
    compiled, plain = (steps(model, device="cpu", compiled=False, autograd=autograd) for autograd in (False, True))
    assert isinstance(compiled, CompiledSteps)
    assert isinstance(plain, TorchSteps)
    for parameter in compiled.parameters + plain.parameters:
        parameter.detach().mul_(1.1)  # as an optimizer changes them

    (loss, ours), (expected, theirs) = _learn(compiled, row), _learn(plain, row)

    assert loss == pytest.approx(expected, rel=1e-3)
    assert len(ours) == len(theirs) == len(list(model.parameters()))
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < 0.1 * other.norm()  # both are of bf16
    again, gradients = _learn(compiled, row)
    assert again == loss
    assert all(map(torch.equal, gradients, ours))


def test_a_model_that_compiled_code_does_not_cover_is_left_to_torch() -> None:
    model = random_llama(replace(SHAPES["tiny"], head_width=16), torch.Generator())
    assert isinstance(steps(model, device="cpu", compiled=False, autograd=False), TorchSteps)
