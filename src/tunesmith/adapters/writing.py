"""Tensors into a safetensors file straight from where they lie. Knows the format, not what they are.

The library's `save` holds all of them a second time as bytes, and its `save_file` does not tell a full disk from other
errors, nor syncs. Source of the format: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.rundir import write_parts

_ALIGNMENT = 8
"""Of the first tensor, in bytes."""
_FP32_BYTES = 4


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """All of them as fp32: the bytes that `safetensors.torch.save` gives.

    Durable and whole when it returns (`rundir.write_parts`). A tensor that is not fp32, on the CPU and in one piece is
    copied while it is written. Raises OSError.
    """
    names = sorted(tensors)
    header: dict[str, object] = {} if metadata is None else {"__metadata__": dict(metadata)}
    end = 0
    for name in names:
        begin, end = end, end + _FP32_BYTES * tensors[name].numel()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [begin, end]}
    head = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    head += b" " * (-len(head) % _ALIGNMENT)

    def parts() -> Iterator[bytes | memoryview]:
        yield len(head).to_bytes(8, "little")
        yield head
        for name in names:
            yield tensors[name].detach().to("cpu", torch.float32).contiguous().flatten().view(torch.uint8).numpy().data

    write_parts(path, parts())
