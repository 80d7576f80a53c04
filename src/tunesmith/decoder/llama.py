"""The forward pass of the Llama family: lean, its products stacked, without transformers.

Covers checkpoints of Llama, Mistral, Qwen2 and Qwen3 type. Tokens of all sequences lie one after another; what a token
may attend to is decided by the `attend` that the caller passes in: causal rows in training, a KV cache in the engine.

Legend: N = tokens, D = model width, H = query heads, K = key/value heads, d = head width, F = feed-forward width,
V = vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from tunesmith.adapters.lora import Adapters, Layout, Linear, Site
from tunesmith.decoder.base import Attend
from tunesmith.decoder.mapped import stacked

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True, slots=True)
class RopeStretch:
    """How Llama 3 stretches its rotations beyond the context of its pretraining (`rope_type` "llama3")."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_context_tokens: int

    @classmethod
    def from_json(cls, rope: dict[str, Any]) -> RopeStretch:
        """From the rope section of a `config.json`."""
        return cls(
            factor=rope["factor"],
            low_frequency_factor=rope["low_freq_factor"],
            high_frequency_factor=rope["high_freq_factor"],
            original_context_tokens=rope["original_max_position_embeddings"],
        )

    def __call__(self, frequencies: Tensor) -> Tensor:
        """Slow rotations slowed down by `factor`, fast ones as they are, those between in between.

        Source: `_compute_llama3_parameters` of transformers, after Meta's `apply_scaling`.
        """
        turns = self.original_context_tokens * frequencies / (2 * math.pi)
        span = self.high_frequency_factor - self.low_frequency_factor
        kept = ((turns - self.low_frequency_factor) / span).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / self.factor)


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """The shape of a model, read from the `config.json` of its checkpoint."""

    vocabulary_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    feed_forward_width: int
    context_tokens: int
    rope_theta: float
    norm_epsilon: float
    tied: bool
    """Whether the output projection is the embedding matrix."""
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_stretch: RopeStretch | None = None

    @classmethod
    def from_json(cls, config: dict[str, Any]) -> LlamaConfig:
        """Raises ValueError for a model type or an option that this forward pass does not compute."""
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(f"model_type {kind!r} is not one of {', '.join(MODEL_TYPES)}")
        rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
        stretched = rope.get("rope_type", rope.get("type", "default"))
        if stretched not in ("default", "llama3"):
            raise ValueError(f"rope scaling {rope!r} is not supported")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported, only 'silu'")
        for option in ("attention_bias", "mlp_bias"):
            if config.get(option):  # biases of more products than qkv
                raise ValueError(f"{option} is not supported")
        heads, width = config["num_attention_heads"], config["hidden_size"]
        context = config["max_position_embeddings"]
        if config.get("use_sliding_window", kind == "mistral") and config.get("sliding_window"):
            context = min(context, config["sliding_window"])  # within the window, sliding equals full attention
        return cls(
            vocabulary_size=config["vocab_size"],
            width=width,
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_width=config.get("head_dim") or width // heads,
            feed_forward_width=config["intermediate_size"],
            context_tokens=context,
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
            norm_epsilon=config["rms_norm_eps"],
            tied=config.get("tie_word_embeddings", False),
            qkv_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            rope_stretch=RopeStretch.from_json(rope) if stretched == "llama3" else None,
        )

    @property
    def query_width(self) -> int:
        """H * d."""
        return self.heads * self.head_width

    @property
    def key_width(self) -> int:
        """K * d."""
        return self.kv_heads * self.head_width

    @property
    def layout(self) -> Layout:
        """The linear layers as `Layer` stacks them."""
        heads, keys, width, inner = self.query_width, self.key_width, self.width, self.feed_forward_width
        sites = {
            "qkv": (
                Linear("self_attn.q_proj", heads, width),
                Linear("self_attn.k_proj", keys, width),
                Linear("self_attn.v_proj", keys, width),
            ),
            "o": (Linear("self_attn.o_proj", width, heads),),
            "gate_up": (Linear("mlp.gate_proj", inner, width), Linear("mlp.up_proj", inner, width)),
            "down": (Linear("mlp.down_proj", width, inner),),
        }
        embedding = Linear("model.embed_tokens", outputs=width, inputs=self.vocabulary_size)
        return Layout("model.layers", (sites,) * self.layers, embedding=embedding)


@dataclass(slots=True)
class Layer:
    """The weights of one layer; products that read the same input are stacked along their outputs."""

    attention_norm_D: Tensor
    qkv_parts: Sequence[Tensor]  # [(H + 2K) d, D] in all
    qkv_bias: Tensor | None
    q_norm_d: Tensor | None
    k_norm_d: Tensor | None
    o: Tensor  # [D, H d]
    feed_norm_D: Tensor
    gate_up: Tensor  # [2 F, D]
    down: Tensor  # [D, F]

    @property
    def qkv(self) -> Tensor:
        """[(H + 2K) d, D]. Parts read from a file are stacked when this is first asked for: not all need it."""
        if len(self.qkv_parts) > 1:
            self.qkv_parts = [stacked(self.qkv_parts)]
        return self.qkv_parts[0]


@dataclass(slots=True)
class Llama:
    """The weights of a model and its forward pass."""

    config: LlamaConfig
    embedding_VD: Tensor
    layers: list[Layer]
    norm_D: Tensor
    head_VD: Tensor

    def hidden(
        self, token_ids_N: Tensor, positions_N: Tensor, attend: Attend, adapters: Adapters | None = None
    ) -> Tensor:
        """The normed output of the last layer, [N, D]: `logits` of a row is the prediction of the token after it."""
        config = self.config
        cos_Nd, sin_Nd = rotation(positions_N, config, self.embedding_VD.dtype)
        x_ND = F.embedding(token_ids_N, self.embedding_VD)
        delta_ND = None if adapters is None else adapters.embedding_delta(token_ids_N)
        x_ND = x_ND if delta_ND is None else x_ND + delta_ND
        for index, layer in enumerate(self.layers):
            y_ND = self._norm(x_ND, layer.attention_norm_D)
            qkv = _adapted(y_ND, layer.qkv, layer.qkv_bias, adapters, index, "qkv")
            q, k, v = qkv.split_with_sizes([config.query_width, config.key_width, config.key_width], dim=-1)
            q_NHd = q.unflatten(-1, (config.heads, config.head_width))
            k_NKd = k.unflatten(-1, (config.kv_heads, config.head_width))
            if layer.q_norm_d is not None and layer.k_norm_d is not None:
                q_NHd, k_NKd = self._norm(q_NHd, layer.q_norm_d), self._norm(k_NKd, layer.k_norm_d)
            q_NHd, k_NKd = _rotate(q_NHd, cos_Nd, sin_Nd), _rotate(k_NKd, cos_Nd, sin_Nd)
            v_NKd = v.unflatten(-1, (config.kv_heads, config.head_width))
            a_ND = attend(index, q_NHd, k_NKd, v_NKd).flatten(-2)
            x_ND = x_ND + _adapted(a_ND, layer.o, None, adapters, index, "o")

            y_ND = self._norm(x_ND, layer.feed_norm_D)
            gate_up = _adapted(y_ND, layer.gate_up, None, adapters, index, "gate_up")
            gate_NF, up_NF = gate_up.chunk(2, dim=-1)
            z_NF = F.silu(gate_NF) * up_NF
            x_ND = x_ND + _adapted(z_NF, layer.down, None, adapters, index, "down")
        return self._norm(x_ND, self.norm_D)

    def logits(self, hidden_ND: Tensor, token_ids: Sequence[int] | None = None) -> Tensor:
        """See `Decoder`."""
        return F.linear(hidden_ND, self.head_VD if token_ids is None else self.head_VD[list(token_ids)])

    def parameters(self) -> Iterator[Tensor]:
        """Every weight once, in a fixed order."""
        yield from (tensor for _, tensor in self._stacked())

    def over(self, parameters: Sequence[Tensor]) -> Llama:
        """The same model with other weights, in the order of `parameters`."""
        supply = iter(parameters)
        embedding_VD = next(supply)
        layers = [
            Layer(
                attention_norm_D=next(supply),
                qkv_parts=[next(supply)],
                qkv_bias=None if layer.qkv_bias is None else next(supply),
                q_norm_d=None if layer.q_norm_d is None else next(supply),
                k_norm_d=None if layer.k_norm_d is None else next(supply),
                o=next(supply),
                feed_norm_D=next(supply),
                gate_up=next(supply),
                down=next(supply),
            )
            for layer in self.layers
        ]
        norm_D = next(supply)
        return Llama(self.config, embedding_VD, layers, norm_D, embedding_VD if self.config.tied else next(supply))

    def state(self) -> dict[str, Tensor]:
        """The weights under the names of an ordinary checkpoint, unstacked."""
        config, named = self.config, {}
        for name, tensor in self._stacked():
            prefix, _, site = name.rpartition(".")
            if site in ("qkv", "qkv_bias"):
                sizes = [config.query_width, config.key_width, config.key_width]
                suffix = "bias" if site == "qkv_bias" else "weight"
                for part, rows in zip("qkv", tensor.split_with_sizes(sizes), strict=True):
                    named[f"{prefix}.self_attn.{part}_proj.{suffix}"] = rows
            elif site == "gate_up":
                for part, rows in zip(("gate", "up"), tensor.chunk(2), strict=True):
                    named[f"{prefix}.mlp.{part}_proj.weight"] = rows
            else:
                named[name] = tensor
        return named

    def _stacked(self) -> Iterator[tuple[str, Tensor]]:
        yield "model.embed_tokens.weight", self.embedding_VD
        for index, layer in enumerate(self.layers):
            prefix = f"model.layers.{index}"
            yield f"{prefix}.input_layernorm.weight", layer.attention_norm_D
            yield f"{prefix}.qkv", layer.qkv
            if layer.qkv_bias is not None:
                yield f"{prefix}.qkv_bias", layer.qkv_bias
            if layer.q_norm_d is not None and layer.k_norm_d is not None:
                yield f"{prefix}.self_attn.q_norm.weight", layer.q_norm_d
                yield f"{prefix}.self_attn.k_norm.weight", layer.k_norm_d
            yield f"{prefix}.self_attn.o_proj.weight", layer.o
            yield f"{prefix}.post_attention_layernorm.weight", layer.feed_norm_D
            yield f"{prefix}.gate_up", layer.gate_up
            yield f"{prefix}.mlp.down_proj.weight", layer.down
        yield "model.norm.weight", self.norm_D
        if not self.config.tied:
            yield "lm_head.weight", self.head_VD

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_epsilon)


def from_state(config: LlamaConfig, state: dict[str, Tensor]) -> Llama:
    """A model from weights under checkpoint names. Raises KeyError naming a weight that is missing."""
    layers = []
    for index in range(config.layers):
        prefix = f"model.layers.{index}."
        attention = [state[f"{prefix}self_attn.{part}_proj.weight"] for part in "qkv"]
        biases = [state[f"{prefix}self_attn.{part}_proj.bias"] for part in "qkv"] if config.qkv_bias else None
        layers.append(
            Layer(
                attention_norm_D=state[f"{prefix}input_layernorm.weight"],
                qkv_parts=attention,
                qkv_bias=torch.cat(biases) if biases else None,
                q_norm_d=state[f"{prefix}self_attn.q_norm.weight"] if config.qk_norm else None,
                k_norm_d=state[f"{prefix}self_attn.k_norm.weight"] if config.qk_norm else None,
                o=state[f"{prefix}self_attn.o_proj.weight"],
                feed_norm_D=state[f"{prefix}post_attention_layernorm.weight"],
                gate_up=stacked([state[f"{prefix}mlp.{part}_proj.weight"] for part in ("gate", "up")]),
                down=state[f"{prefix}mlp.down_proj.weight"],
            )
        )
    embedding = state["model.embed_tokens.weight"]
    head = embedding if config.tied else state["lm_head.weight"]
    return Llama(config, embedding, layers, state["model.norm.weight"], head)


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llama:
    """A model from a checkpoint folder: `config.json` and one or more safetensors files.

    Raises ValueError if the checkpoint is of another architecture, FileNotFoundError if it has no safetensors.
    """
    config = LlamaConfig.from_json(json.loads((folder / "config.json").read_text()))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}; pickled weights are never read")
    state: dict[str, Tensor] = {}
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            names = tensors.keys()  # no mapping
            state |= {name: tensors.get_tensor(name).to(device, dtype) for name in names}
    return from_state(config, state)


def _adapted(
    x: Tensor, weight: Tensor, bias: Tensor | None, adapters: Adapters | None, layer: int, site: Site
) -> Tensor:
    product = F.linear(x, weight, bias)
    delta = None if adapters is None else adapters.delta(layer, site, x)
    return product if delta is None else product + delta


def rotation(positions_N: Tensor, config: LlamaConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, [N, 1, d]: both halves of d hold the same angles."""
    steps = torch.arange(0, config.head_width, 2, dtype=torch.float32, device=positions_N.device)
    frequencies = 1.0 / config.rope_theta ** (steps / config.head_width)
    if config.rope_stretch is not None:
        frequencies = config.rope_stretch(frequencies)
    angles = positions_N[:, None].float() * frequencies
    angles_Nd = torch.cat([angles, angles], dim=-1)[:, None, :]
    return angles_Nd.cos().to(dtype), angles_Nd.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
