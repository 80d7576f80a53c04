"""Attention of rows by compiled code, held against torch's and its gradient by autograd."""

from __future__ import annotations

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith import compiled
from tunesmith.training import panels
from tunesmith.training.causal import CausalRows
from tunesmith.training.kernels import HeadNorms, Heads, RowGroup, Turn

pytestmark = pytest.mark.skipif(not any(map(shutil.which, compiled.COMPILERS)), reason="there is no C++ compiler")

LENGTHS = (1, 5, 48, 49, 100, 17, 200)
GAP = 3
"""Tokens between rows, which are in none."""
HEADS = {"grouped": Heads(4, 2, 32), "wide": Heads(2, 2, 64), "narrow": Heads(3, 1, 20), "alone": Heads(1, 1, 8)}


@pytest.fixture(params=[None, 4, 16], ids=["own vectors", "4", "16"])
def attention(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> CausalRows:
    if request.param is not None:  # those of other processors
        monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, f"-DTUNESMITH_LANES={request.param}"))
        monkeypatch.setattr(compiled, "load", compiled.load.__wrapped__)
    library = panels.library.__wrapped__()
    assert library is not None
    return CausalRows(library)


def _rows(lengths: tuple[int, ...]) -> tuple[RowGroup, int]:
    starts = [sum(lengths[:index]) + index * GAP for index in range(len(lengths))]
    return RowGroup(torch.tensor(starts), torch.tensor(lengths), max(lengths)), starts[-1] + lengths[-1] + GAP


def _turn(heads: Heads) -> Turn:
    steps = 10_000.0 ** -(torch.arange(heads.width // 2) * 2 / heads.width)
    angles = torch.arange(max(LENGTHS))[:, None] * steps
    return Turn(angles.cos().contiguous(), angles.sin().contiguous())


def _given(heads: Heads, n_tokens: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    chance = torch.Generator().manual_seed(3)
    qkv = torch.randn(n_tokens, (heads.queries + 2 * heads.keys) * heads.width, generator=chance) * scale
    return qkv, torch.randn(n_tokens, heads.queries * heads.width, generator=chance)


def _ours(
    attention: CausalRows,
    qkv: Tensor,
    grad_N: Tensor,
    rows: RowGroup,
    heads: Heads,
    norms: HeadNorms | None = None,
    asking_B: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    out, of_qkv = torch.zeros_like(grad_N), torch.zeros_like(qkv)
    attended = attention.attend(qkv, rows, _turn(heads), heads, out, norms, asking_B)
    attended.backward(grad_N, of_qkv)
    return out, of_qkv


def _theirs(
    qkv: Tensor, grad_N: Tensor, rows: RowGroup, heads: Heads, norms: HeadNorms | None = None
) -> tuple[Tensor, Tensor]:
    """In double precision."""
    qkv, turn = qkv.double().requires_grad_(), _turn(heads)
    out = torch.zeros_like(grad_N, dtype=torch.float64)
    for start, length in zip(rows.start_B.tolist(), rows.length_B.tolist(), strict=True):
        x_THd = qkv[start : start + length].unflatten(1, (-1, heads.width))
        q, k, v = x_THd.split([heads.queries, heads.keys, heads.keys], 1)
        cos, sin = (part[:length, None].double() for part in (turn.cos, turn.sin))
        turned = []
        for x, gain_d in ((q, norms and norms.q_d), (k, norms and norms.k_d)):
            if norms is not None and gain_d is not None:
                x = F.rms_norm(x, (heads.width,), gain_d.double(), norms.epsilon)
            first, second = x.chunk(2, -1)
            turned.append(torch.cat([first * cos - second * sin, second * cos + first * sin], -1))
        out_HTd = F.scaled_dot_product_attention(
            *(x.transpose(0, 1)[None] for x in (*turned, v)), is_causal=True, enable_gqa=True
        )[0]
        out[start : start + length] = out_HTd.transpose(0, 1).flatten(1)
    (of_qkv,) = torch.autograd.grad(out, qkv, grad_N.double())
    return out.detach(), of_qkv


@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_outputs_and_gradients_are_those_of_torch(attention: CausalRows, kind: str, normed: bool) -> None:
    heads, (rows, n_tokens) = HEADS[kind], _rows(LENGTHS)
    qkv, grad_N = _given(heads, n_tokens)
    gains = (1 + 0.3 * torch.randn(heads.width, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    norms = HeadNorms(*gains, epsilon=1e-5) if normed else None

    ours, theirs = _ours(attention, qkv, grad_N, rows, heads, norms), _theirs(qkv, grad_N, rows, heads, norms)

    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.double(), other, rtol=1e-4, atol=1e-5)


def test_scores_far_apart_overflow_nowhere(attention: CausalRows) -> None:
    heads, (rows, n_tokens) = HEADS["grouped"], _rows(LENGTHS)
    qkv, grad_N = _given(heads, n_tokens, scale=30.0)  # scores of thousands
    ours, theirs = _ours(attention, qkv, grad_N, rows, heads), _theirs(qkv, grad_N, rows, heads)
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine - other).norm() < 1e-3 * other.norm()


def test_a_row_gets_the_same_beside_others_and_alone(attention: CausalRows) -> None:
    heads, (rows, n_tokens) = HEADS["grouped"], _rows(LENGTHS)
    qkv, grad_N = _given(heads, n_tokens)
    together = _ours(attention, qkv, grad_N, rows, heads)
    for start, length in zip(rows.start_B.tolist(), rows.length_B.tolist(), strict=True):
        own = slice(start, start + length)
        one = RowGroup(torch.tensor([0]), torch.tensor([length]), length)
        alone = _ours(attention, qkv[own].contiguous(), grad_N[own].contiguous(), one, heads)
        for mine, other in zip(alone, together, strict=True):
            assert torch.equal(mine, other[own])


def test_queries_that_do_not_ask_change_nothing_for_the_others(attention: CausalRows) -> None:
    heads, (rows, n_tokens) = HEADS["grouped"], _rows(LENGTHS)
    qkv, grad_N = _given(heads, n_tokens)
    asking_B = torch.tensor([0, 5, 47, 48, 97, 2, 150])  # of the second row none does
    for start, length, first in zip(*(x.tolist() for x in (rows.start_B, rows.length_B, asking_B)), strict=True):
        grad_N[start : start + min(first, length)] = 0

    out, of_qkv = _ours(attention, qkv, grad_N, rows, heads, asking_B=asking_B)
    whole, of_whole = _ours(attention, qkv, grad_N, rows, heads)

    torch.testing.assert_close(of_qkv, of_whole, rtol=1e-5, atol=1e-6)
    for start, length, first in zip(*(x.tolist() for x in (rows.start_B, rows.length_B, asking_B)), strict=True):
        assert torch.equal(out[start + first : start + length], whole[start + first : start + length])
