"""The four shapes of the family: Llama type, vocabulary 16,384, context 2,048, tied embeddings."""

from __future__ import annotations

from tunesmith.decoder.llama import LlamaConfig

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
