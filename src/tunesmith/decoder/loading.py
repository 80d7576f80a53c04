"""Which forward pass a checkpoint gets: our own for the Llama family, else that of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from tunesmith.decoder import fourbit, kept, llama
from tunesmith.decoder.base import Decoder


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", *, lean: bool = False) -> Decoder:
    """A model from an ordinary checkpoint folder: `config.json` and safetensors.

    With `lean` the matrices of a Llama stay as the file has them and are made dense each time that they are asked for;
    those in 4 bits do so on a device in any case. The numbers are the same.

    Raises ValueError with the reason for one that is not whole, that cannot be run right, or only with transformers
    where that is not installed. Users read the reason: the folder goes by its name, where it lies is not for them.
    """
    try:
        return _load(folder, dtype, device, lean)
    except KeyError as error:
        raise ValueError(f"the weights of {folder.name} lack {error.args[0]}") from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder.name} cannot be read: {error}".replace(str(folder), folder.name)) from error
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), folder.name)) from error


def _load(folder: Path, dtype: torch.dtype, device: str, lean: bool) -> Decoder:
    config = json.loads((folder / "config.json").read_text())
    packed = fourbit.declared(config)
    if config.get("model_type") in llama.MODEL_TYPES and "num_hidden_layers" in config:
        llama.layers_of(config)  # else another forward pass would be tried
    try:
        llama.LlamaConfig.from_json(config)
    except KeyError as error:
        raise ValueError(f"{folder.name}: config.json has no {error.args[0]}") from error
    except ValueError as unknown:
        if packed:
            raise ValueError(f"{unknown}; 4 bits are computed for the Llama family alone") from unknown
        return _load_foreign(folder, dtype, device, reason=unknown)
    if not packed and not lean:
        return llama.load(folder, dtype, device)
    model = kept.load(folder, dtype, device, lean=lean)
    return model if lean or torch.device(device).type != "cpu" else model.over([*model.parameters()])


def _load_foreign(folder: Path, dtype: torch.dtype, device: str, *, reason: ValueError) -> Decoder:
    try:
        from tunesmith.decoder import foreign  # here: transformers is optional, and takes seconds to import
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ValueError(
            f"{folder}: {reason}; other models run through transformers, which is not installed here. "
            "Add it: pip install 'tunesmith[transformers]'"
        ) from error
    return foreign.load(folder, dtype, device)
