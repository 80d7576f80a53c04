"""What stands between the products of a training step: norms, rotations, gates, softmaxes, the loss.

Each is one call, so that it can be one pass over its data: at these sizes a step spends more time on memory than on
arithmetic. `Eager` does them with torch's operators; `training.native` with loops of our own, compiled on this machine
where it has a compiler (docs/design/decisions/training-step.md).

Legend: N = tokens, D = model width, F = feed-forward width, H, K = query and key/value heads, G = H / K, d = head
width, B = rows, T = cells of a row, n = tokens of a group, X = B * K, V = vocabulary, M = positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.decoder.base import to_device

CELL_ROUNDING = 16
"""Cells of a row are rounded up to a multiple: bf16 products are compiled for each shape that they meet."""


@dataclass(frozen=True, slots=True)
class Heads:
    """The heads of a layer."""

    queries: int
    keys: int
    width: int


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """RMS norms of each head of queries and of keys, before they are turned: their gains [d]."""

    q_d: Tensor
    k_d: Tensor
    epsilon: float
    """Added to the mean of squares."""


@dataclass(frozen=True)
class RowGroup:
    """Rows whose attention is computed at once, each padded on the right to `cells`."""

    start_B: Tensor
    """Which token each begins with."""
    length_B: Tensor
    cells: int
    end: int | None = None
    """Where the last one ends, if they begin with the first token and follow one another without a gap."""

    def to(self, device: torch.device) -> RowGroup:
        """The same group there."""
        return RowGroup(to_device(self.start_B, device), to_device(self.length_B, device), self.cells, self.end)

    @cached_property
    def real_BT(self) -> Tensor:
        """Where a token stands."""
        return torch.arange(self.cells, device=self.start_B.device) < self.length_B[:, None]

    @cached_property
    def token_BT(self) -> Tensor:
        """Which token stands in each cell, the row's last where none does."""
        cell_T = torch.arange(self.cells, device=self.start_B.device)
        return self.start_B[:, None] + cell_T.minimum(self.length_B[:, None] - 1)

    @cached_property
    def cell_n(self) -> Tensor:
        """The cells of the tokens, one after another, in the flattened shape."""
        return self.real_BT.flatten().nonzero()[:, 0]

    @cached_property
    def token_n(self) -> Tensor:
        """And which tokens they are."""
        return self.token_BT.flatten()[self.cell_n]

    @cached_property
    def edges(self) -> Tensor:
        """Where each begins, and where the last ends, int32 [B + 1]: of rows without a gap."""
        return torch.cat([self.start_B, self.start_B[-1:] + self.length_B[-1:]]).int()

    @cached_property
    def position_n(self) -> Tensor:
        """How many tokens of its own row stand before each, one after another, of such rows."""
        assert self.end is not None
        first_n = self.start_B.repeat_interleave(self.length_B, output_size=self.end)
        return torch.arange(self.end, device=self.start_B.device) - first_n


@dataclass(frozen=True, slots=True)
class Turn:
    """Cosines and sines of the angles of each position from 0 on, [T, d / 2], fp32."""

    cos: Tensor
    sin: Tensor

    def at(self, positions: slice | Tensor) -> Turn:
        """Those of some positions, which may be there more than once."""
        return Turn(self.cos[positions], self.sin[positions])


@dataclass(frozen=True, slots=True)
class Spread:
    """Queries that share a key head stacked [X, G T, d], keys and values [X, T, d]; zero where no token stands."""

    q: Tensor
    k: Tensor
    v: Tensor


class Kernels(Protocol):
    """All add up in fp32, whatever the dtype of their tensors; tensors are contiguous. Threads may share it."""

    def norm(self, x_ND: Tensor, added_ND: Tensor | None, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Rows over the root of their mean square, in `dtype`, and one over that root [N].

        First `added_ND`, of `dtype`, is added to `x_ND`, in place.
        """

    def norm_backward(self, grad_normed_ND: Tensor, normed_ND: Tensor, inverse_N: Tensor, grad_ND: Tensor) -> Tensor:
        """Adds what comes through `norm` to `grad_ND`, fp32, in place; returns the sum in the dtype of the others."""

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up, [N, F], of both side by side, [N, 2 F]."""

    def swiglu_backward(self, gate_up: Tensor, grad_NF: Tensor) -> Tensor:
        """The gradient of `gate_up` from that of `swiglu`."""

    def spread(self, qkv: Tensor, rows: RowGroup, turn: Turn, heads: Heads) -> Spread:
        """Of `qkv` [N, (H + 2K) d], the tokens of `rows`: queries turned and over the root of d, keys turned."""

    def gather(self, spread: Spread, rows: RowGroup, turn: Turn, heads: Heads, into: Tensor) -> None:
        """Gradients of what `spread` gave -> those of its input, in the tokens of `rows` in `into` [N, (H + 2K) d]."""

    def merge(self, out: Tensor, rows: RowGroup, heads: Heads, into: Tensor) -> None:
        """[X, G T, d] -> the tokens of `rows` of `into` [N, H d]."""

    def part(self, grad_N: Tensor, rows: RowGroup, heads: Heads) -> Tensor:
        """The way back of `merge`, [X, G T, d]; zero where no token stands."""

    def softmax(self, score: Tensor) -> Tensor:
        """Weights of causal attention in the place of scores [X, G T, T]; T is a multiple of CELL_ROUNDING."""

    def softmax_backward(self, grad: Tensor, weights: Tensor) -> Tensor:
        """The gradient of the scores in the place of that of the weights."""

    def loss(self, logits_MV: Tensor, target_M: Tensor, weight_M: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log-probabilities of the targets, nats, and whether no token was held more likely, [M] each.

        In the place of the logits comes the gradient of sum(weight * nll).
        """


class Eager:
    """With torch's operators."""

    def norm(self, x_ND: Tensor, added_ND: Tensor | None, epsilon: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        if added_ND is not None:
            x_ND.add_(added_ND)
        square_N1 = torch.linalg.vector_norm(x_ND, dim=-1, keepdim=True).square_()
        inverse_N1 = square_N1.div_(x_ND.shape[1]).add_(epsilon).rsqrt_()
        return torch.mul(x_ND, inverse_N1, out=torch.empty_like(x_ND, dtype=dtype)), inverse_N1.squeeze(1)

    def norm_backward(self, grad_normed_ND: Tensor, normed_ND: Tensor, inverse_N: Tensor, grad_ND: Tensor) -> Tensor:
        """See `Kernels`."""
        mean_N1 = (grad_normed_ND * normed_ND).sum(-1, keepdim=True, dtype=torch.float32).div_(-normed_ND.shape[1])
        through_ND = torch.addcmul(grad_normed_ND, normed_ND, mean_N1.to(normed_ND.dtype))
        return grad_ND.addcmul_(through_ND, inverse_N[:, None]).to(normed_ND.dtype, copy=True)

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """See `Kernels`."""
        gate_NF, up_NF = gate_up.chunk(2, 1)
        return F.silu(gate_NF).mul_(up_NF)

    def swiglu_backward(self, gate_up: Tensor, grad_NF: Tensor) -> Tensor:
        """See `Kernels`."""
        (gate_NF, up_NF), grad_gate_up = gate_up.chunk(2, 1), torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, 1)
        torch.mul(grad_NF, F.silu(gate_NF), out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad_NF * up_NF, gate_NF, grad_input=grad_gate)
        return grad_gate_up

    def spread(self, qkv: Tensor, rows: RowGroup, turn: Turn, heads: Heads) -> Spread:
        """See `Kernels`."""
        cells = qkv[rows.token_BT].unflatten(2, (-1, heads.width)).mul_(rows.real_BT[..., None, None])
        q, k, v = cells.split([heads.queries, heads.keys, heads.keys], 2)
        q, k = (turned(x, turn.at(slice(rows.cells)), 1.0) for x in (q, k))
        return Spread(_stacked(q * heads.width**-0.5, heads.keys), _stacked(k, heads.keys), _stacked(v, heads.keys))

    def gather(self, spread: Spread, rows: RowGroup, turn: Turn, heads: Heads, into: Tensor) -> None:
        """See `Kernels`."""
        n_rows = len(rows.start_B)
        q = _unstacked(spread.q, n_rows, heads.queries) * heads.width**-0.5
        k, v = (_unstacked(x, n_rows, heads.keys) for x in (spread.k, spread.v))
        turn = turn.at(slice(rows.cells))
        cells = torch.cat([turned(q, turn, -1.0), turned(k, turn, -1.0), v], 2)
        into[rows.token_n] = cells.flatten(2).flatten(0, 1)[rows.cell_n]

    def merge(self, out: Tensor, rows: RowGroup, heads: Heads, into: Tensor) -> None:
        """See `Kernels`."""
        cells = _unstacked(out, len(rows.start_B), heads.queries)
        into[rows.token_n] = cells.flatten(2).flatten(0, 1)[rows.cell_n]

    def part(self, grad_N: Tensor, rows: RowGroup, heads: Heads) -> Tensor:
        """See `Kernels`."""
        cells = grad_N[rows.token_BT].unflatten(2, (-1, heads.width)).mul_(rows.real_BT[..., None, None])
        return _stacked(cells, heads.keys)

    def softmax(self, score: Tensor) -> Tensor:
        """See `Kernels`."""
        blocks = score.view(-1, score.shape[2], score.shape[2])
        future = torch.full(blocks.shape[1:], -torch.inf, dtype=score.dtype, device=score.device).triu_(1)
        weights: Tensor = torch.softmax(blocks.add_(future), -1).view(score.shape)
        return weights

    def softmax_backward(self, grad: Tensor, weights: Tensor) -> Tensor:
        """See `Kernels`."""
        grad_score: Tensor = torch.ops.aten._softmax_backward_data(grad, weights, -1, weights.dtype)
        return grad_score

    def loss(self, logits_MV: Tensor, target_M: Tensor, weight_M: Tensor) -> tuple[Tensor, Tensor]:
        """See `Kernels`."""
        target_M1, exact_MV = target_M[:, None], logits_MV.float()
        wanted_M1, most_M1 = exact_MV.gather(1, target_M1), exact_MV.amax(1, keepdim=True)
        log_total_M1 = exact_MV.logsumexp(1, keepdim=True)
        p_MV = torch.exp(exact_MV - log_total_M1)
        p_MV.scatter_add_(1, target_M1, torch.full_like(wanted_M1, -1.0))
        logits_MV.copy_(p_MV.mul_(weight_M[:, None]))
        return (log_total_M1 - wanted_M1).squeeze(1), (wanted_M1 == most_M1).squeeze(1)


def turned(x_THd: Tensor, turn: Turn, way: float) -> Tensor:
    """Each pair (first, second) of the halves turned by its angle in `turn`, forth (1) or back (-1); [..., T, H, d]."""
    cos, sin = (x[:, None].to(x_THd.dtype) for x in (turn.cos, turn.sin * way))
    first, second = x_THd.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _stacked(x_BTHd: Tensor, kv_heads: int) -> Tensor:
    """[X, G T, d], which for keys and values is [X, T, d]."""
    rows, length, heads, width = x_BTHd.shape
    split = x_BTHd.unflatten(2, (kv_heads, heads // kv_heads))
    stacked: Tensor = split.permute(0, 2, 3, 1, 4).reshape(rows * kv_heads, heads // kv_heads * length, width)
    return stacked


def _unstacked(x: Tensor, rows: int, heads: int) -> Tensor:
    """[B, T, H, d]"""
    kv_heads = len(x) // rows
    group = heads // kv_heads
    split = x.view(rows, kv_heads, group, x.shape[1] // group, x.shape[2])
    x_BTHd: Tensor = split.permute(0, 3, 1, 2, 4).flatten(2, 3)
    return x_BTHd
