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

from tunesmith.decoder.llama import LlamaConfig, matrix_names

TYPE = "nf4"
BLOCK = 64
"""Numbers that share a largest one, in what is packed here."""
_STATES = {"bitsandbytes__nf4": "nf4", "bitsandbytes__fp4": "fp4"}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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


def gather(config: LlamaConfig, tensors: Mapping[str, Tensor], device: str) -> dict[str, FourBit]:
    """The matrices among the tensors of a checkpoint that are in 4 bits, by name, on `device`.

    The checkpoint may be a stranger's: nothing is handed on that does not fit together. Raises ValueError.
    """
    found: dict[str, FourBit] = {}
    for index in range(config.layers):
        sites = config.layout.layers[index]
        for site, names in matrix_names(config, index).items():
            for name, linear in zip(names, sites[site], strict=True):
                if name in tensors and tensors[name].dtype == torch.uint8:
                    prefix = f"{name}."
                    parts = {key.removeprefix(prefix): tensors[key] for key in tensors if key.startswith(prefix)}
                    found[name] = _read(name, tensors[name], parts, (linear.outputs, linear.inputs), device)
    return found


def _read(name: str, codes: Tensor, parts: dict[str, Tensor], shape: tuple[int, int], device: str) -> FourBit:
    def hold(condition: bool, rule: str) -> None:
        if not condition:
            raise ValueError(f"{name} is no matrix of 4 bits and shape {list(shape)}: {rule}")

    kinds = [key for key in parts if key.startswith("quant_state.")]
    hold(len(kinds) == 1 and kinds[0].removeprefix("quant_state.") in _STATES, "it has no quant_state of nf4 or fp4")
    kind = _STATES[kinds[0].removeprefix("quant_state.")]
    state = _object(parts[kinds[0]])
    hold(state is not None, "its quant_state is no JSON object")
    assert state is not None
    numbers, block = shape[0] * shape[1], state.get("blocksize")
    hold(state.get("quant_type") == kind, f"its quant_state is of {state.get('quant_type')!r}")
    hold(state.get("shape") == list(shape), f"its quant_state has the shape {state.get('shape')!r}")
    hold(state.get("dtype") in _DTYPES, f"its quant_state has the dtype {state.get('dtype')!r}")
    hold(block in _BLOCKS, f"its quant_state has the blocksize {block!r}")
    assert isinstance(block, int)
    hold(codes.numel() == -(-numbers // 2), f"it has {codes.numel()} bytes")
    expected = {kinds[0]: (parts[kinds[0]].numel(), torch.uint8), "quant_map": (16, torch.float32)}
    blocks = -(-numbers // block)
    if "nested_absmax" in parts:
        nested = state.get("nested_blocksize")
        hold(nested in _BLOCKS, f"its quant_state has the nested_blocksize {nested!r}")
        assert isinstance(nested, int)
        made_of = state.get("nested_dtype")
        hold(made_of == "float32", f"its quant_state has the nested_dtype {made_of!r}")
        hold(isinstance(state.get("nested_offset"), float), "its quant_state has no nested_offset")
        expected["absmax"] = (blocks, torch.uint8)
        expected["nested_absmax"] = (-(-blocks // nested), torch.float32)
        expected["nested_quant_map"] = (256, torch.float32)
    else:
        expected["absmax"] = (blocks, torch.float32)
    hold(parts.keys() == expected.keys(), f"it comes with {', '.join(sorted(parts))}")
    for part, (elements, dtype) in expected.items():
        has = parts[part]
        hold(has.numel() == elements and has.dtype == dtype, f"{part} has {has.numel()} numbers of {has.dtype}")
    code = parts["quant_map"]
    known = _library().get_4bit_type(kind, device="cpu")
    hold(torch.equal(code.flatten(), known.flatten()), f"its quant_map is not that of {kind}")
    there = torch.device(device)
    return FourBit(codes.reshape(-1, 1).to(there), _library().QuantState.from_dict(dict(parts), there))


def _object(content: Tensor) -> dict[str, Any] | None:
    if content.dtype != torch.uint8 or content.numel() > _MOST_STATE_BYTES:
        return None
    try:
        value = json.loads(bytes(content.flatten().tolist()))
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


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
