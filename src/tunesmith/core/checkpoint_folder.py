"""What is in a checkpoint folder: its config, and the tensors its safetensors files say they hold. Loads no weights.

Everything read here may come from a stranger: sizes are bounded before they are believed, and whatever is wrong is a
ValueError with a sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.core.architectures import text_config

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack", ".joblib", ".npz")
"""Endings of weight files that can run code when they are read, or that nothing here reads."""

MAX_CONFIG_BYTES = 1 << 20
MAX_INDEX_BYTES = 64 << 20
MAX_HEADER_BYTES = 100_000_000
"""The bound of the safetensors library itself."""
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length")
"""How configs call the most positions a model reads, the usual name first."""
LENGTH_DEPENDENT_ROTATIONS = ("longrope", "su")
"""The second is what the first was once called."""

_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16}
_BITS |= {"BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4}
_BITS |= {"F6_E2M3": 6, "F6_E3M2": 6}
_LENGTH_BYTES = 8
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor as the header of its file describes it."""

    dtype: str
    """As safetensors spells it: F32, BF16, ..."""
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)


def read_config(folder: Path) -> dict[str, Any]:
    """The object in `config.json`."""
    return read_object(folder / CONFIG, MAX_CONFIG_BYTES)


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes`."""
    try:
        with path.open("rb") as file:
            content = file.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise ValueError(f"{path.name} is not there") from error
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    if len(content) > max_bytes:
        raise ValueError(f"{path.name} has more than {max_bytes:,} bytes, far more than one ever needs")
    return parse_object(path.name, content)


def parse_object(name: str, content: bytes) -> dict[str, Any]:
    """The JSON object in `content`, with each name once; `name` is for the error."""
    try:
        value = json.loads(content, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # bytes that are no text and numbers beyond all bounds included
        raise ValueError(f"{name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{name} holds no JSON object but a {type(value).__name__}")
    return value


def context_tokens_of(config: Mapping[str, Any]) -> int | None:
    """The most positions the model computes right here, or None where the config does not tell."""
    config = text_config(config)
    found: int | None = next((config[key] for key in CONTEXT_KEYS if isinstance(config.get(key), int)), None)
    if found is not None and (stretched_from := _stretched_from(config)) is not None:
        found = min(found, stretched_from)
    window = config.get("sliding_window")
    slides = config.get("use_sliding_window", config.get("model_type") == "mistral")
    if found is not None and slides and isinstance(window, int):
        return min(found, window)  # within the window, sliding equals full attention
    return found


def _stretched_from(config: Mapping[str, Any]) -> int | None:
    """Where rotations begin to depend on the length of the text: beyond, a batch would hang on its longest sequence."""
    rope = config.get("rope_scaling") or config.get("rope_parameters")
    parts = [rope, *rope.values()] if isinstance(rope, dict) else []
    for part in parts:
        if isinstance(part, dict) and part.get("rope_type", part.get("type")) in LENGTH_DEPENDENT_ROTATIONS:
            kept = part.get("original_max_position_embeddings", config.get("original_max_position_embeddings"))
            return kept if isinstance(kept, int) else None
    return None


def shards_of(folder: Path) -> list[str]:
    """The file names that the index of a sharded checkpoint gives, sorted; empty without an index."""
    if not (folder / INDEX).exists():
        return []
    return indexed_files(read_object(folder / INDEX, MAX_INDEX_BYTES))


def indexed_files(index: Mapping[str, Any]) -> list[str]:
    """The file names in the object of an index, sorted."""
    names = index.get("weight_map")
    if not isinstance(names, dict) or not names:
        raise ValueError(f"{INDEX} has no weight_map that says which file holds each tensor")
    for name in names.values():
        if not isinstance(name, str) or "/" in name or "\\" in name or not name.endswith(".safetensors"):
            raise ValueError(f"{INDEX} names {name!r}, which is no safetensors file directly in the folder")
    return sorted(set(names.values()))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by its header; the header must describe the file to its last byte."""
    try:
        with path.open("rb") as file:
            size_bytes = path.stat().st_size
            header_bytes = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size_bytes < _LENGTH_BYTES:
                raise ValueError(f"{path.name} has {size_bytes} bytes, too few for a safetensors file")
            if header_bytes > MAX_HEADER_BYTES:
                raise ValueError(
                    f"{path.name} claims a header of {header_bytes:,} bytes; safetensors allows {MAX_HEADER_BYTES:,}"
                )
            if header_bytes > size_bytes - _LENGTH_BYTES:
                raise ValueError(
                    f"{path.name} is cut short: its header alone has {header_bytes:,} bytes, the file {size_bytes:,}"
                )
            header = parse_object(f"the header of {path.name}", file.read(header_bytes))
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    header.pop("__metadata__", None)
    if not header:
        raise ValueError(f"{path.name} holds no tensors")
    tensors, spans = {}, []
    for name, described in header.items():
        tensors[name], span = _tensor(path.name, name, described)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"{path.name} has tensors that overlap or leave a gap at byte {min(start, end):,}")
        end = stop
    missing_bytes = end - (size_bytes - _LENGTH_BYTES - header_bytes)
    if missing_bytes > 0:
        raise ValueError(f"{path.name} is cut short: {missing_bytes:,} of {size_bytes + missing_bytes:,} bytes lack")
    if missing_bytes < 0:
        raise ValueError(f"{path.name} has {-missing_bytes:,} bytes after its last tensor")
    return tensors


def sha256_of(path: Path) -> str:
    """The digest of a file, read a piece at a time."""
    digest = hashlib.sha256()
    for chunk in chunks_of(path):
        digest.update(chunk)
    return digest.hexdigest()


def chunks_of(path: Path) -> Iterator[bytes]:
    """The bytes of a file, a megabyte at a time."""
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _tensor(file: str, name: str, described: Any) -> tuple[Tensor, tuple[int, int]]:
    """A tensor, and which bytes of the file's data are its own."""
    shown = name if len(name) <= 80 else name[:77] + "..."
    match described:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(start), int(stop)], **rest} if not rest:
            pass
        case _:
            raise ValueError(f"{file}: the header does not describe tensor {shown!r} by dtype, shape and data_offsets")
    if dtype not in _BITS:
        raise ValueError(f"{file}: tensor {shown!r} has dtype {dtype!r}, which is not known")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"{file}: tensor {shown!r} has shape {shape!r}")
    tensor = Tensor(dtype, tuple(shape))
    if not 0 <= start <= stop or (stop - start) * 8 != tensor.elements * _BITS[dtype]:
        raise ValueError(f"{file}: tensor {shown!r} of {dtype} {shape} cannot have the bytes {start:,} to {stop:,}")
    return tensor, (start, stop)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands there twice")
    return found
