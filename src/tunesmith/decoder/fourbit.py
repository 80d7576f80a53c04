"""Matrices in 4 bits: as bitsandbytes packs them, and as transformers has them in checkpoints (QLoRA's bases).

Each is some tensors beside one another, NAME being that of the weight:

    NAME                                      two numbers a byte, [O I / 2, 1]
    NAME.quant_map                            what the 16 values stand for, as shares of the largest of their block
    NAME.absmax                               the largest of each block of 64: fp32, or 8 bits, of which then
    NAME.nested_absmax, NAME.nested_quant_map say what they stand for
    NAME.quant_state.bitsandbytes__nf4        a JSON object as bytes: shape, size of blocks, dtype of what was packed

What they stand for is the model, wherever it is computed and in whatever precision: trained, measured, served,
exported.

Legend: O, I = outputs and inputs of a matrix.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TYPE = "nf4"
BLOCK = 64
"""Numbers that share a largest one, in what is packed here."""
_STATES = {"bitsandbytes__nf4": "nf4", "bitsandbytes__fp4": "fp4"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_MOST_STATE_BYTES = 4096


def declared(config: Mapping[str, Any]) -> bool:
    """Whether the `config.json` of a checkpoint says that its matrices are so.

    Raises ValueError for any other quantisation.
    """
    found = config.get("quantization_config")
    if not found:
        return False
    if not isinstance(found, dict) or found.get("quant_method") != "bitsandbytes" or not found.get("load_in_4bit"):
        method = found.get("quant_method") if isinstance(found, dict) else found
        raise ValueError(
            f"the weights are quantised ({method!r}), and only the 4 bits of bitsandbytes are computed here"
        )
    return True


def declaration(dtype: torch.dtype) -> dict[str, Any]:
    """What `config.json` says in `quantization_config`, for transformers too; `dtype` is what was packed."""
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": TYPE,
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": str(dtype).removeprefix("torch."),
    }


class FourBit:
    """A matrix in 4 bits (implements `llama.Kept`)."""

    def __init__(self, codes: Tensor, state: Any) -> None:
        """`state`: bitsandbytes' `QuantState`."""
        self._codes, self._state = codes, state

    def to(self, dtype: torch.dtype, /) -> Tensor:
        """[O, I], in the dtype of what was packed first: all other dtypes are made of that."""
        dense_OI: Tensor = _library().dequantize_4bit(self._codes, self._state)
        return dense_OI.to(dtype)


def pack(name: str, weight_OI: Tensor) -> dict[str, Tensor]:
    """The tensors that stand for a matrix in a checkpoint, by name."""
    codes, state = _library().quantize_4bit(weight_OI, blocksize=BLOCK, quant_type=TYPE)
    parts = state.as_dict(packed=True)
    return {name: codes} | {f"{name}.{part}": tensor.clone() for part, tensor in parts.items()}  # some are shared


def is_packed(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the matrix of this name is in 4 bits."""
    return any(f"{name}.quant_state.{kind}" in tensors for kind in _STATES)


def take(name: str, shape: tuple[int, int], tensors: dict[str, Tensor], device: str) -> FourBit:
    """A matrix in 4 bits out of the tensors of a checkpoint, on `device`.

    The checkpoint may be a stranger's: nothing is handed on that does not fit together. Raises ValueError.
    """

    def hold(condition: bool, rule: str) -> None:
        if not condition:
            raise ValueError(f"{name} is no matrix of 4 bits and shape {list(shape)}: {rule}")

    codes, kinds = tensors.pop(name), [kind for kind in _STATES if f"{name}.quant_state.{kind}" in tensors]
    hold(len(kinds) == 1, "it has two quant_states")
    described, kind = _object(tensors.pop(f"{name}.quant_state.{kinds[0]}")), _STATES[kinds[0]]
    parts = {part: tensors.pop(f"{name}.{part}") for part in _PARTS if f"{name}.{part}" in tensors}

    def whole(key: str) -> int:
        value = described.get(key)
        hold(type(value) is int and value in _BLOCKS, f"its quant_state has the {key} {value!r}")
        return int(described[key])

    hold(bool(described), "its quant_state is no JSON object")
    hold(described.get("quant_type") == kind, f"its quant_state is of {described.get('quant_type')!r}")
    hold(described.get("shape") == list(shape), f"its quant_state has the shape {described.get('shape')!r}")
    dtype = _DTYPES.get(str(described.get("dtype")))
    hold(dtype is not None, f"its quant_state has the dtype {described.get('dtype')!r}")
    numbers, block, nested = shape[0] * shape[1], whole("blocksize"), "nested_absmax" in parts
    blocks = -(-numbers // block)
    expected = {"absmax": (blocks, torch.uint8 if nested else torch.float32), "quant_map": (16, torch.float32)}
    if nested:
        expected["nested_absmax"] = (-(-blocks // whole("nested_blocksize")), torch.float32)
        expected["nested_quant_map"] = (256, torch.float32)
        made_of, offset = described.get("nested_dtype"), described.get("nested_offset", "")
        hold(made_of == "float32", f"its quant_state has the nested_dtype {made_of!r}")
        real = type(offset) in (int, float) and abs(offset) <= torch.finfo(torch.float32).max
        hold(real, f"its quant_state has the nested_offset {offset!r}")
    hold(parts.keys() == expected.keys(), f"it comes with {', '.join(sorted(parts)) or 'nothing'}")
    for part, (elements, of) in ({"its bytes": (-(-numbers // 2), torch.uint8)} | expected).items():
        has = codes if part == "its bytes" else parts[part]
        hold(has.numel() == elements and has.dtype == of, f"{part} are {has.numel()} numbers of {has.dtype}")
    library = _library()
    known = library.get_4bit_type(kind, device="cpu")
    hold(torch.equal(parts["quant_map"].flatten(), known.flatten()), f"its quant_map is not that of {kind}")

    parts = {part: tensor.flatten().to(device) for part, tensor in parts.items()}
    largest = None
    if nested:
        largest = library.QuantState(
            absmax=parts["nested_absmax"],
            code=parts["nested_quant_map"],
            blocksize=described["nested_blocksize"],
            dtype=torch.float32,
        )
    state = library.QuantState(
        absmax=parts["absmax"],
        shape=torch.Size(shape),
        code=parts["quant_map"],
        blocksize=block,
        quant_type=kind,
        dtype=dtype,
        offset=torch.tensor(float(described["nested_offset"])).to(device) if nested else None,
        state2=largest,
    )
    return FourBit(codes.reshape(-1, 1).to(device), state)


def _object(content: Tensor) -> dict[str, Any]:
    """Empty where there is none."""
    if content.dtype != torch.uint8 or content.numel() > _MOST_STATE_BYTES:
        return {}
    try:
        value = json.loads(bytes(content.flatten().tolist()))
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _library() -> Any:
    try:  # here: it is optional, and takes seconds to import
        from bitsandbytes import functional
    except ModuleNotFoundError as error:
        if error.name != "bitsandbytes":
            raise
        raise ValueError(
            "weights in 4 bits need bitsandbytes, which is not installed here. Add it: "
            "pip install 'tunesmith[bitsandbytes]'"
        ) from error
    return functional
