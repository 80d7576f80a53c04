"""Low-rank adapters as the forward pass sees them. Knows tensors and sites; nothing of files, training or engines.

Legend: N = tokens, R = rank, I = inputs of a linear layer, O = its outputs, V = vocabulary, D = model width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

EMBEDDING_STEPS = 8.0
"""See `initial`. Source: at rank 16 and alpha 32 it gives B the deviation 1, which is PEFT's."""

Site = str
"""A product in a layer of a model: one linear layer, or several with the same input, stacked along their outputs."""


@dataclass(frozen=True, slots=True)
class Linear:
    """One linear layer."""

    name: str
    """Within its decoder layer, as checkpoints and PEFT call it: `self_attn.q_proj`."""
    outputs: int
    inputs: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Which linear layers of a model an adapter covers, and how they are named and stacked."""

    path: str
    """Where the decoder layers are, as in `model.layers`."""
    layers: tuple[Mapping[Site, tuple[Linear, ...]], ...]
    """The sites of each decoder layer, and their linear layers in stacking order."""
    transposed: bool = False
    """Whether the base keeps these weights as [inputs, outputs]: what PEFT calls `fan_in_fan_out`."""
    embedding: Linear | None = None
    """What turns tokens into vectors, as a linear layer with an input for each token; its name is whole, as in
    `model.embed_tokens`. None where adapters leave it as it is."""

    def linears(self) -> Iterator[tuple[int, Linear]]:
        """Every (layer index, linear layer), in the fixed order in which factors are drawn, listed and saved."""
        for index, sites in enumerate(self.layers):
            for linears in sites.values():
                for linear in linears:
                    yield index, linear

    def targets(self) -> list[str]:
        """What adapters can cover, by the last part of its name, as in `q_proj`; each once, in order."""
        names = [linear.name for _, linear in self.linears()]
        names += [] if self.embedding is None else [self.embedding.name]
        return list(dict.fromkeys(short_name(name) for name in names))


def short_name(name: str) -> str:
    """The last part of the name of a linear layer, by which PEFT finds it: `q_proj` of `self_attn.q_proj`."""
    return name.rpartition(".")[2]


class Adapters(Protocol):
    """What the forward pass asks of adapters, be it one in training or many in one serving batch."""

    def delta(self, layer: int, site: Site, x_NI: Tensor) -> Tensor | None:
        """What the adapters add to the product of `site` for each token, [N, O]; None where they add nothing."""

    def embedding_delta(self, token_ids_N: Tensor) -> Tensor | None:
        """What the adapters add to the embedding of each token, [N, D]; None where they add nothing."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The factors of one linear layer: it adds `scale * x A^T B^T`."""

    a_RI: Tensor
    b_OR: Tensor

    def to(self, device: torch.device) -> LowRank:
        """The same factors there."""
        return LowRank(self.a_RI.to(device), self.b_OR.to(device))


@dataclass(frozen=True, slots=True)
class Lora:
    """One adapter: `factors[layer][name]` for every linear layer of its layout.

    Where it does not cover a linear layer both factors are zero; they stay so in training, as neither has a gradient.
    """

    layout: Layout
    factors: tuple[dict[str, LowRank], ...]
    scale: float
    """alpha / rank"""
    embedding: LowRank | None = None
    """Factors of the embedding, A [R, V] and B [D, R], where the adapter covers it."""

    def to(self, device: torch.device) -> Lora:
        """The same adapter there."""
        factors = tuple({name: part.to(device) for name, part in layer.items()} for layer in self.factors)
        return replace(self, factors=factors, embedding=self.embedding and self.embedding.to(device))

    @property
    def rank(self) -> int:
        """Rows of every A, columns of every B."""
        return next(iter(self.factors[0].values())).a_RI.shape[0]

    def tensors(self) -> Iterator[tuple[int, str, LowRank]]:
        """(layer, name, factors) of every linear layer, in the order of `Layout.linears`."""
        for index, linear in self.layout.linears():
            yield index, linear.name, self.factors[index][linear.name]

    def covered(self) -> list[str]:
        """What it covers, as `Layout.targets` calls it."""
        names = {short_name(name) for _, name, part in self.tensors() if part.a_RI.any() or part.b_OR.any()}
        if self.embedding is not None and self.layout.embedding is not None:
            names.add(short_name(self.layout.embedding.name))
        return [name for name in self.layout.targets() if name in names]

    def parts(self, layer: int, site: Site) -> list[LowRank]:
        """The factors of the linear layers of a site, in stacking order."""
        return [self.factors[layer][linear.name] for linear in self.layout.layers[layer][site]]

    def delta(self, layer: int, site: Site, x_NI: Tensor) -> Tensor | None:
        """See `Adapters`."""
        parts = self.parts(layer, site)
        a_stacked = torch.cat([part.a_RI for part in parts]) if len(parts) > 1 else parts[0].a_RI
        hidden = (x_NI @ a_stacked.T * self.scale).split_with_sizes([part.a_RI.shape[0] for part in parts], dim=-1)
        deltas = [h_NR @ part.b_OR.T for h_NR, part in zip(hidden, parts, strict=True)]
        return torch.cat(deltas, dim=-1) if len(deltas) > 1 else deltas[0]

    def embedding_delta(self, token_ids_N: Tensor) -> Tensor | None:
        """See `Adapters`."""
        if self.embedding is None:
            return None
        return self.embedding.a_RI[:, token_ids_N].T @ self.embedding.b_OR.T * self.scale


def initial(
    layout: Layout, *, rank: int, alpha: float, generator: torch.Generator, targets: Collection[str] | None = None
) -> Lora:
    """An adapter that adds nothing yet: A uniform in +-1/sqrt(I), B zero, fp32; drawn in the order of `Layout.linears`.

    `targets` are names out of `Layout.targets`; None: all of them. Source: PEFT `reset_lora_parameters` (Kaiming
    uniform with a = sqrt(5), as torch.nn.Linear). For an embedding it is A that is zero, and B is normal, with a
    deviation that makes an optimizer's step of size s move an embedding by about EMBEDDING_STEPS * s, whatever the rank
    and alpha.
    """
    chosen = frozenset(layout.targets() if targets is None else targets)
    factors: tuple[dict[str, LowRank], ...] = tuple({} for _ in layout.layers)
    for index, linear in layout.linears():
        a_RI = torch.zeros(rank, linear.inputs)
        if short_name(linear.name) in chosen:
            bound = linear.inputs**-0.5
            a_RI.uniform_(-bound, bound, generator=generator)
        factors[index][linear.name] = LowRank(a_RI, torch.zeros(linear.outputs, rank))
    scale = alpha / rank
    if layout.embedding is None or short_name(layout.embedding.name) not in chosen:
        return Lora(layout, factors, scale)
    a_RV = torch.zeros(rank, layout.embedding.inputs)
    b_DR = torch.empty(layout.embedding.outputs, rank).normal_(generator=generator)
    return Lora(layout, factors, scale, LowRank(a_RV, b_DR * (EMBEDDING_STEPS / (scale * rank**0.5))))
