"""Low-rank adapters as the forward pass sees them. Knows tensors and sites; nothing of files, training or engines.

Legend: N = tokens, R = rank, I = inputs of a linear layer, O = its outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Site = Literal["qkv", "o", "gate_up", "down"]
"""The four products of one layer. `qkv` and `gate_up` are several linear layers stacked along their outputs."""

SITE_LAYERS: dict[Site, tuple[str, ...]] = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""The linear layers of each site by the names that checkpoints and PEFT use, in stacking order."""

LAYER_NAMES: tuple[str, ...] = tuple(name for names in SITE_LAYERS.values() for name in names)
"""Every linear layer of a decoder layer, in the fixed order in which factors are drawn, listed and saved."""


class Adapters(Protocol):
    """What the forward pass asks of adapters, be it one in training or many in one serving batch."""

    def delta(self, layer: int, site: Site, x_NI: Tensor) -> Tensor | None:
        """What the adapters add to the product of `site` for each token, [N, O]; None where they add nothing."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """The factors of one linear layer: it adds `scale * x A^T B^T`."""

    a_RI: Tensor
    b_OR: Tensor


@dataclass(frozen=True, slots=True)
class Lora:
    """One adapter over every linear layer of a model: `factors[layer][name]` with the names of `SITE_LAYERS`."""

    factors: tuple[dict[str, LowRank], ...]
    scale: float
    """alpha / rank"""

    @property
    def rank(self) -> int:
        """Rows of every A, columns of every B."""
        return self.factors[0][LAYER_NAMES[0]].a_RI.shape[0]

    def tensors(self) -> Iterator[tuple[int, str, LowRank]]:
        """(layer, name, factors) of every linear layer, in the fixed order of `LAYER_NAMES` within each layer."""
        for index, layer in enumerate(self.factors):
            for name in LAYER_NAMES:
                yield index, name, layer[name]

    def delta(self, layer: int, site: Site, x_NI: Tensor) -> Tensor | None:
        """See `Adapters`."""
        parts = [self.factors[layer][name] for name in SITE_LAYERS[site]]
        a_stacked = torch.cat([part.a_RI for part in parts]) if len(parts) > 1 else parts[0].a_RI
        hidden = (x_NI @ a_stacked.T * self.scale).split_with_sizes([part.a_RI.shape[0] for part in parts], dim=-1)
        deltas = [h_NR @ part.b_OR.T for h_NR, part in zip(hidden, parts, strict=True)]
        return torch.cat(deltas, dim=-1) if len(deltas) > 1 else deltas[0]


def initial(
    layers: int, shapes: Mapping[str, tuple[int, int]], *, rank: int, alpha: float, generator: torch.Generator
) -> Lora:
    """An adapter that adds nothing yet: A uniform in +-1/sqrt(I), B zero, fp32.

    `shapes` gives (outputs, inputs) of each of `LAYER_NAMES`; factors are drawn in that order, layer by layer.
    Source: PEFT `reset_lora_parameters` (Kaiming uniform with a = sqrt(5), as torch.nn.Linear).
    """

    def drawn(outputs: int, inputs: int) -> LowRank:
        bound = inputs**-0.5
        a_RI = torch.empty(rank, inputs).uniform_(-bound, bound, generator=generator)
        return LowRank(a_RI, torch.zeros(outputs, rank))

    factors = tuple({name: drawn(*shapes[name]) for name in LAYER_NAMES} for _ in range(layers))
    return Lora(factors, alpha / rank)
