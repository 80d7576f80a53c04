"""The models in the box: how their weights are packed in the wheel and unpacked on first use. Numpy only, no torch.

Every matrix is held as int8 with one fp32 scale a row, about a quarter of its fp32 size; vectors stay fp32. Packed
models that lie beside each other share one tokenizer, which lies beside them. Unpacked, a model is an ordinary
checkpoint folder (config.json, tokenizer.json, model.safetensors in fp32) that any tool reads.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from tunesmith.rundir import sync_folder

BOX = Path(__file__).parents[1] / "weights"
CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
PACKED = "model.int8.safetensors"
SCALE_SUFFIX = ".row_scale"


def pack(checkpoint: Path, packed: Path) -> None:
    """Writes the box form of an fp32 checkpoint folder to the folder `packed`, and its tokenizer beside it.

    Raises ValueError if the tokenizer beside it is another one.
    """
    packed.mkdir(parents=True, exist_ok=True)
    tokenizer, shared = (checkpoint / TOKENIZER).read_bytes(), packed.parent / TOKENIZER
    if shared.exists() and shared.read_bytes() != tokenizer:
        raise ValueError(f"{checkpoint / TOKENIZER} is not {shared}: models in one box share their tokenizer")
    shared.write_bytes(tokenizer)
    shutil.copyfile(checkpoint / CONFIG, packed / CONFIG)
    tensors: dict[str, NDArray[Any]] = {}
    for name, tensor in sorted(load_file(checkpoint / "model.safetensors").items()):
        if tensor.ndim == 1:
            tensors[name] = tensor.astype(np.float32)
            continue
        scale = np.maximum(np.abs(tensor).max(axis=1, keepdims=True) / 127, np.float32(1e-12)).astype(np.float32)
        tensors[name] = np.rint(tensor / scale).astype(np.int8)
        tensors[name + SCALE_SUFFIX] = scale
    save_file(tensors, packed / PACKED)


def unpack(packed: Path, home: Path) -> Path:
    """The checkpoint folder of a packed model under `<home>/bases/`, made if it is not there yet.

    Its name carries the digest of the packed files, so a new release never meets an old folder. Two processes may
    unpack at once: each writes beside, the first rename wins.
    """
    sources = {packed / CONFIG: CONFIG, packed.parent / TOKENIZER: TOKENIZER}
    files = [(path, path.stat()) for path in (*sources, packed / PACKED)]
    digest = _digest(tuple((path, status.st_mtime_ns, status.st_size) for path, status in files))
    folder = home / "bases" / f"{packed.name}-{digest}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=folder.parent))
    try:
        for path, name in sources.items():
            shutil.copyfile(path, beside / name)
        save_file(_dequantize(load_file(packed / PACKED)), beside / "model.safetensors", metadata={"format": "pt"})
        sync_folder(beside)
        try:
            beside.rename(folder)
        except OSError:
            if not folder.exists():
                raise
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


@cache
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Of the files' bytes, read once as long as they stay as they are: every request asks where its model is."""
    return hashlib.sha256(b"".join(path.read_bytes() for path, _, _ in files)).hexdigest()[:12]


def _dequantize(tensors: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    plain: dict[str, NDArray[Any]] = {}
    for name, tensor in tensors.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        scale = tensors.get(name + SCALE_SUFFIX)
        plain[name] = tensor if scale is None else tensor.astype(np.float32) * scale
    return plain
