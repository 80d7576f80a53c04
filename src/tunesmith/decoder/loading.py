"""Which forward pass a checkpoint gets: our own for the Llama family, else that of transformers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tunesmith.decoder import llama
from tunesmith.decoder.base import Decoder


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Decoder:
    """A model from an ordinary checkpoint folder: `config.json` and safetensors.

    Raises ValueError with a reason for a model that cannot be run right, or only with transformers where that is not
    installed; FileNotFoundError without safetensors; KeyError naming a weight that is missing.
    """
    config = json.loads((folder / "config.json").read_text())
    try:
        llama.LlamaConfig.from_json(config)
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
