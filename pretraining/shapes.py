"""The four shapes of the family: Llama type, vocabulary 16,384, context 2,048, tied embeddings; and fresh weights."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.decoder.llama import Layer, Llama, LlamaConfig

VOCABULARY_SIZE = 16_384
CONTEXT_TOKENS = 2_048


def _shape(width: int, layers: int, feed_forward_width: int, kv_heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocabulary_size=VOCABULARY_SIZE,
        width=width,
        layers=layers,
        heads=width // 32,
        kv_heads=kv_heads,
        head_width=32,
        feed_forward_width=feed_forward_width,
        context_tokens=CONTEXT_TOKENS,
        rope_theta=10_000.0,
        norm_epsilon=1e-5,
        tied=True,
    )


SHAPES = {
    "ada": _shape(width=192, layers=6, feed_forward_width=512, kv_heads=2),  # 5.5 M parameters
    "babbage": _shape(width=256, layers=8, feed_forward_width=704, kv_heads=4),  # 10 M
    "curie": _shape(width=384, layers=9, feed_forward_width=1_024, kv_heads=4),  # 20 M
    "davinci": _shape(width=512, layers=12, feed_forward_width=1_408, kv_heads=4),  # 42 M
    "tiny": _shape(width=64, layers=2, feed_forward_width=128, kv_heads=1),  # 1.2 M, for smoke runs
}


def parameters(config: LlamaConfig) -> int:
    """Weights in matrices, the shared embedding counted once; the norms are too few to matter."""
    return config.layers * _layer_weights(config) + config.vocabulary_size * config.width


def flops_per_token(config: LlamaConfig, row_tokens: int) -> float:
    """Arithmetic of one token forward and backward: 6 a weight, and attention over half a row on average."""
    return 6.0 * (parameters(config) + config.layers * config.query_width * row_tokens)


def _layer_weights(config: LlamaConfig) -> int:
    return config.width * (2 * config.query_width + 2 * config.key_width + 3 * config.feed_forward_width)


def to_json(config: LlamaConfig) -> dict[str, object]:
    """The `config.json` of an ordinary Llama checkpoint of this shape."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocabulary_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.feed_forward_width,
        "max_position_embeddings": config.context_tokens,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "torch_dtype": "float32",
    }


def random_llama(config: LlamaConfig, generator: torch.Generator) -> Llama:
    """A model with fresh fp32 weights; the products that write into the residual stream begin at zero."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    layers = [
        Layer(
            attention_norm_D=torch.ones(config.width),
            qkv_parts=[matrix(config.query_width + 2 * config.key_width, config.width)],
            qkv_bias=None,
            q_norm_d=None,
            k_norm_d=None,
            o=torch.zeros(config.width, config.query_width),
            feed_norm_D=torch.ones(config.width),
            gate_up=matrix(2 * config.feed_forward_width, config.width),
            down=torch.zeros(config.width, config.feed_forward_width),
        )
        for _ in range(config.layers)
    ]
    embedding = torch.randn(config.vocabulary_size, config.width, generator=generator) * 0.02
    return Llama(config, embedding, layers, torch.ones(config.width), embedding)
