"""A model whose matrices stay as the file has them, in bf16 or 4 bits, and are made dense where they are needed.

Numbers are those of `llama.load`: bf16 becomes fp32 without loss, whenever that is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    around,
    from_state,
    matrix_names,
    tensors_of,
    without_matrices,
)


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llama:
    """A model of the Llama family that computes in `dtype`. Raises ValueError, KeyError and FileNotFoundError as
    `llama.load`, and ValueError for 4 bits that are none.

    On a device embedding and head stay so too, unless they are wider; on a processor compiled code reads them in fp32.
    Where the file has everything in `dtype` there is nothing to make, and the model is that of `llama.load`.
    """
    described = json.loads((folder / "config.json").read_text())
    config = LlamaConfig.from_json(described)
    packed = fourbit.declared(described)
    tensors = dict(tensors_of(folder))
    if all(tensor.dtype == dtype for tensor in tensors.values()):
        return from_state(config, {name: tensor.to(device) for name, tensor in tensors.items()})
    matrices: Mapping[str, Kept] = fourbit.gather(config, tensors, device) if packed else {}
    kept: list[dict[Site, list[Kept]]] = []
    for index in range(config.layers):
        names = matrix_names(config, index)
        kept.append({site: _parts(names[site], tensors, matrices, device) for site in names})
    on_processor = torch.device(device).type == "cpu"
    rest: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if ".weight." not in name:  # else it belongs to 4 bits
            stays = not on_processor and tensor.dim() > 1 and tensor.dtype.itemsize <= dtype.itemsize
            rest[name] = tensor.to(device, tensor.dtype if stays else dtype)
    layers = [without_matrices(config, rest, index) for index in range(config.layers)]
    return around(config, KeptLayers(layers, kept, dtype), rest)


def _parts(names: list[str], tensors: dict[str, Tensor], matrices: Mapping[str, Kept], device: str) -> list[Kept]:
    """What is kept of a site; no tensor of it is held twice."""
    if any(name in matrices for name in names):
        return [matrices[name] if name in matrices else tensors.pop(name).to(device) for name in names]
    parts = [tensors.pop(name) for name in names]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return [whole.to(device)]
