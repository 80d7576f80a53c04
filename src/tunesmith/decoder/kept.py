"""A model whose matrices stay as the file has them, in bf16 or 4 bits, and are made dense where they are needed.

Numbers are those of `llama.load`: bf16 becomes fp32 without loss, whenever that is done.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.adapters.lora import Site
from tunesmith.decoder import fourbit
from tunesmith.decoder.llama import (
    Kept,
    KeptLayers,
    Llama,
    LlamaConfig,
    assembled,
    checked_shape,
    from_state,
    matrix_names,
    tensors_of,
    without_matrices,
)

Named = tuple[str, tuple[int, int]]
"""A matrix and its shape."""


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", *, lean: bool = False) -> Llama:
    """A model of the Llama family that computes in `dtype`. Raises what `llama.load` raises, and ValueError for 4 bits
    that are none.

    With `lean` all matrices stay as they are, embedding and head too unless they are wider; without it those alone that
    are in 4 bits. Where there is nothing to make of a file, the model is that of `llama.load`.
    """
    described = json.loads((folder / "config.json").read_text())
    config = LlamaConfig.from_json(described)
    packed = fourbit.declared(described)
    tensors = dict(tensors_of(folder))
    if not packed and all(tensor.dtype == dtype for tensor in tensors.values()):
        return from_state(config, {name: tensor.to(device) for name, tensor in tensors.items()})

    def parts(names: list[Named]) -> list[Kept]:
        """No tensor of them is held twice."""
        if packed and any(fourbit.is_packed(name, tensors) for name, _ in names):
            return [_part(name, shape, tensors, device, None if lean else dtype) for name, shape in names]
        plain = [checked_shape(shape, name, tensors.pop(name)) for name, shape in names]
        whole = plain[0] if len(plain) == 1 else torch.cat(plain)
        return [whole.to(device) if lean else whole.to(device, dtype)]

    kept: list[dict[Site, list[Kept]]] = []
    for sites in matrix_names(config):
        kept.append({site: parts(names) for site, names in sites.items()})
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        stays = lean and tensor.dim() > 1 and tensor.dtype.itemsize <= dtype.itemsize
        rest[name] = tensor.to(device, tensor.dtype if stays or not tensor.is_floating_point() else dtype)
    layers = [without_matrices(config, rest, index) for index in range(config.layers)]
    return assembled(config, KeptLayers(layers, kept, dtype), rest)


def _part(
    name: str, shape: tuple[int, int], tensors: dict[str, Tensor], device: str, dtype: torch.dtype | None
) -> Kept:
    if fourbit.is_packed(name, tensors):
        return fourbit.take(name, shape, tensors, device)
    plain = checked_shape(shape, name, tensors.pop(name))
    return plain.to(device, dtype or plain.dtype)
