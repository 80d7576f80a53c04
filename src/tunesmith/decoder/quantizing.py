"""A checkpoint with its matrices in 4 bits, of one that has them plain: a file at a time, so that any size goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tunesmith.decoder import fourbit
from tunesmith.decoder.llama import LlamaConfig, matrix_names
from tunesmith.decoder.saving import TOKENIZER_FILES
from tunesmith.rundir import CHECKPOINT_CONFIG, write_bytes, write_json

INDEX = "model.safetensors.index.json"
COPIED = (*TOKENIZER_FILES, "generation_config.json")
PLAIN = (torch.float32, torch.bfloat16, torch.float16)


def quantize(base_dir: Path, out: Path, told: Callable[[str, int, int], None]) -> None:
    """Writes `out`, a new folder. `told` hears of each file of weights: its name, bytes before and after.

    Embedding, head and norms stay as they are. Raises ValueError for a base that has no matrices to be packed, OSError.
    """
    described = json.loads((base_dir / CHECKPOINT_CONFIG).read_text())
    if fourbit.declared(described):
        raise ValueError("its weights are in 4 bits already")
    try:
        config = LlamaConfig.from_json(described)
    except ValueError as error:
        raise ValueError(f"{error}; 4 bits are for the Llama family alone") from error
    layers = range(config.layers)
    matrices = {name for index in layers for names in matrix_names(config, index).values() for name in names}
    out.mkdir(parents=True)
    file_of: dict[str, str] = {}
    dtype = torch.float32
    for path in sorted(base_dir.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        with safe_open(path, framework="pt") as opened:
            names = opened.keys()  # no mapping
            for name in names:
                weight = opened.get_tensor(name)
                if name not in matrices:
                    tensors[name] = weight
                    continue
                if weight.dtype not in PLAIN:
                    raise ValueError(f"{name} is stored as {weight.dtype}")
                dtype = weight.dtype
                tensors |= fourbit.pack(name, weight)
        write_bytes(out / path.name, save(tensors, {"format": "pt"}))
        told(path.name, path.stat().st_size, (out / path.name).stat().st_size)
        file_of |= dict.fromkeys(tensors, path.name)
    if missing := sorted(matrices - file_of.keys()):
        raise ValueError(f"its weights lack {missing[0]}")
    if len(set(file_of.values())) > 1:
        write_json(out / INDEX, {"metadata": {}, "weight_map": file_of})
    for name in COPIED:
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, out / name)
    # Last, as a folder with a config is taken for a checkpoint.
    write_json(out / CHECKPOINT_CONFIG, described | {"quantization_config": fourbit.declaration(dtype)})
