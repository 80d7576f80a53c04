"""Keys and values of all sequences of one base, in blocks, and attention over them.

Legend: N = tokens of a step, B = sequences of a group, T = tokens of the longest of them, L = positions they attend
to, H = query heads, K = key/value heads, G = query heads that share one (H / K), d = head width, P = tokens of a block,
b = blocks of a sequence.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.engine.blocks import BLOCK_TOKENS, BlockPool


class Span(Protocol):
    """A stretch of positions `start` to `end` of a sequence that keeps its keys and values in `blocks`."""

    @property
    def start(self) -> int:
        """First position."""

    @property
    def end(self) -> int:
        """One after the last."""

    @property
    def blocks(self) -> list[int]:
        """Enough for all positions up to `end`."""


class KVCache:
    """Storage for the blocks of one pool. It grows as higher blocks are used and is never given back."""

    def __init__(
        self, pool: BlockPool, *, layers: int, kv_heads: int, head_width: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.pool = pool
        self.version = 0
        """Another number whenever keys and values came to lie elsewhere."""
        self.dtype, self.device = dtype, device
        self._kv_heads = kv_heads
        self._head_width = head_width
        # Row (block * K + k) * P + p holds head k of position p of a block: the positions of one head of one block lie
        # together, so that gathering whole blocks gives what a batched product reads, without another copy.
        self._keys = [torch.zeros(0, head_width, dtype=dtype, device=device) for _ in range(layers)]
        self._values = [torch.zeros(0, head_width, dtype=dtype, device=device) for _ in range(layers)]

    def reserve(self, spans: Sequence[Span]) -> tuple[list[Tensor], list[Tensor]]:
        """Keys and values of each layer, [(block * K + head) * P + place, d], with room for all blocks of `spans`."""
        self._grow(1 + max(max(span.blocks) for span in spans))
        return self._keys, self._values

    def attend(self, spans: Sequence[Span]) -> PagedAttention:
        """Attention for a step whose tokens are those of `spans`, one after another."""
        self.reserve(spans)
        device = self._keys[0].device
        tables = torch.zeros(len(spans), max(_blocks(span) for span in spans), dtype=torch.long)
        for row, span in enumerate(spans):
            tables[row, : _blocks(span)] = torch.tensor(span.blocks[: _blocks(span)])
        lengths = torch.tensor([span.end - span.start for span in spans])
        positions_N = torch.cat([torch.arange(span.start, span.end) for span in spans])
        span_N = torch.arange(len(spans)).repeat_interleave(lengths)
        blocks_N = tables[span_N, positions_N // BLOCK_TOKENS]
        heads_K = torch.arange(self._kv_heads)
        rows_NK = (blocks_N[:, None] * self._kv_heads + heads_K) * BLOCK_TOKENS + (positions_N % BLOCK_TOKENS)[:, None]
        firsts = lengths.cumsum(0) - lengths
        groups = [
            self._group([spans[i] for i in members], tables[members], firsts[members], device)
            for members in _alike(spans)
        ]
        return PagedAttention(self._keys, self._values, positions_N.to(device), rows_NK.flatten().to(device), groups)

    def attend_next(self, tables_Bb: Tensor, positions_B: Tensor) -> PagedAttention:
        """Attention for the token at a position of each of some sequences, whose blocks are in `tables_Bb`.

        After `reserve`. All of it is computed on the device, from tensors there. Sequences may be there twice.
        """
        heads_K = torch.arange(self._kv_heads, device=self.device)
        blocks_B1, places_B1 = tables_Bb.gather(1, positions_B[:, None] // BLOCK_TOKENS), positions_B[:, None]
        rows_BK = (blocks_B1 * self._kv_heads + heads_K) * BLOCK_TOKENS + places_B1 % BLOCK_TOKENS
        hidden_BL = torch.arange(tables_Bb.shape[1] * BLOCK_TOKENS, device=self.device) > positions_B[:, None]
        mask_BL = torch.zeros(hidden_BL.shape, dtype=self.dtype, device=self.device)
        group = _Group(
            tokens_BT=torch.arange(len(positions_B), device=self.device)[:, None],
            real=None,
            gather=(tables_Bb[:, None] * self._kv_heads + heads_K[:, None]).flatten(),
            positions_BT=positions_B[:, None],
            mask_BTL=mask_BL.masked_fill_(hidden_BL, -torch.inf)[:, None],
        )
        return PagedAttention(self._keys, self._values, positions_B, rows_BK.flatten(), [group])

    def _group(self, spans: list[Span], tables: Tensor, firsts_B: Tensor, device: torch.device) -> _Group:
        blocks = max(map(_blocks, spans))
        lengths_B = torch.tensor([span.end - span.start for span in spans])
        starts_B = torch.tensor([span.start for span in spans])
        steps_T = torch.arange(int(lengths_B.max()))
        real_BT = steps_T < lengths_B[:, None]
        # What only fills a shorter span up repeats its last token: computed, then left behind.
        offsets_BT = torch.minimum(steps_T, lengths_B[:, None] - 1)
        hidden_BTL = torch.arange(blocks * BLOCK_TOKENS) > (starts_B[:, None] + offsets_BT)[:, :, None]
        mask_BTL = torch.zeros(hidden_BTL.shape, dtype=self._keys[0].dtype).masked_fill_(hidden_BTL, -torch.inf)
        gather_BKb = tables[:, None, :blocks] * self._kv_heads + torch.arange(self._kv_heads)[:, None]
        return _Group(
            tokens_BT=(firsts_B[:, None] + offsets_BT).to(device),
            real=None if bool(real_BT.all()) else real_BT.flatten().nonzero()[:, 0].to(device),
            gather=gather_BKb.flatten().to(device),
            positions_BT=(starts_B[:, None] + offsets_BT).to(device),
            mask_BTL=mask_BTL.to(device),
        )

    def _grow(self, blocks: int) -> None:
        rows = blocks * self._kv_heads * BLOCK_TOKENS
        have = self._values[-1].shape[0]  # the last that grows: where memory ran out in between, the others are larger
        if rows <= have:
            return
        rows = min(max(rows, 2 * have), self.pool.blocks * self._kv_heads * BLOCK_TOKENS)
        self.version += 1
        for stored in (self._keys, self._values):
            for layer, tensor in enumerate(stored):
                # Zeros, not empty: a position past the end is multiplied by a weight of 0, and 0 * NaN is NaN.
                more = max(0, rows - tensor.shape[0])
                stored[layer] = torch.cat([tensor, tensor.new_zeros(more, self._head_width)])


@dataclass(frozen=True, slots=True)
class _Group:
    """Spans of about equal shape, attended together."""

    tokens_BT: Tensor
    """Which tokens of the step they are."""
    real: Tensor | None
    """Which of the B * T are no filling; None: all."""
    gather: Tensor
    """The B * K * blocks rows of [blocks * K, P * d] that hold their keys and values."""
    positions_BT: Tensor
    """Of each token in its sequence."""
    mask_BTL: Tensor
    """0 or -inf, added to the scores."""

    def mask(self, window: int | None) -> Tensor:
        """`mask_BTL`, and what lies before the window hidden too."""
        if window is None or window >= self.mask_BTL.shape[2]:
            return self.mask_BTL
        positions_L = torch.arange(self.mask_BTL.shape[2], device=self.mask_BTL.device)
        return self.mask_BTL.masked_fill(positions_L <= self.positions_BT[:, :, None] - window, -torch.inf)


@dataclass(frozen=True, slots=True)
class PagedAttention:
    """What `Attend` asks, for one step."""

    keys: list[Tensor]
    values: list[Tensor]
    positions_N: Tensor
    rows: Tensor
    groups: list[_Group]

    def __call__(self, layer: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, *, window: int | None = None) -> Tensor:
        """Stores the new keys and values, then attends to all of each sequence so far."""
        heads, width = q_NHd.shape[1:]
        kv_heads = k_NKd.shape[1]
        shared = heads // kv_heads
        keys, values = self.keys[layer], self.values[layer]
        keys.index_copy_(0, self.rows, k_NKd.reshape(-1, width))
        values.index_copy_(0, self.rows, v_NKd.reshape(-1, width))
        q_NHd = q_NHd * width**-0.5
        out_NHd = torch.empty_like(q_NHd)
        for group in self.groups:
            b, t = group.tokens_BT.shape
            tokens = group.tokens_BT.flatten()
            q = q_NHd[tokens].view(b, t, kv_heads, shared, width).permute(0, 2, 3, 1, 4)
            k = keys.view(-1, BLOCK_TOKENS * width)[group.gather].view(b * kv_heads, -1, width)
            v = values.view(-1, BLOCK_TOKENS * width)[group.gather].view(b * kv_heads, -1, width)
            scores = torch.bmm(q.reshape(b * kv_heads, shared * t, width), k.transpose(1, 2))  # [B K, G T, L]
            scores.view(b, kv_heads * shared, t, -1).add_(group.mask(window)[:, None])
            mixed = torch.bmm(scores.softmax(-1), v).view(b, kv_heads, shared, t, width)
            mixed_NHd = mixed.permute(0, 3, 1, 2, 4).reshape(b * t, heads, width)
            if group.real is not None:
                tokens, mixed_NHd = tokens[group.real], mixed_NHd[group.real]
            out_NHd[tokens] = mixed_NHd
        return out_NHd


def _blocks(span: Span) -> int:
    return -(-span.end // BLOCK_TOKENS)


def _alike(spans: Sequence[Span]) -> list[list[int]]:
    """Indices of spans whose lengths, and whose ends, are within a factor of two: filling up stays cheap."""
    groups: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index, span in enumerate(spans):
        groups[(span.end - span.start - 1).bit_length(), (_blocks(span) - 1).bit_length()].append(index)
    return list(groups.values())
