"""Hand-made gradients against autograd's, and the optimizer's directions against their definition."""

from __future__ import annotations

import pytest
import torch

from pretraining.kernels import HeadLoss, ShortRowAttention, softmax_gradient
from pretraining.optimizer import orthogonal
from pretraining.steps import gradient_on_cpu

torch.set_num_threads(1)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (4, 1)])
def test_attention_and_its_gradients_equal_the_plain_ones(heads: int, kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v, weight = (torch.randn(2, n, 33, 8, generator=generator) for n in (heads, kv_heads, kv_heads, heads))
    ours, plain = [], []
    for attention, kept in (
        (ShortRowAttention.apply, ours),
        (lambda *x: torch.nn.functional.scaled_dot_product_attention(*x, is_causal=True, enable_gqa=True), plain),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        output = attention(*inputs)
        (output * weight).sum().backward()
        kept += [output, *(x.grad for x in inputs)]
    for mine, theirs in zip(ours, plain, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [300, 128])
def test_head_loss_and_its_gradients_equal_plain_cross_entropy(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 16, generator=generator).requires_grad_()
    head = torch.randn(50, 16, generator=generator).requires_grad_()
    target = torch.randint(0, 50, (300,), generator=generator)
    loss = HeadLoss.apply(hidden, head, target, torch.empty(rows, 50))
    (3 * loss).backward()
    ours = loss, hidden.grad, head.grad
    hidden.grad = head.grad = None
    plain = torch.nn.functional.cross_entropy(hidden @ head.T, target, reduction="sum")
    (3 * plain).backward()
    for mine, theirs in zip(ours, (plain, hidden.grad, head.grad), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4)


def test_the_gradient_in_one_pass_is_that_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_NV, target_N = 3 * torch.randn(40, 50, generator=generator), torch.randint(0, 50, (40,), generator=generator)
    expected_NV = logits_NV.clone()
    loss = softmax_gradient(expected_NV, target_N)
    assert float(gradient_on_cpu(logits_NV, target_N)) == pytest.approx(float(loss), rel=1e-5)
    assert torch.allclose(logits_NV, expected_NV, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_directions_have_singular_values_near_one_whatever_their_batch(shape: tuple[int, int]) -> None:
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    directions = orthogonal(matrices)
    values = torch.linalg.svdvals(directions.float())
    assert 0.5 < values.min() <= values.max() < 1.4
    # U V^T of the matrix itself: every pair of singular vectors is kept.
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    assert torch.einsum("lrk,lrc,lkc->lk", u, directions.float(), vh).min() > 0.5
    for matrix, direction in zip(matrices, directions, strict=True):
        assert torch.allclose(orthogonal(matrix[None])[0].float(), direction.float(), atol=0.02)
