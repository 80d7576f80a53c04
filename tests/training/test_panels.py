"""Compiled products against torch's, for sizes that fill no panel, and bit by bit whatever lies beside them."""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from tests.training.rows import random_lora
from tunesmith import compiled
from tunesmith.adapters.lora import Layout, Linear
from tunesmith.training import panels
from tunesmith.training.factors import TrainableLora
from tunesmith.training.panels import PanelHead, PanelSite
from tunesmith.training.sites import Part, SharedSite

torch.set_num_threads(1)

INPUTS = 401
"""More than a panel's part in the nearest cache, and no multiple of anything."""
OUTPUTS = {"q": 41, "k": 9, "v": 23}


@pytest.fixture(scope="module", params=["native", "plain"])
def library(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """As this processor has it, and with the vectors that every processor of its kind has."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            flags = [flag for flag in compiled.FLAGS if flag != "-march=native"]
            patch.setattr(compiled, "FLAGS", (*flags, "-mno-avx") if platform.machine() == "x86_64" else flags)
            patch.setattr(compiled, "load", compiled.load.__wrapped__)
        found = panels.library.__wrapped__()
    if found is None:
        pytest.skip("there is no C++ compiler")
    yield found


@pytest.fixture(scope="module")
def job() -> TrainableLora:
    return _job(rank=5)


def _job(rank: int) -> TrainableLora:
    linears = tuple(Linear(name, outputs, INPUTS) for name, outputs in OUTPUTS.items())
    return TrainableLora(random_lora(Layout("layers.{}", ({"qkv": linears},)), rank=rank, alpha=3.0, seed=rank))


def _site(library: ctypes.CDLL, jobs: Sequence[TrainableLora]) -> tuple[PanelSite, SharedSite]:
    chance = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(sum(OUTPUTS.values()), INPUTS, generator=chance) * 0.1
    gain_I = torch.rand(INPUTS, generator=chance)
    ours = PanelSite(library, weight_OI, list(OUTPUTS.values()), gain_I)
    for job in jobs:
        (pair,), _ = job.pairs(job.flat)
        ours.take(job, pair, job.lora.scale)
    return ours, SharedSite.over(weight_OI, gain_I, list(OUTPUTS.values()), torch.float32)


def _both_ways(
    site: PanelSite | SharedSite, x_NI: Tensor, grad_NO: Tensor, spans: Sequence[tuple[TrainableLora, slice]]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs, gradient of the inputs, and of the factors of each job."""
    parts = [Part(span, job.views(1)[0], 0) for job, span in spans]
    for part in parts:
        part.view.begin()
    y_NO, kept = site.forward(x_NI, parts)
    grad_NI = site.backward(grad_NO, x_NI, kept, parts)
    return y_NO, grad_NI, [part.view.flat_gradient.clone() for part in parts]


def _random(n_tokens: int) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(n_tokens)
    return torch.randn(n_tokens, INPUTS, generator=chance), torch.randn(
        n_tokens, sum(OUTPUTS.values()), generator=chance
    )


@pytest.mark.parametrize("n_tokens", [1, 7, 300, 521])
def test_products_and_gradients_are_those_of_torch(library: ctypes.CDLL, job: TrainableLora, n_tokens: int) -> None:
    ours, torchs = _site(library, [job])
    x_NI, grad_NO = _random(n_tokens)
    spans = [(job, slice(0, n_tokens))]

    found, expected = _both_ways(ours, x_NI, grad_NO, spans), _both_ways(torchs, x_NI, grad_NO, spans)

    for mine, theirs in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        assert (mine - theirs).abs().max() < 2e-6 * theirs.abs().max()


def test_a_job_gets_the_same_bits_alone_and_in_company(library: ctypes.CDLL, job: TrainableLora) -> None:
    other = _job(rank=18)
    ours, _ = _site(library, [job, other])
    x_NI, grad_NO = _random(300)
    first, second = slice(0, 71), slice(71, 300)

    y_NO, grad_NI, gradients = _both_ways(ours, x_NI, grad_NO, [(job, first), (other, second)])

    for index, (alone, span) in enumerate(((job, first), (other, second))):
        size = span.stop - span.start
        one = _both_ways(ours, x_NI[span].clone(), grad_NO[span].clone(), [(alone, slice(0, size))])
        assert torch.equal(one[0], y_NO[span])
        assert torch.equal(one[1], grad_NI[span])
        assert torch.equal(one[2][0], gradients[index])


@pytest.mark.parametrize("vocabulary", [3, 1_000])
def test_the_head_forth_and_back(library: ctypes.CDLL, vocabulary: int) -> None:
    chance = torch.Generator().manual_seed(2)
    head_VD, states_MD = torch.randn(vocabulary, 50, generator=chance), torch.randn(9, 50, generator=chance)
    head = PanelHead(library, head_VD)

    logits_MV = head.logits(states_MD)

    assert torch.allclose(logits_MV, states_MD @ head_VD.T, atol=1e-4)
    assert torch.allclose(head.back(logits_MV), states_MD @ head_VD.T @ head_VD, rtol=1e-4, atol=1e-2)
