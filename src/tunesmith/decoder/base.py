"""What trainer and engine ask of a model, whatever its architecture. Knows tensors and shapes, no checkpoints.

Legend: N = tokens, D = model width, H = query heads, K = key/value heads, d = head width, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from tunesmith.adapters.lora import Adapters, Layout


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The same there. A GPU is not waited for: from other memory than pinned it would be, until all it has is done."""
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Attend(Protocol):
    """Causal attention over whatever each token's sequence has seen so far."""

    def __call__(self, layer: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, *, window: int | None = None) -> Tensor:
        """The attention output [N, H, d]; positions are already in q and k, scores are q k / sqrt(d).

        With `window`, a token sees itself and the `window - 1` tokens before it. Decoders without one never pass it.
        """


class Shape(Protocol):
    """What an engine must know of a model to keep its keys and values, and a trainer to make factors for it."""

    @property
    def vocabulary_size(self) -> int:
        """V: token ids are below it."""

    @property
    def context_tokens(self) -> int:
        """Positions that are computed right: 0 to this, exclusive."""

    @property
    def kv_heads(self) -> int:
        """K, the same in every layer."""

    @property
    def head_width(self) -> int:
        """d, the same for keys and values."""

    @property
    def layout(self) -> Layout:
        """What adapters cover; it has every decoder layer."""


class Decoder(Protocol):
    """The frozen weights of a model and its forward pass. Threads may share it."""

    @property
    def config(self) -> Shape:
        """Its shape."""

    @property
    def head_VD(self) -> Tensor:
        """What turns `hidden` into logits. A bias may come on top (`logits`), nothing else."""

    def hidden(
        self, token_ids_N: Tensor, positions_N: Tensor, attend: Attend, adapters: Adapters | None = None
    ) -> Tensor:
        """The normed output of the last layer, [N, D]: `logits` of a row is the prediction of the token after it.

        Tokens of all sequences lie one after another; `attend` decides what each may see.
        """

    def logits(self, hidden_ND: Tensor, token_ids: Sequence[int] | None = None) -> Tensor:
        """Unnormalised log-probabilities of the next token, [N, V]; with `token_ids`, of those only, in their order.

        Ask only for the rows you need: V is wide.
        """
