"""Which forward pass a checkpoint gets, told from its config alone: no torch, and no code of the checkpoint's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

OWN_MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
OWN_ROTATIONS = ("default", "llama3")
"""What `decoder/llama.py` computes; tests hold these and `_is_own` against it."""
OWN_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens")
"""What adapters on those can cover."""
TRIED_TYPES = ("gpt2", "gpt_neox", "opt", "gemma", "gemma3_text", "phi")
"""Types that tests tune and serve through transformers. Any other is tried when it is loaded, and may be refused."""
INSTALL = "pip install 'tunesmith[transformers]'"
INSTALL_FOURBIT = "pip install 'tunesmith[bitsandbytes]'"


class ForwardPass(StrEnum):
    """Who computes a model."""

    OWN = "own"
    TRANSFORMERS = "transformers"
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Architecture:
    """What a config says of the kind of model it is for."""

    model_type: str | None
    forward_pass: ForwardPass
    reason: str | None
    """A sentence, where there is no forward pass."""
    own_code: tuple[str, ...]
    """Python files that the config wants to be run with. They never are."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Who would compute the model of this config, and if nobody, why."""
    kind = config.get("model_type")
    kind = kind if isinstance(kind, str) and kind else None
    code = _own_code(config)
    forward, reason = ForwardPass.NONE, None
    own = kind is not None and _is_own(kind, config)
    capped = next((key for key, value in text_config(config).items() if "softcap" in key and value is not None), None)
    if config.get("quantization_config") and not (own and is_fourbit(config)):
        reason = (
            "the weights are quantised (quantization_config in config.json), and only those of the Llama family in the "
            "4 bits of bitsandbytes are computed here"
        )
    elif config.get("quantization_config") and find_spec("bitsandbytes") is None:
        reason = f"weights in 4 bits need bitsandbytes, which is not installed here. To add it: {INSTALL_FOURBIT}"
    elif capped is not None:
        reason = f"its scores are soft-capped ({capped} in config.json), which nothing here computes"
    elif kind is None:
        reason = "config.json names no model_type, so what kind of model it is cannot be told"
    elif own:
        forward = ForwardPass.OWN
    elif _transformers_has(kind):
        forward = ForwardPass.TRANSFORMERS
    elif code:
        reason = (
            f"a model of type {kind!r} is computed by code that comes with it ({', '.join(code)}), and code of a "
            f"checkpoint is never run here{_more_with_transformers()}"
        )
    else:
        reason = f"no forward pass for model_type {kind!r} is known here{_more_with_transformers()}"
    return Architecture(kind, forward, reason, code)


def is_fourbit(config: Mapping[str, Any]) -> bool:
    """Whether a config says that the matrices are in the 4 bits of bitsandbytes; see `decoder/fourbit.py`."""
    found = config.get("quantization_config")
    return isinstance(found, dict) and found.get("quant_method") == "bitsandbytes" and bool(found.get("load_in_4bit"))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that is about text: a part of its own where a model reads images too."""
    part = config.get("text_config")
    return part if isinstance(part, dict) else config


def _is_own(kind: str, config: Mapping[str, Any]) -> bool:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return (
        kind in OWN_MODEL_TYPES
        and isinstance(rope, dict)
        and rope.get("rope_type", rope.get("type", "default")) in OWN_ROTATIONS
        and config.get("hidden_act", "silu") == "silu"
        and not config.get("attention_bias")
        and not config.get("mlp_bias")
    )


def _own_code(config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("auto_map")
    targets = named.values() if isinstance(named, dict) else ()
    files = {str(target).rpartition("--")[2].partition(".")[0] + ".py" for target in targets if target}
    return tuple(sorted(files))


def _transformers_has(kind: str) -> bool:
    """Whether the transformers that is installed has this model type, told by its files: importing it takes seconds."""
    package = _transformers()
    folder = kind.replace("-", "_")
    return package is not None and folder.isidentifier() and any((package / "models" / folder).glob("modeling_*.py"))


def _transformers() -> Path | None:
    spec = find_spec("transformers")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _more_with_transformers() -> str:
    return "" if _transformers() is not None else f". The package transformers knows more types; to add it: {INSTALL}"
