"""Adapters on disk, in the file format of PEFT, so that any engine can serve what is trained here.

Knows files and names. Reads safetensors only: a pickled `adapter_model.bin` could run code and is refused.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors_torch
from torch import Tensor

from tunesmith.adapters.lora import Layout, Linear, Lora, LowRank, short_name
from tunesmith.adapters.writing import write_tensors
from tunesmith.rundir import write_json

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

_PLAIN_OPTIONS: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "trainable_token_indices": (None, []),
}
"""Options of PEFT that change what an adapter computes, with the values that leave it as it is here."""

MAX_RANK = 4_096
"""Layers that an adapter leaves alone get zeros of its rank: a larger one from elsewhere could fill the memory."""


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names_modules(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


_NEEDED_OPTIONS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "r": (lambda value: type(value) is int and 0 < value <= MAX_RANK, f"a whole number from 1 to {MAX_RANK}"),
    "lora_alpha": (_is_number, "a number"),
    "target_modules": (_names_modules, "a list of names, or a pattern"),
}


def save(lora: Lora, folder: Path, *, base_name_or_path: str, rank: int, alpha: float) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors` (fp32): equal adapters give equal bytes.

    `base_name_or_path` is for the reader of the file; PEFT looks for the base there when it is given none.
    """
    config = {
        "base_model_name_or_path": base_name_or_path,
        "bias": "none",
        "fan_in_fan_out": lora.layout.transposed,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # some readers want an int
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(lora.covered()),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    named: dict[str, Tensor] = {}
    covered = frozenset(lora.covered())
    for layer, name, factors in lora.tensors():
        if short_name(name) not in covered:
            continue
        for letter, tensor in (("A", factors.a_RI), ("B", factors.b_OR)):
            named[_key(lora.layout, layer, name, letter)] = tensor
    if lora.embedding is not None:
        for letter, tensor in (("A", lora.embedding.a_RI), ("B", lora.embedding.b_OR)):
            named[_embedding_key(lora.layout, letter)] = tensor
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS, named, {"format": "pt"})
    write_json(folder / CONFIG, config)


def load(folder: Path, layout: Layout) -> tuple[Lora, dict[str, Any]]:
    """The adapter in `folder` for a base of that layout, fp32 on the CPU, and its configuration.

    Raises FileNotFoundError without safetensors, and ValueError naming what an adapter here cannot have: a kind other
    than LoRA, an option of `_PLAIN_OPTIONS` or one that is no such thing, a module unknown to the base, a tensor that
    is missing or of the wrong shape, a damaged file. Linear layers that it does not cover get factors of zeros.
    """
    if not (folder / WEIGHTS).is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}; pickled weights are never read")
    config = _config(folder)
    rank, alpha = config["r"], config["lora_alpha"]
    scale = alpha / rank**0.5 if config.get("use_rslora") else alpha / rank
    try:
        state = safetensors_torch.load((folder / WEIGHTS).read_bytes())
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged: {error}") from error

    factors: tuple[dict[str, LowRank], ...] = tuple({} for _ in layout.layers)
    for layer, linear in layout.linears():
        keys = [_key(layout, layer, linear.name, letter) for letter in "AB"]
        if _is_target(config, f"{layout.path}.{layer}.{linear.name}", keys, state):
            factors[layer][linear.name] = _take(folder, state, keys, linear, rank)
        else:
            factors[layer][linear.name] = LowRank(torch.zeros(rank, linear.inputs), torch.zeros(linear.outputs, rank))
    embedding = None
    if layout.embedding is not None:
        keys = [_embedding_key(layout, letter) for letter in "AB"]
        if _is_target(config, layout.embedding.name, keys, state):
            embedding = _take(folder, state, keys, layout.embedding, rank)
    if state:
        raise ValueError(
            f"{folder / WEIGHTS} holds tensors of no module that it covers: {', '.join(sorted(state)[:3])}"
        )
    return Lora(layout, factors, scale, embedding), config


def _is_target(config: dict[str, Any], name: str, keys: Sequence[str], state: Mapping[str, Tensor]) -> bool:
    """Whether the adapter covers a module. Source: PEFT `check_target_module_exists`.

    A pattern is taken at its word that it covers what the file holds: one from elsewhere may take for ever to match.
    """
    targets = config["target_modules"]
    if isinstance(targets, str):
        return any(key in state for key in keys)
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _key(layout: Layout, layer: int, name: str, letter: str) -> str:
    return f"base_model.model.{layout.path}.{layer}.{name}.lora_{letter}.weight"


def _embedding_key(layout: Layout, letter: str) -> str:
    assert layout.embedding is not None
    return f"base_model.model.{layout.embedding.name}.lora_embedding_{letter}"


def _config(folder: Path) -> dict[str, Any]:
    """What `adapter_config.json` says, once every option that matters is known to be one that is computed."""
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG} holds no JSON object but a {type(config).__name__}")
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type {config.get('peft_type')!r} is not supported, only 'LORA'")
    for option, plain in _PLAIN_OPTIONS.items():
        if config.get(option) not in plain:
            raise ValueError(f"{folder / CONFIG}: {option} = {config[option]!r} is not supported, only {plain[0]!r}")
    for option, (holds, rule) in _NEEDED_OPTIONS.items():
        if not holds(config.get(option)):
            raise ValueError(f"{folder / CONFIG}: {option} must be {rule}; it is {config.get(option)!r}")
    return config


def _take(folder: Path, state: dict[str, Tensor], keys: Sequence[str], linear: Linear, rank: int) -> LowRank:
    try:
        a_RI, b_OR = (state.pop(key).float() for key in keys)
    except KeyError as error:
        raise ValueError(
            f"{folder / WEIGHTS} has no {error.args[0]}, which its {CONFIG} says that the adapter covers"
        ) from error
    given, needed = (tuple(a_RI.shape), tuple(b_OR.shape)), ((rank, linear.inputs), (linear.outputs, rank))
    if given != needed:
        raise ValueError(
            f"{folder / WEIGHTS}: {' and '.join(keys)} have the shapes {given}, but rank and base ask for {needed}"
        )
    return LowRank(a_RI, b_OR)
