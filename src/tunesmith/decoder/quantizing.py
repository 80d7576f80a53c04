"""A checkpoint with its matrices in 4 bits, of one that has them plain: a file at a time, so that any size goes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from tunesmith.decoder import fourbit
from tunesmith.decoder.llama import LlamaConfig, from_state, matrix_names
from tunesmith.decoder.saving import TOKENIZER_FILES, WEIGHTS
from tunesmith.rundir import CHECKPOINT_CONFIG, write_bytes, write_json

INDEX = "model.safetensors.index.json"
COPIED = (*TOKENIZER_FILES, "generation_config.json")
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Of weights that can be packed, as safetensors spells them."""


def quantize(base_dir: Path, out: Path, told: Callable[[str, int, int], None]) -> None:
    """Writes `out`, a new folder. `told` hears of each file of weights: its name, bytes before and after.

    Embedding, head and norms stay as they are. Raises ValueError for a base that cannot be read, or has no such
    matrices; OSError where `out` cannot be written.
    """
    described, config = _described(base_dir)
    matrices = {name for sites in matrix_names(config) for named in sites.values() for name, _ in named}
    _hold_whole(base_dir, config)
    out.mkdir(parents=True)
    files, file_of = sorted(base_dir.glob("*.safetensors")), dict[str, str]()
    dtypes = set[torch.dtype]()
    for number, path in enumerate(files, start=1):
        name = WEIGHTS if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        tensors = _packed(path, matrices, dtypes)
        write_bytes(out / name, save(tensors, {"format": "pt"}))
        told(path.name, path.stat().st_size, (out / name).stat().st_size)
        file_of |= dict.fromkeys(tensors, name)
    if len(files) > 1:
        write_json(out / INDEX, {"metadata": {}, "weight_map": file_of})
    for name in COPIED:
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, out / name)
    # Last, as a folder with a config is taken for a checkpoint.
    declaration = fourbit.declaration(max(dtypes, key=str))  # float32 where there are several
    write_json(out / CHECKPOINT_CONFIG, described | {"quantization_config": declaration})


def _described(base_dir: Path) -> tuple[dict[str, object], LlamaConfig]:
    """The `config.json` of the base, and what it says."""
    try:
        described = json.loads((base_dir / CHECKPOINT_CONFIG).read_text())
        if not isinstance(described, dict):
            raise ValueError(f"{CHECKPOINT_CONFIG} holds no JSON object")
        if fourbit.declared(described):
            raise ValueError("its weights are in 4 bits already")
        config = LlamaConfig.from_json(described)
    except KeyError as error:
        raise ValueError(f"{CHECKPOINT_CONFIG} has no {error.args[0]}") from error
    except OSError as error:
        raise ValueError(f"{CHECKPOINT_CONFIG} cannot be read: {error.strerror}") from error
    return described, config


def _hold_whole(base_dir: Path, config: LlamaConfig) -> None:
    """Raises ValueError where a weight is missing, or is of another shape than the config says. Reads no weights."""
    state: dict[str, Tensor] = {}
    for path in base_dir.glob("*.safetensors"):
        try:
            with safe_open(path, framework="pt") as opened:
                names = opened.keys()  # no mapping
                for name in names:
                    header = opened.get_slice(name)
                    dtype = DTYPES.get(header.get_dtype(), torch.uint8)
                    state[name] = torch.empty(header.get_shape(), dtype=dtype, device="meta")
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path.name} cannot be read: {error}") from error
    try:
        from_state(config, state)
    except KeyError as error:
        raise ValueError(f"its weights lack {error.args[0]}") from error


def _packed(path: Path, matrices: Collection[str], dtypes: set[torch.dtype]) -> dict[str, Tensor]:
    """The tensors of a file of the new checkpoint, of those of one of the old; `dtypes` learns what was packed."""
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as opened:
            names = opened.keys()  # no mapping
            for name in names:
                weight = opened.get_tensor(name)
                if name not in matrices:
                    tensors[name] = weight
                    continue
                if not bool(torch.isfinite(weight).all()):
                    raise ValueError(f"{name} has numbers that are not finite, which 4 bits do not have")
                dtypes.add(weight.dtype)
                tensors |= fourbit.pack(name, weight)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    return tensors
