"""The compiled kernels and those of torch's operators: one promise, two implementations."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tunesmith import compiled
from tunesmith.training import native
from tunesmith.training.kernels import Eager, Heads, Kernels, RowGroup, Spread, Turn

needs_compiler = pytest.mark.skipif(not any(map(shutil.which, compiled.COMPILERS)), reason="there is no C++ compiler")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 0.01}
ROWS = RowGroup(torch.tensor([3, 20]), torch.tensor([17, 5]), 32)
N = 25
"""Tokens; the first three and none of the last are in no row."""
HEADS = Heads(queries=6, keys=2, width=8)


@pytest.fixture(params=["eager", "native"])
def kernels(request: pytest.FixtureRequest) -> Kernels:
    if request.param == "eager":
        return Eager()
    found = native.load()
    if found is None:
        pytest.skip("there is no C++ compiler")
    return found


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


def _random(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> bool:
    return bool((found.float() - expected.float()).abs().max() <= TOLERANCE[dtype] * expected.float().abs().max())


def test_norm_adds_first_and_goes_back(kernels: Kernels, dtype: torch.dtype) -> None:
    x, added, grad = _random(7, 48), _random(7, 48, seed=2).to(dtype), _random(7, 48, seed=3).to(dtype)
    leaf = (x + added.float()).requires_grad_()
    expected = leaf * torch.rsqrt(leaf.square().mean(1, keepdim=True) + 1e-5)
    expected.backward(grad.float())

    normed, inverse = kernels.norm(x, added, 1e-5, dtype)
    total = torch.ones(7, 48)
    rounded = kernels.norm_backward(grad, normed, inverse, total)

    assert torch.equal(x, leaf.detach())
    assert _close(normed, expected.detach(), dtype)
    assert leaf.grad is not None
    assert _close(total, leaf.grad + 1, dtype)
    assert rounded.dtype == dtype
    assert _close(rounded, total, dtype)
    assert rounded.data_ptr() != total.data_ptr()


def test_swiglu_and_its_gradient(kernels: Kernels, dtype: torch.dtype) -> None:
    gate_up, grad = (3 * _random(9, 70)).to(dtype), _random(9, 35, seed=2).to(dtype)
    leaf = gate_up.float().clone().requires_grad_()
    gate, up = leaf.chunk(2, 1)
    expected = torch.nn.functional.silu(gate) * up
    expected.backward(grad.float())

    assert leaf.grad is not None
    assert _close(kernels.swiglu(gate_up), expected.detach(), dtype)
    assert _close(kernels.swiglu_backward(gate_up, grad), leaf.grad, dtype)


def test_gates_far_out_are_zero_or_themselves(kernels: Kernels) -> None:
    gate_up = torch.tensor([[-200.0, 200.0, -1e30, 1e30, 1.0, 1.0, 1.0, 1.0]])

    assert torch.allclose(kernels.swiglu(gate_up), torch.tensor([[0.0, 200.0, 0.0, 1e30]]), atol=1e-4)


def test_attention_is_that_of_torch(kernels: Kernels, dtype: torch.dtype) -> None:
    turn = Turn(_random(32, 4).cos(), _random(32, 4).sin())
    qkv, grad = _random(N, 10 * 8).to(dtype), _random(N, 6 * 8, seed=2).to(dtype)
    leaf = qkv.float().clone().requires_grad_()
    expected = _attention(leaf, turn)
    expected.backward(grad.float())

    out, grad_qkv = torch.zeros(N, 48, dtype=dtype), torch.zeros(N, 80, dtype=dtype)
    spread = kernels.spread(qkv, ROWS, turn, HEADS)
    weights = kernels.softmax(torch.bmm(spread.q, spread.k.mT))
    kernels.merge(torch.bmm(weights, spread.v), ROWS, HEADS, out)
    parted = kernels.part(grad, ROWS, HEADS)
    grad_score = kernels.softmax_backward(torch.bmm(parted, spread.v.mT), weights)
    grads = torch.bmm(grad_score, spread.k), torch.bmm(grad_score.mT, spread.q), torch.bmm(weights.mT, parted)
    kernels.gather(Spread(*grads), ROWS, turn, HEADS, grad_qkv)

    assert leaf.grad is not None
    assert _close(out, expected.detach(), dtype)
    assert (grad_qkv.float() - leaf.grad).abs().max() <= 3 * TOLERANCE[dtype] * leaf.grad.abs().max()


def _attention(qkv: torch.Tensor, turn: Turn) -> torch.Tensor:
    out = torch.zeros(N, 48)
    for start, length in zip(ROWS.start_B.tolist(), ROWS.length_B.tolist(), strict=True):
        row = slice(start, start + length)
        cos, sin = turn.cos[:length, None], turn.sin[:length, None]
        q, k, v = qkv[row].view(length, 10, 8).split([6, 2, 2], 1)
        q, k = (
            torch.cat([x[..., :4] * cos - x[..., 4:] * sin, x[..., 4:] * cos + x[..., :4] * sin], -1) for x in (q, k)
        )
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out = out.index_copy(0, torch.arange(N)[row], attended.transpose(0, 1).flatten(1))
    return out


def test_loss_and_its_gradient(kernels: Kernels, dtype: torch.dtype) -> None:
    logits, target, weight = (4 * _random(5, 333)).to(dtype), torch.tensor([0, 332, 7, 16, 31]), torch.rand(5)
    target[2] = logits[2].float().argmax()
    leaf = logits.float().clone().requires_grad_()
    expected = torch.nn.functional.cross_entropy(leaf, target, reduction="none")
    (expected * weight).sum().backward()

    nll, right = kernels.loss(logits, target, weight)

    assert leaf.grad is not None
    assert torch.allclose(nll, expected.detach(), atol=1e-5)
    assert right.tolist() == (leaf.argmax(1) == target).tolist()
    assert right[2]
    assert _close(logits, leaf.grad, dtype)


def test_what_is_not_a_number_stays_none(kernels: Kernels) -> None:
    logits = _random(2, 64)
    logits[1, 40] = torch.nan

    nll, _ = kernels.loss(logits, torch.tensor([1, 2]), torch.ones(2))

    assert nll.isnan().tolist() == [False, True]
    assert kernels.swiglu(torch.tensor([[torch.nan, 1.0]])).isnan().all()


@needs_compiler
def test_a_run_does_not_go_on_with_other_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_native, without = tmp_path / "with", tmp_path / "without"
    native.confirm(with_native)
    native.confirm(with_native)
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        native.confirm(without)
        native.confirm(without)
        with pytest.raises(native.KernelsChanged, match="compiler"):
            native.confirm(with_native)

    with pytest.raises(native.KernelsChanged):
        native.confirm(without)
