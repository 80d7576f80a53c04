"""Causal attention over right-padded rows with its gradient, in plain products or by the fused kernel of the CPU.

Plain products are faster for short rows, forward and far more so backward; their memory grows with the square of a row.

Legend: B = rows, T = cells of a row, H, K = query and key/value heads, G = H / K, d = head width, X = B * K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LONGEST_PLAIN_ROW = 512
"""Cells of a row up to which plain products were never slower (docs/design/decisions/training-step.md)."""


class Attended(Protocol):
    """Attention that has been computed, and what its gradient needs."""

    @property
    def out_BTHd(self) -> Tensor:
        """The attention output."""

    def gradients(self, grad_BTHd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of q [B, T, H, d], k and v [B, T, K, d], from that of the output."""


def attend(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Attended:
    """Each cell attends to itself and the cells before it; scores are q k / sqrt(d)."""
    kind = _plain if q_BTHd.shape[1] <= LONGEST_PLAIN_ROW else _fused
    return kind(q_BTHd, k_BTKd, v_BTKd)


@dataclass(frozen=True, slots=True)
class _Plain:
    """Queries that share a key head are stacked: [X, G T, d] against [X, T, d]."""

    out_BTHd: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    p: Tensor
    """Attention weights, [X, G T, T]."""

    def gradients(self, grad_BTHd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, heads, kv_heads = grad_BTHd.shape[0], grad_BTHd.shape[2], len(self.k) // grad_BTHd.shape[0]
        grad = _stacked(grad_BTHd, kv_heads)
        grad_v = torch.bmm(self.p.mT, grad)
        grad_p = torch.bmm(grad, self.v.mT)
        grad_score = torch.ops.aten._softmax_backward_data(grad_p, self.p, -1, self.p.dtype)
        grad_score.mul_(self.q.shape[-1] ** -0.5)
        grad_q, grad_k = torch.bmm(grad_score, self.k), torch.bmm(grad_score.mT, self.q)
        return _unstacked(grad_q, rows, heads), _unstacked(grad_k, rows, kv_heads), _unstacked(grad_v, rows, kv_heads)


def _plain(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> _Plain:
    rows, length, heads, width = q_BTHd.shape
    kv_heads = k_BTKd.shape[2]
    q, k, v = _stacked(q_BTHd, kv_heads), _stacked(k_BTKd, kv_heads), _stacked(v_BTKd, kv_heads)
    future = torch.full((length, length), -torch.inf, dtype=q.dtype).triu_(1).repeat(heads // kv_heads, 1)
    p = torch.softmax(torch.baddbmm(future, q, k.mT, alpha=width**-0.5), -1)
    return _Plain(_unstacked(torch.bmm(p, v), rows, heads), q, k, v, p)


def _stacked(x_BTHd: Tensor, kv_heads: int) -> Tensor:
    """[X, G T, d], which for keys and values is [X, T, d]."""
    rows, length, heads, width = x_BTHd.shape
    split = x_BTHd.view(rows, length, kv_heads, heads // kv_heads, width)
    return split.permute(0, 2, 3, 1, 4).reshape(rows * kv_heads, heads // kv_heads * length, width)


def _unstacked(x: Tensor, rows: int, heads: int) -> Tensor:
    kv_heads = len(x) // rows
    group = heads // kv_heads
    split = x.view(rows, kv_heads, group, x.shape[1] // group, x.shape[2])
    return split.permute(0, 3, 1, 2, 4).flatten(2, 3)


@dataclass(frozen=True, slots=True)
class _Fused:
    """The kernel wants a key head for each query head: keys and values are repeated within a group."""

    out_BTHd: Tensor
    kv_heads: int
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    """q, k, v, output, logarithms of the softmax's sums; heads before cells."""

    def gradients(self, grad_BTHd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = backward(grad_BTHd.transpose(1, 2), *self.inputs, 0.0, True)
        grad_q, grad_k, grad_v = (grad.transpose(1, 2) for grad in grads)
        grad_k, grad_v = (grad.unflatten(2, (self.kv_heads, -1)).sum(3) for grad in (grad_k, grad_v))
        return grad_q, grad_k, grad_v


def _fused(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> _Fused:
    kv_heads = k_BTKd.shape[2]
    k_BTHd, v_BTHd = (x.repeat_interleave(q_BTHd.shape[2] // kv_heads, 2) for x in (k_BTKd, v_BTKd))
    q, k, v = (x.transpose(1, 2) for x in (q_BTHd, k_BTHd, v_BTHd))
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    return _Fused(out.transpose(1, 2), kv_heads, (q, k, v, out, log_sum))
