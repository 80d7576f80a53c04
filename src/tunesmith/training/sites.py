"""The products of one site in a training step, forward and backward: the base's weights and the adapters' on top.

In two ways. `SharedSite` multiplies the tokens of all pieces with the base's weights at once, and each piece with its
own factors, in fp32: best where pieces are small. `SingleSite` has the factors of one job in the dtype of the products:
best where that job brings many tokens.

Legend: N = tokens, I, O = inputs and outputs of a site, R = rank, P = linear layers stacked in a site, K = what a
product adds up over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.training.factors import FactorView, Pair

LONGEST_SUM = 448
"""Products that add up over more are cut. Longer sums of bf16 are cut by the library itself, where depends on how many
rows there are: then a row's result would depend on the rows beside it (docs/design/decisions/together.md)."""


@dataclass(frozen=True, slots=True)
class Part:
    """The tokens of one piece, and the factors and gradients of its job at one site."""

    span: slice
    view: FactorView
    index: int
    """Of the site."""

    @property
    def factors(self) -> Pair:
        """Stacked A [P R, I], stacked B [O, R]."""
        return self.view.factors[self.index]

    @property
    def gradients(self) -> Pair:
        """Laid out as the factors."""
        return self.view.gradients[self.index]


class Site(Protocol):
    """What the layers ask of a site. Products come in the dtype of the weights."""

    def forward(self, x_NI: Tensor, parts: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
        """The outputs [N, O], and what `backward` wants to be given."""

    def backward(self, grad_NO: Tensor, x_NI: Tensor, saved: list[Tensor], parts: Sequence[Part]) -> Tensor:
        """Adds to the gradients of the factors; that of the inputs, [N, I]."""


class BaseWeight:
    """The frozen weights of a site, times the gain of the norm before it, which leaves that to the site."""

    def __init__(
        self, weight: Callable[[], Tensor], gain_I: Tensor | None, dtype: torch.dtype, *, held: bool = True
    ) -> None:
        """`weight` gives them [O, I] in fp32. `held`: they are made once, in `dtype`, not each time they are needed."""
        self._weight, self.gain_I, self.dtype = weight, gain_I, dtype
        self._made = self._make() if held else None

    def __call__(self) -> Tensor:
        """[O, I], in the dtype of the products."""
        return self._make() if self._made is None else self._made

    def _make(self) -> Tensor:
        weight_OI = self._weight()
        return (weight_OI if self.gain_I is None else weight_OI * self.gain_I).to(self.dtype)


@dataclass(frozen=True, slots=True)
class SharedSite:
    """One copy of the weights for all pieces. What is done piece by piece stays in the caches of a processor."""

    base: BaseWeight
    outputs: list[int]

    def forward(self, x_NI: Tensor, parts: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
        """See `Site`; what is kept are the inputs of B, times the scale."""
        y_NO, saved = _product(x_NI, self.base().T), []
        for part in parts:
            a, b_OR = part.factors
            x = self._input(x_NI[part.span])
            h, own = x.new_empty(len(x), len(a)), x.new_empty(len(x), len(b_OR))
            h.addmm_(x, a.T, beta=0, alpha=part.view.scale)
            for y, b, h_NR in self._linears(own, b_OR, h):
                torch.mm(h_NR, b.T, out=y)
            _add(y_NO[part.span], own)
            saved.append(h)
        return y_NO, saved

    def backward(self, grad_NO: Tensor, x_NI: Tensor, saved: list[Tensor], parts: Sequence[Part]) -> Tensor:
        """See `Site`."""
        grad_NI = _product(grad_NO.to(self.base.dtype), self.base())
        for part, h in zip(parts, saved, strict=True):
            (a, b_OR), (of_a, of_b), view = part.factors, part.gradients, part.view
            x, grad, grad_h = self._input(x_NI[part.span]), grad_NO[part.span].float(), torch.empty_like(h)
            linears = zip(self._linears(grad, b_OR, h), self._linears(grad, of_b, grad_h), strict=True)
            for (grad_part, b, h_NR), (_, of_b_part, of_h) in linears:
                of_b_part.addmm_(grad_part.T, h_NR)
                of_h.addmm_(grad_part, b, beta=0, alpha=view.scale)
            of_a.addmm_(grad_h.T, x)
            own = grad_h @ a
            gain_I = self.base.gain_I
            _add(grad_NI[part.span], own if gain_I is None else own.mul_(gain_I))
        return grad_NI

    def _input(self, x_NI: Tensor) -> Tensor:
        """In fp32, times the gain: what the factors multiply."""
        gain_I = self.base.gain_I
        return x_NI.float() if gain_I is None else x_NI.float().mul(gain_I)

    def _linears(self, y_NO: Tensor, b_OR: Tensor, h: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Outputs, B and its inputs of each linear layer."""
        rank = b_OR.shape[1]
        return zip(y_NO.split(self.outputs, 1), b_OR.split(self.outputs), h.split(rank, 1), strict=True)


class SingleSite:
    """The weights and the factors of one job, all in the dtype of the products; `take` before each step.

    Adding the factors to the weights first (folding) would save two of eight products, costs as much once a step, and
    rounds small changes away (docs/design/decisions/training-step.md).
    """

    def __init__(self, shared: SharedSite) -> None:
        self.shared = shared
        self._held: dict[int, Pair] = {}
        """By rank, and always in the same place: a recorded step (`decoder.replays`) finds them there."""
        self._taken: Pair | None = None
        """A [P R, I], times the gain, and B [O, P R], times the scale: each linear layer's in its own rows and columns,
        zeros elsewhere."""

    def take(self, factors: Pair, scale: float) -> None:
        """The factors as they are now."""
        (a, b_OR), base = factors, self.shared.base
        if len(a) not in self._held:
            own = a.new_empty(a.shape, dtype=base.dtype), a.new_zeros(len(b_OR), len(a), dtype=base.dtype)
            self._held[len(a)] = own
        self._taken = own_a, own_b = self._held[len(a)]
        torch.mul(a, 1.0 if base.gain_I is None else base.gain_I, out=own_a)
        for block, b in zip(self._blocks(own_b, b_OR.shape[1]), b_OR.split(self.shared.outputs), strict=True):
            torch.mul(b, scale, out=block)

    def forward(self, x_NI: Tensor, parts: Sequence[Part]) -> tuple[Tensor, list[Tensor]]:
        """See `Site`; what is kept are the inputs of B."""
        assert self._taken is not None
        a, b = self._taken
        y_NO, h = x_NI @ self.shared.base().T, x_NI @ a.T
        return y_NO.addmm_(h, b.T), [h]

    def backward(self, grad_NO: Tensor, x_NI: Tensor, saved: list[Tensor], parts: Sequence[Part]) -> Tensor:
        """See `Site`; there is one part."""
        assert self._taken is not None
        (part,), (h,), (a, b) = parts, saved, self._taken
        (of_a, of_b), scale, base = part.gradients, part.view.scale, self.shared.base
        grad_h, grad_b = grad_NO @ b, grad_NO.T @ h
        rank = of_b.shape[1]
        for block, of_b_part in zip(self._blocks(grad_b, rank), of_b.split(self.shared.outputs), strict=True):
            of_b_part.add_(block, alpha=scale)
        grad_a = grad_h.T @ x_NI
        of_a.add_(grad_a if base.gain_I is None else grad_a * base.gain_I)
        return (grad_NO @ base()).addmm_(grad_h, a)

    def _blocks(self, b: Tensor, rank: int) -> list[Tensor]:
        rows = b.split(self.shared.outputs)
        return [part[:, index * rank : (index + 1) * rank] for index, part in enumerate(rows)]


def product(x_NK: Tensor, weight_KO: Tensor) -> Tensor:
    """In fp32 [N, O], added up in fp32; each row depends on no other, as long as there are 16 or more."""
    y_NO = x_NK.new_zeros(len(x_NK), weight_KO.shape[1], dtype=torch.float32)
    for x, weight in _cut(x_NK, weight_KO):
        y_NO.add_(x @ weight)
    return y_NO


def _product(x_NK: Tensor, weight_KO: Tensor) -> Tensor:
    """The same in the dtype of both."""
    (x, weight), *rest = _cut(x_NK, weight_KO)
    y_NO = x @ weight
    for x, weight in rest:
        y_NO.addmm_(x, weight)
    return y_NO


def _cut(x_NK: Tensor, weight_KO: Tensor) -> list[tuple[Tensor, Tensor]]:
    count = -(-x_NK.shape[1] // LONGEST_SUM)
    size = -(-x_NK.shape[1] // count // 32) * 32
    return list(zip(x_NK.split(size, 1), weight_KO.split(size), strict=True))


def _add(y: Tensor, own: Tensor) -> None:
    """Adds in fp32, whatever the dtype of y; `own` is overwritten."""
    y.copy_(own.add_(y))
