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
from tunesmith.decoder.panels import Bits, Panels
from tunesmith.training import panels
from tunesmith.training.factors import TrainableLora
from tunesmith.training.panels import PanelHead, PanelSite
from tunesmith.training.sites import BaseWeight, Part, SharedSite

torch.set_num_threads(1)

INPUTS = 401
"""More than a panel's part in the nearest cache, and no multiple of anything."""
ROUNDING: dict[Bits, float] = {32: 2e-6, 16: 1e-3}
"""Errors, as a share of the largest number."""
every_kind = pytest.mark.parametrize("bits", ROUNDING)
OUTPUTS = {"q": 41, "k": 9, "v": 23}


@pytest.fixture(scope="module", params=["native", "plain", "wide"])
def library(request: pytest.FixtureRequest) -> Iterator[ctypes.CDLL]:
    """As this processor has it, with the vectors that every processor of its kind has, and in the widest blocks."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            flags = [flag for flag in compiled.FLAGS if flag != "-march=native"]
            patch.setattr(compiled, "FLAGS", (*flags, "-mno-avx") if platform.machine() == "x86_64" else flags)
            patch.setattr(compiled, "load", compiled.load.__wrapped__)
        if request.param == "wide":
            patch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-DTUNESMITH_LANES=16"))
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


def _site(library: ctypes.CDLL, jobs: Sequence[TrainableLora], bits: Bits) -> tuple[PanelSite, SharedSite]:
    chance = torch.Generator().manual_seed(1)
    weight_OI = torch.randn(sum(OUTPUTS.values()), INPUTS, generator=chance) * 0.1
    gain_I = torch.rand(INPUTS, generator=chance)
    ours = PanelSite(library, weight_OI, list(OUTPUTS.values()), gain_I, bits)
    for job in jobs:
        (pair,), _ = job.pairs(job.flat)
        ours.take(job, pair, job.lora.scale)
    return ours, SharedSite(BaseWeight(lambda: weight_OI, gain_I, torch.float32), list(OUTPUTS.values()))


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


@every_kind
@pytest.mark.parametrize("n_tokens", [1, 7, 300, 521])
def test_products_and_gradients_are_those_of_torch(
    library: ctypes.CDLL, job: TrainableLora, n_tokens: int, bits: Bits
) -> None:
    ours, torchs = _site(library, [job], bits)
    x_NI, grad_NO = _random(n_tokens)
    spans = [(job, slice(0, n_tokens))]

    found, expected = _both_ways(ours, x_NI, grad_NO, spans), _both_ways(torchs, x_NI, grad_NO, spans)

    for mine, theirs in zip((*found[:2], *found[2]), (*expected[:2], *expected[2]), strict=True):
        assert (mine - theirs).abs().max() < ROUNDING[bits] * theirs.abs().max()


@every_kind
def test_a_job_gets_the_same_bits_alone_and_in_company(library: ctypes.CDLL, job: TrainableLora, bits: Bits) -> None:
    other = _job(rank=18)
    ours, _ = _site(library, [job, other], bits)
    x_NI, grad_NO = _random(300)
    first, second = slice(0, 71), slice(71, 300)

    y_NO, grad_NI, gradients = _both_ways(ours, x_NI, grad_NO, [(job, first), (other, second)])

    for index, (alone, span) in enumerate(((job, first), (other, second))):
        size = span.stop - span.start
        one = _both_ways(ours, x_NI[span].clone(), grad_NO[span].clone(), [(alone, slice(0, size))])
        assert torch.equal(one[0], y_NO[span])
        assert torch.equal(one[1], grad_NI[span])
        assert torch.equal(one[2][0], gradients[index])


@every_kind
@pytest.mark.parametrize("vocabulary", [3, 1_000])
def test_the_head_forth_and_back(library: ctypes.CDLL, vocabulary: int, bits: Bits) -> None:
    chance = torch.Generator().manual_seed(2)
    head_VD, states_MD = torch.randn(vocabulary, 50, generator=chance), torch.randn(9, 50, generator=chance)
    head = PanelHead(library, head_VD, bits)

    logits_MV = head.logits(states_MD)

    exact_MV = states_MD @ head_VD.T
    assert (logits_MV - exact_MV).abs().max() < ROUNDING[bits] * exact_MV.abs().max()
    back_MD = exact_MV @ head_VD
    assert (head.back(exact_MV) - back_MD).abs().max() < ROUNDING[bits] * back_MD.abs().max()


def test_in_fixed_point_no_number_stays_none_and_none_else_is_harmed(library: ctypes.CDLL) -> None:
    chance = torch.Generator().manual_seed(3)
    weight_OI, x_NI = torch.randn(40, 300, generator=chance), torch.randn(5, 300, generator=chance)
    panels = Panels(library, weight_OI, bits=16)
    exact_NO = panels.product(x_NI)
    x_NI[1, 200], x_NI[3, 0] = torch.nan, torch.inf

    product_NO = panels.product(x_NI)

    assert product_NO[[1, 3]].isnan().all()
    assert torch.equal(product_NO[[0, 2, 4]], exact_NO[[0, 2, 4]])
    with pytest.raises(ValueError, match="finite"):
        Panels(library, weight_OI.index_fill(0, torch.tensor([7]), torch.inf), bits=8)
    with pytest.raises(ValueError, match="finite"):
        Panels(library, weight_OI, torch.full((300,), torch.nan), bits=16)


def test_numbers_too_small_for_a_scale_are_0(library: ctypes.CDLL) -> None:
    weight_OI, x_NI = torch.ones(20, 200), torch.ones(3, 200)
    weight_OI[4], x_NI[1] = 1e-40, 1e-40
    weight_OI[4, 7] = x_NI[1, 7] = 0.0
    for bits in (8, 16):
        product_NO = Panels(library, weight_OI, bits=bits).product(x_NI)
        assert torch.allclose(product_NO, x_NI @ weight_OI.T, rtol=1e-3, atol=1e-30)


def test_the_largest_numbers_there_are_do_not_overflow(library: ctypes.CDLL) -> None:
    x_NI, weight_OI = torch.full((7, 1_000), 3e38), torch.full((33, 1_000), -1e-30)
    for bits in (8, 16):
        product_NO = Panels(library, weight_OI, bits=bits).product(x_NI)
        assert torch.allclose(product_NO, x_NI @ weight_OI.T, rtol=1e-3)


def test_weights_of_8_bits_are_taken_as_they_are(library: ctypes.CDLL) -> None:
    chance = torch.Generator().manual_seed(4)
    whole_OI = torch.randint(-127, 128, (50, 333), generator=chance)
    whole_OI[:, 5] = 127  # each row has the largest
    scale_O1 = torch.rand(50, 1, generator=chance) + 0.1
    x_NI = torch.randint(-9, 9, (6, 333), generator=chance).float() * (32767 / 9)  # numbers that states have
    x_NI[:, ::100] = 32767
    product_NO = Panels(library, whole_OI * scale_O1, bits=8).product(x_NI)
    exact_NO = x_NI.round().double() @ (whole_OI * scale_O1).double().T
    assert (product_NO - exact_NO).abs().max() < 1e-6 * exact_NO.abs().max()
