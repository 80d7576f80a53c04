"""An adapter added to the weights of its base: a model that computes the same without it."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from tunesmith.adapters.lora import Lora, LowRank
from tunesmith.decoder.llama import Llama


def merged(model: Llama, lora: Lora) -> Llama:
    """A copy of `model` with `lora` in it. `lora` is for the layout of `model`.

    An adapter of the embedding changes what tokens are read as, not what they are predicted by: a head that was the
    embedding becomes a matrix of its own.
    """
    grown = model.over([parameter.clone() for parameter in model.parameters()])
    for index, layer in enumerate(grown.layers):
        for site, weight_OI in (("qkv", layer.qkv), ("o", layer.o), ("gate_up", layer.gate_up), ("down", layer.down)):
            parts = lora.parts(index, site)
            for rows_OI, part in zip(weight_OI.split([len(part.b_OR) for part in parts]), parts, strict=True):
                rows_OI.add_(_product(part, lora.scale))
    if lora.embedding is None:
        return grown
    head_VD = grown.head_VD.clone()
    grown.embedding_VD.add_(_product(lora.embedding, lora.scale).T)
    return replace(grown, config=replace(grown.config, tied=False), head_VD=head_VD)


def _product(part: LowRank, scale: float) -> Tensor:
    return part.b_OR @ part.a_RI * scale
