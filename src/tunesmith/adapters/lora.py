"""Low-rank adapters as the forward pass sees them. Knows tensors and sites; nothing of files, training or engines.

Legend: N = tokens, R = rank, I = inputs of a linear layer, O = its outputs.
"""

from __future__ import annotations

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

    def delta(self, layer: int, site: Site, x_NI: Tensor) -> Tensor | None:
        """See `Adapters`."""
        parts = [self.factors[layer][name] for name in SITE_LAYERS[site]]
        a_stacked = torch.cat([part.a_RI for part in parts]) if len(parts) > 1 else parts[0].a_RI
        hidden = (x_NI @ a_stacked.T * self.scale).split_with_sizes([part.a_RI.shape[0] for part in parts], dim=-1)
        deltas = [h_NR @ part.b_OR.T for h_NR, part in zip(hidden, parts, strict=True)]
        return torch.cat(deltas, dim=-1) if len(deltas) > 1 else deltas[0]
