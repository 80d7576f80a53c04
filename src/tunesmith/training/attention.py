"""Causal attention over groups of right-padded rows with its gradient, in plain products or by torch's fused kernel.

Plain products are faster for short rows, forward and far more so backward; their memory grows with the square of a row.

Legend: N = tokens, B = rows, T = cells of a row, H, K = query and key/value heads, G = H / K, d = head width,
X = B * K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from inspect import signature
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.training.kernels import HeadNorms, Heads, Kernels, RowGroup, Spread, Turn, turned

LONGEST_PLAIN_ROW = 512
"""Cells of a row up to which plain products were never slower (docs/design/decisions/training-step.md)."""
SQUARES = 1 << 15
"""Scores of a head that are computed at once, at most, if that is not a single row's: with eight heads half a MiB in
bf16, which stays in the cache next to a core."""
LEAST_FILL = 0.75
"""Of a group's rows the shortest is at least this long, in lengths of the longest."""


class Attended(Protocol):
    """Attention that has been computed, and what its gradient needs."""

    def backward(self, grad_N: Tensor, into: Tensor) -> None:
        """The gradient of `qkv`, from that of the output [N, H d], into the tokens of the group's rows."""


class RowAttention(Protocol):
    """Attention over rows of any lengths. Threads may share it."""

    asks: ClassVar[bool]
    """Whether it makes use of `asking_B`."""

    def attend(
        self,
        qkv: Tensor,
        rows: RowGroup,
        turn: Turn,
        heads: Heads,
        into: Tensor,
        norms: HeadNorms | None = None,
        asking_B: Tensor | None = None,
    ) -> Attended:
        """The output of each token of `rows`, which attends to itself and those before it, into `into` [N, H d].

        `qkv` [N, (H + 2K) d] holds queries and keys without positions and norms. With `asking_B` [B] a row's outputs
        before that place are of no use, and may be missing.
        """


def attend(
    kernels: Kernels,
    qkv: Tensor,
    rows: RowGroup,
    turn: Turn,
    heads: Heads,
    into: Tensor,
    norms: HeadNorms | None = None,
) -> Attended:
    """The output of each token of `rows`, which attends to itself and those before it, into `into` [N, H d].

    `qkv` [N, (H + 2K) d] holds queries and keys without positions. `norms`: on a device alone.
    """
    if qkv.device.type != "cpu":
        return _Differentiated.over(qkv, rows, turn, heads, norms, into)
    assert norms is None
    kind = _Plain if rows.cells <= LONGEST_PLAIN_ROW else _Fused
    return kind.over(kernels, qkv, rows, turn, heads, into)


def grouped(lengths: Sequence[int], rounding: int, squares: float = SQUARES) -> list[tuple[int, int, int]]:
    """Rows, longest first, as groups of neighbours of similar length: (first, end, cells of each).

    `squares`: scores of a head in a group, at most, if that is not a single row's.
    """
    groups: list[tuple[int, int, int]] = []
    first = 0
    for index, length in enumerate(lengths):
        cells = lengths[first] + -lengths[first] % rounding
        fits = (index - first + 1) * cells * cells <= squares
        similar = length + -length % rounding >= LEAST_FILL * cells
        if index > first and not (fits and similar):
            groups.append((first, index, cells))
            first = index
    return [*groups, (first, len(lengths), lengths[first] + -lengths[first] % rounding)]


@dataclass(frozen=True, slots=True)
class _Call:
    """What both kinds go back with."""

    kernels: Kernels
    rows: RowGroup
    turn: Turn
    heads: Heads


@dataclass(frozen=True, slots=True)
class _Plain:
    call: _Call
    spread: Spread
    weights: Tensor
    """[X, G T, T]"""

    @classmethod
    def over(cls, kernels: Kernels, qkv: Tensor, rows: RowGroup, turn: Turn, heads: Heads, into: Tensor) -> _Plain:
        spread = kernels.spread(qkv, rows, turn, heads)
        weights = kernels.softmax(torch.bmm(spread.q, spread.k.mT))
        kernels.merge(torch.bmm(weights, spread.v), rows, heads, into)
        return cls(_Call(kernels, rows, turn, heads), spread, weights)

    def backward(self, grad_N: Tensor, into: Tensor) -> None:
        """See `Attended`."""
        call, spread = self.call, self.spread
        grad = call.kernels.part(grad_N, call.rows, call.heads)
        grad_v = torch.bmm(self.weights.mT, grad)
        grad_score = call.kernels.softmax_backward(torch.bmm(grad, spread.v.mT), self.weights)
        grads = Spread(torch.bmm(grad_score, spread.k), torch.bmm(grad_score.mT, spread.q), grad_v)
        call.kernels.gather(grads, call.rows, call.turn, call.heads, into)


@dataclass(frozen=True, slots=True)
class _Fused:
    """The kernel wants a key head for each query head: keys and values are repeated within a group."""

    call: _Call
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    """q, k, v, output, logarithms of the softmax's sums; heads before cells."""

    @classmethod
    def over(cls, kernels: Kernels, qkv: Tensor, rows: RowGroup, turn: Turn, heads: Heads, into: Tensor) -> _Fused:
        spread = kernels.spread(qkv, rows, turn, heads)
        shape, group = (len(rows.start_B), -1, rows.cells, heads.width), heads.queries // heads.keys
        q, k, v = (x.view(shape) for x in (spread.q, spread.k, spread.v))
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
        out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True, scale=1.0)
        kernels.merge(out.contiguous().view(spread.q.shape), rows, heads, into)
        return cls(_Call(kernels, rows, turn, heads), (q, k, v, out, log_sum))

    def backward(self, grad_N: Tensor, into: Tensor) -> None:
        """See `Attended`."""
        call, (q, _, _, _, _) = self.call, self.inputs
        grad = call.kernels.part(grad_N, call.rows, call.heads).view(q.shape)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grad_q, *grads = flash(grad, *self.inputs, 0.0, True, scale=1.0)
        n_rows, keys, width = len(call.rows.start_B), call.heads.keys, call.heads.width
        stacked = (n_rows * keys, -1, width)
        grad_k, grad_v = (x.unflatten(1, (keys, -1)).sum(2).reshape(stacked) for x in grads)
        spread = Spread(grad_q.contiguous().view(stacked), grad_k, grad_v)
        call.kernels.gather(spread, call.rows, call.turn, call.heads, into)


def _ready(qkv_THd: Tensor, turn: Turn, heads: Heads, norms: HeadNorms | None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys normed and turned, and values, of all heads side by side: [..., T, heads, d]."""
    q, k, v = qkv_THd.split([heads.queries, heads.keys, heads.keys], -2)
    if norms is not None:
        q, k = (
            F.rms_norm(x.float(), gain.shape, gain, norms.epsilon).to(x.dtype)
            for x, gain in ((q, norms.q_d), (k, norms.k_d))
        )
    return turned(q, turn, 1.0), turned(k, turn, 1.0), v


@dataclass(frozen=True, slots=True)
class FlashRows:
    """Implements `RowAttention` by torch's kernel for rows of any lengths, which needs 16 bits and a GPU.

    One call for all of them, and no cell that is empty. `rows` follow one another without a gap.
    """

    asks: ClassVar[bool] = False

    def attend(
        self,
        qkv: Tensor,
        rows: RowGroup,
        turn: Turn,
        heads: Heads,
        into: Tensor,
        norms: HeadNorms | None = None,
        asking_B: Tensor | None = None,
    ) -> Attended:
        """See `RowAttention`."""
        from torch.nn.attention.varlen import varlen_attn  # here: not every torch has it

        given = qkv.detach().requires_grad_()
        with torch.enable_grad():
            q, k, v = _ready(given.unflatten(1, (-1, heads.width)), turn.at(rows.position_n), heads, norms)
            lengths = (rows.edges, rows.edges, rows.cells, rows.cells)
            options: dict[str, Any] = {"enable_gqa": heads.queries != heads.keys} if _asks_for_groups() else {}
            out = varlen_attn(q, k, v.contiguous(), *lengths, window_size=(-1, 0), **options)
        assert isinstance(out, Tensor)  # more only where more is asked for
        into.copy_(out.detach().flatten(1))
        return _Flash(given, out)


@cache
def _asks_for_groups() -> bool:
    """Whether this torch wants to be told that keys have fewer heads: up to 2.11 its kernel sees for itself."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in signature(varlen_attn).parameters


@dataclass(frozen=True, slots=True)
class _Flash:
    given: Tensor
    """[N, (H + 2K) d]"""
    out: Tensor
    """[N, H, d]"""

    def backward(self, grad_N: Tensor, into: Tensor) -> None:
        """See `Attended`."""
        (of_given,) = torch.autograd.grad(self.out, self.given, grad_N.view(self.out.shape))
        into.copy_(of_given)


@dataclass(frozen=True, slots=True)
class _Differentiated:
    """By torch's own choice of a kernel for the device, and its gradient by autograd."""

    rows: RowGroup
    given: Tensor
    """[B, T, (H + 2K) d]"""
    out: Tensor
    """[B, H, T, d]"""

    @classmethod
    def over(
        cls, qkv: Tensor, rows: RowGroup, turn: Turn, heads: Heads, norms: HeadNorms | None, into: Tensor
    ) -> _Differentiated:
        given = (qkv[rows.token_BT] * rows.real_BT[..., None]).requires_grad_()
        group = heads.queries // heads.keys
        with torch.enable_grad():
            cells = given.unflatten(2, (-1, heads.width))
            q, k, v = (x.transpose(1, 2) for x in _ready(cells, turn.at(slice(rows.cells)), heads, norms))
            # Repeated by hand: in fp32 no kernel of CUDA but the one that has all scores in memory knows groups.
            k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        into[rows.token_n] = out.detach().transpose(1, 2).flatten(2).flatten(0, 1)[rows.cell_n]
        return cls(rows, given, out)

    def backward(self, grad_N: Tensor, into: Tensor) -> None:
        """See `Attended`."""
        rows = self.rows
        grad_BTO = grad_N[rows.token_BT] * rows.real_BT[..., None]
        grad_BHTd = grad_BTO.unflatten(2, (self.out.shape[1], -1)).transpose(1, 2)
        (of_given,) = torch.autograd.grad(self.out, self.given, grad_BHTd)
        into[rows.token_n] = of_given.flatten(0, 1)[rows.cell_n]
