"""Which forward pass a checkpoint gets: our own for the Llama family, else that of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError

from tunesmith.decoder import llama
from tunesmith.decoder.base import Decoder


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Decoder:
    """A model from an ordinary checkpoint folder: `config.json` and safetensors.

    Raises ValueError with the reason for one that is not whole, that cannot be run right, or only with transformers
    where that is not installed. Users read the reason: the folder goes by its name, where it lies is not for them.
    """
    try:
        return _load(folder, dtype, device)
    except KeyError as error:
        raise ValueError(f"the weights of {folder.name} lack {error.args[0]}") from error
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder.name} cannot be read: {error}".replace(str(folder), folder.name)) from error
    except ValueError as error:
        raise ValueError(str(error).replace(str(folder), folder.name)) from error


def _load(folder: Path, dtype: torch.dtype, device: str) -> Decoder:
    config = json.loads((folder / "config.json").read_text())
    try:
        llama.LlamaConfig.from_json(config)
    except KeyError as error:
        raise ValueError(f"{folder.name}: config.json has no {error.args[0]}") from error
    except ValueError as unknown:
        return _load_foreign(folder, dtype, device, reason=unknown)
    return llama.load(folder, dtype, device)


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
