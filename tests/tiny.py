"""A base model small enough to train in tests: random weights, the tokenizer of the box."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tunesmith

VOCABULARY_SIZE = 16_384
CONTEXT_TOKENS = 2_048
TOKENIZER = Path(tunesmith.__file__).parent / "weights" / "tokenizer.json"


def make_tiny_base(folder: Path, *, width: int = 32, layers: int = 2, seed: int = 0, head_width: int = 8) -> Path:
    """Writes an ordinary Llama checkpoint folder of about half a million parameters; returns the folder."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    heads, feed_forward = width // head_width, width * 2
    kv_heads = heads // 2
    folder.mkdir(parents=True, exist_ok=True)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    state = {"model.embed_tokens.weight": matrix(VOCABULARY_SIZE, width), "model.norm.weight": torch.ones(width)}
    for index in range(layers):
        prefix = f"model.layers.{index}."
        state |= {
            prefix + "input_layernorm.weight": torch.ones(width),
            prefix + "self_attn.q_proj.weight": matrix(heads * head_width, width),
            prefix + "self_attn.k_proj.weight": matrix(kv_heads * head_width, width),
            prefix + "self_attn.v_proj.weight": matrix(kv_heads * head_width, width),
            prefix + "self_attn.o_proj.weight": matrix(width, heads * head_width),
            prefix + "post_attention_layernorm.weight": torch.ones(width),
            prefix + "mlp.gate_proj.weight": matrix(feed_forward, width),
            prefix + "mlp.up_proj.weight": matrix(feed_forward, width),
            prefix + "mlp.down_proj.weight": matrix(width, feed_forward),
        }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY_SIZE,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_width,
        "intermediate_size": feed_forward,
        "max_position_embeddings": CONTEXT_TOKENS,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    return folder
