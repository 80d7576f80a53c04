"""A model as an ordinary checkpoint folder, which any engine can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tunesmith.adapters.writing import write_tensors
from tunesmith.decoder.llama import Llama
from tunesmith.rundir import CHECKPOINT_CONFIG, write_json

WEIGHTS = "model.safetensors"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "chat_template.jinja",
)


def save_checkpoint(model: Llama, folder: Path, base_dir: Path) -> None:
    """Writes `model`, whose config and tokenizer are those of `base_dir`, in fp32: equal models give equal bytes."""
    config = json.loads((base_dir / CHECKPOINT_CONFIG).read_text())
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, model.state(), {"format": "pt"})
    for name in TOKENIZER_FILES:
        if (base_dir / name).is_file():
            shutil.copyfile(base_dir / name, folder / name)
    # Last, as a folder with a config is taken for a checkpoint.
    config.pop("quantization_config", None)  # what is written is in fp32, whatever the base was
    changed = {"tie_word_embeddings": model.config.tied, "torch_dtype": "float32", "dtype": "float32"}
    write_json(folder / CHECKPOINT_CONFIG, config | changed)
