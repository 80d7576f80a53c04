"""Tiny random checkpoints of many architectures, made by transformers, with the tokenizer of the box."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Literal

from tests.tiny import TOKENIZER, VOCABULARY_SIZE

CONTEXT_TOKENS = 256
WINDOW = 16

_LLAMA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": CONTEXT_TOKENS,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
_GEMMA = _LLAMA | {"head_dim": 8, "query_pre_attn_scalar": 12}  # scores are not divided by sqrt(head_dim)

OWN: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA},
    "mistral": {"model_type": "mistral", **_LLAMA},
    "qwen2": {"model_type": "qwen2", **_LLAMA},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 8},
}
"""What our own forward pass computes. Name -> config."""
FOREIGN: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 48,
        "n_positions": CONTEXT_TOKENS,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_LLAMA, "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
    "opt": {"model_type": "opt", **_LLAMA, "ffn_dim": 48, "word_embed_proj_dim": 24},
    "gemma": {"model_type": "gemma", **_LLAMA, "head_dim": 8},
    "gemma2": {
        "model_type": "gemma2",
        **_GEMMA,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window": WINDOW,
    },
    "gemma3": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "phi": {"model_type": "phi", **_LLAMA, "partial_rotary_factor": 0.5},  # its head has a bias
    "llama with biases": {"model_type": "llama", **_LLAMA, "attention_bias": True, "mlp_bias": True},
}
"""What runs through transformers. Name -> config."""


Bits = Literal[32, 16, 4]


def fourbit_network(plain: Path, *, nested: bool = False, kind: str = "nf4") -> Any:
    """The checkpoint in `plain` as transformers has it in the 4 bits of bitsandbytes. Its products are fp32."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    asked = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=nested,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return in_plain_products(
        AutoModelForCausalLM.from_pretrained(plain, quantization_config=asked, dtype=torch.float32)
    )


def in_plain_products(network: Any) -> Any:
    """A network of bitsandbytes that multiplies as its compute dtype says on any processor.

    Where the processor multiplies bf16 by vectors it packs weights anew, which fails for rows of less than a block.
    """
    for module in network.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return network


def make_base(folder: Path, config: dict[str, Any], *, seed: int = 0, bits: Bits = 32) -> Path:
    """Writes a checkpoint folder whose every weight, norms and biases included, is random; returns the folder.

    With 16 `bits` they are bf16; with 4 the matrices are packed as bitsandbytes does, by transformers.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    chance = torch.Generator().manual_seed(seed)
    fields = {"vocab_size": VOCABULARY_SIZE, **config}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))
    with torch.no_grad():
        for weight in network.parameters():
            noise = torch.randn(weight.shape, generator=chance)
            weight.copy_(noise * weight.shape[-1] ** -0.5 if weight.ndim > 1 else weight + 0.1 * noise)
    if bits == 4:
        network.save_pretrained(folder / "plain")
        network = fourbit_network(folder / "plain")
        shutil.rmtree(folder / "plain")
    elif bits == 16:
        network = network.to(torch.bfloat16)
    network.save_pretrained(folder)
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    return folder
