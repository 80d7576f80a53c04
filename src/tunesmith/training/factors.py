"""The factors in training: one flat tensor, so that clipping, the optimizer and a checkpoint are each one operation.

Computes the same as `adapters.lora.Lora`, in one node of the autograd graph a site instead of eight: a step of a small
model spends much of its time between operations.

Legend: N = tokens, R = rank, P = linear layers stacked in a site, I = inputs, O = stacked outputs, V = vocabulary,
D = model width.
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.adapters import checkpoint
from tunesmith.adapters.lora import Lora, LowRank, Site

Pair = tuple[Tensor, Tensor]
"""A and B."""


class TrainableLora:
    """Factors as one tensor.

    `flat` holds, layer by layer and site by site, the A of a site stacked, then its B; last the embedding's A [V, R],
    a row a token, and its B, if it has any.
    """

    def __init__(self, start: Lora) -> None:
        self._keys = [(layer, site) for layer, sites in enumerate(start.layout.layers) for site in sites]
        parts = [start.parts(*key) for key in self._keys]
        stacks = [[getattr(part, factor) for part in site] for site in parts for factor in ("a_RI", "b_OR")]
        if start.embedding is not None:
            stacks += [[start.embedding.a_RI.T], [start.embedding.b_OR]]
        self._shapes = [torch.Size([sum(map(len, stack)), stack[0].shape[1]]) for stack in stacks]
        self.site_outputs = [[part.b_OR.shape[0] for part in site] for site in parts]
        """The outputs of each linear layer of each site."""
        self.flat = torch.cat([factor.flatten() for stack in stacks for factor in stack])
        self.flat_gradient = torch.zeros_like(self.flat)
        self._views: list[FactorView] = []
        pairs, embedding = self.pairs(self.flat)
        self.lora = Lora(
            start.layout,
            tuple({} for _ in start.factors),
            start.scale,
            None if embedding is None else LowRank(embedding[0].T, embedding[1]),
        )
        """The factors by name, as views of `flat`."""
        for (layer, site), (a, b), rows in zip(self._keys, pairs, self.site_outputs, strict=True):
            linears = start.layout.layers[layer][site]
            for linear, a_RI, b_OR in zip(linears, a.split(start.rank), b.split(rows), strict=True):
                self.lora.factors[layer][linear.name] = LowRank(a_RI, b_OR)

    @property
    def adapters(self) -> Lora:
        """What the forward pass adds to the base."""
        return self.lora

    @property
    def likeness(self) -> Hashable:
        """Equal for factors that differ in their numbers alone."""
        return tuple(self._keys), tuple(self._shapes), self.lora.scale

    def save(self, folder: Path, base_dir: Path) -> None:
        """An adapter in PEFT's format. It names the base, but no path of this machine."""
        lora, rank = self.lora, self.lora.rank
        checkpoint.save(lora, folder, base_name_or_path=base_dir.name, rank=rank, alpha=lora.scale * rank)

    def views(self, count: int) -> list[FactorView]:
        """The same factors with gradients of their own, one for each of `count` threads; the first is `flat_gradient`.

        They are made once.
        """
        while len(self._views) < count:
            gradient = torch.zeros_like(self.flat) if self._views else self.flat_gradient
            self._views.append(FactorView(self._keys, self, gradient))
        return self._views[:count]

    def pairs(self, flat: Tensor) -> tuple[list[Pair], Pair | None]:
        """Stacked A [P R, I] and stacked B [O, R] of each site, and the embedding's two, as views of `flat`."""
        parts = flat.split([shape.numel() for shape in self._shapes])
        views = [part.view(shape) for part, shape in zip(parts, self._shapes, strict=True)]
        pairs = list(zip(views[::2], views[1::2], strict=True))
        sites = len(self._keys)
        return pairs[:sites], pairs[sites] if len(pairs) > sites else None


class FactorView:
    """Factors and gradients of one job for one thread. Implements `Adapters`: autograd then adds to `flat_gradient`."""

    def __init__(self, keys: list[tuple[int, Site]], factors: TrainableLora, flat_gradient: Tensor) -> None:
        """`flat_gradient` is laid out as `TrainableLora.flat`."""
        self.owner = factors
        self.flat_gradient = flat_gradient
        self.factors, self.embedding = factors.pairs(factors.flat)
        self.gradients, self.embedding_gradient = factors.pairs(flat_gradient)
        self.scale = factors.lora.scale
        parts = zip(keys, self.factors, self.gradients, factors.site_outputs, strict=True)
        self._sites = {key: (*_leaves(pair, of_pair), rows) for key, pair, of_pair, rows in parts}
        self._embedding: Pair | None = None
        if self.embedding is not None and self.embedding_gradient is not None:
            self._embedding = _leaves(self.embedding, self.embedding_gradient)

    def begin(self) -> None:
        """Forgets the gradients of the step before."""
        self.flat_gradient.zero_()

    def delta(self, layer: int, site: Site, x_NI: Tensor) -> Tensor:
        """See `Adapters`."""
        a, b, rows = self._sites[layer, site]
        delta_NO: Tensor = _Delta.apply(x_NI, a, b, rows, self.scale)  # type: ignore[no-untyped-call]
        return delta_NO

    def embedding_delta(self, token_ids_N: Tensor) -> Tensor | None:
        """See `Adapters`."""
        if self._embedding is None:
            return None
        a_VR, b_DR = self._embedding
        return F.embedding(token_ids_N, a_VR).mul(self.scale) @ b_DR.T


def _leaves(pair: Pair, gradients: Pair) -> Pair:
    """The same values, each its own in the autograd graph, which adds to `gradients`."""
    a, b = (value.detach().requires_grad_() for value in pair)
    a.grad, b.grad = gradients
    return a, b


class _Delta(torch.autograd.Function):
    """x, stacked A [P R, I], stacked B [O, R] -> `scale * x A_p^T B_p^T` of each part p, side by side, [N, O]."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, a: Tensor, b: Tensor, rows: list[int], scale: float) -> Tensor:
        rank = b.shape[1]
        h = torch.mm(x_NI, a.T).mul_(scale)
        if len(rows) == 1:
            delta_NO = torch.mm(h, b.T)
        else:
            delta_NO = x_NI.new_empty(len(x_NI), len(b))
            parts = zip(h.split(rank, 1), b.split_with_sizes(rows), delta_NO.split_with_sizes(rows, 1), strict=True)
            for h_NR, b_OR, part in parts:
                torch.mm(h_NR, b_OR.T, out=part)
        ctx.save_for_backward(x_NI, a, b, h)
        ctx.rows, ctx.scale = rows, scale
        return delta_NO

    @staticmethod
    def backward(ctx: Any, gradient_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, a, b, h = ctx.saved_tensors
        rank = b.shape[1]
        if len(ctx.rows) == 1:
            gradient_b, gradient_h = torch.mm(gradient_NO.T, h), torch.mm(gradient_NO, b)
        else:
            gradient_b, gradient_h = torch.empty_like(b), torch.empty_like(h)
            for gradient, h_NR, b_OR, of_b, of_h in zip(
                gradient_NO.split_with_sizes(ctx.rows, 1),
                h.split(rank, 1),
                b.split_with_sizes(ctx.rows),
                gradient_b.split_with_sizes(ctx.rows),
                gradient_h.split(rank, 1),
                strict=True,
            ):
                torch.mm(gradient.T, h_NR, out=of_b)
                torch.mm(gradient, b_OR, out=of_h)
        gradient_h.mul_(ctx.scale)
        gradient_x = torch.mm(gradient_h, a) if ctx.needs_input_grad[0] else None
        return gradient_x, torch.mm(gradient_h.T, x_NI), gradient_b, None, None
