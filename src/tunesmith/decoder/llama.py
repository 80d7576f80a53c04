"""The forward pass of the Llama family: lean, its products stacked, without transformers.

Covers checkpoints of Llama, Mistral, Qwen2 and Qwen3 type. Tokens of all sequences lie one after another; what a token
may attend to is decided by the `attend` that the caller passes in: causal rows in training, a KV cache in the engine.

Legend: N = tokens, D = model width, H = query heads, K = key/value heads, d = head width, F = feed-forward width,
V = vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, overload

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from tunesmith.adapters.lora import Adapters, Layout, Linear, Site
from tunesmith.decoder.base import Attend
from tunesmith.decoder.mapped import stacked

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
MOST_LAYERS = 10_000


def layers_of(config: dict[str, Any]) -> int:
    """From a `config.json`. Raises ValueError for what is no number of layers."""
    layers = config["num_hidden_layers"]
    if type(layers) is not int or not 0 < layers <= MOST_LAYERS:
        raise ValueError(f"num_hidden_layers is {layers!r}, which is no number of layers")
    return layers


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
        layers = layers_of(config)
        heads, width = config["num_attention_heads"], config["hidden_size"]
        context = config["max_position_embeddings"]
        if config.get("use_sliding_window", kind == "mistral") and config.get("sliding_window"):
            context = min(context, config["sliding_window"])  # within the window, sliding equals full attention
        return cls(
            vocabulary_size=config["vocab_size"],
            width=width,
            layers=layers,
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
    def matrix_numbers(self) -> int:
        """Of all matrices of a model, embedding and head included."""
        outside = self.vocabulary_size * self.width * (1 if self.tied else 2)
        return outside + sum(linear.outputs * linear.inputs for _, linear in self.layout.linears())

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


class Kept(Protocol):
    """Rows of a matrix in a form of their own, a tensor of bf16 say: what is computed with is made of them."""

    def to(self, dtype: torch.dtype, /) -> Tensor:
        """[O, I]"""


class KeptLayers(Sequence[Layer]):
    """Layers whose matrices are made each time that they are asked for, and not held on to."""

    def __init__(
        self, layers: Sequence[Layer], matrices: Sequence[Mapping[Site, Sequence[Kept]]], dtype: torch.dtype
    ) -> None:
        """`layers` are without matrices; those of each site are kept in parts, one below the other."""
        self._layers, self._matrices, self._dtype = layers, matrices, dtype

    def __len__(self) -> int:
        return len(self._layers)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Layer]: ...
    def __getitem__(self, index: int | slice) -> Layer | Sequence[Layer]:
        if isinstance(index, slice):
            return KeptLayers(self._layers[index], self._matrices[index], self._dtype)
        dense = {site: self.matrix(index, site, self._dtype) for site in self._matrices[index]}
        qkv = dense.pop("qkv")
        return replace(self._layers[index], qkv_parts=[qkv], **dense)

    def bare(self, index: int) -> Layer:
        """See `Llama.bare`."""
        return self._layers[index]

    def matrix(self, index: int, site: Site, dtype: torch.dtype) -> Tensor:
        """See `Llama.matrix`."""
        parts = [part.to(dtype) for part in self._matrices[index][site]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


@dataclass(slots=True)
class Llama:
    """The weights of a model and its forward pass, in the dtype of `norm_D`."""

    config: LlamaConfig
    embedding_VD: Tensor
    """It and the head may be of another dtype: what is taken from them is not."""
    layers: Sequence[Layer]
    norm_D: Tensor
    head_VD: Tensor

    def hidden(
        self, token_ids_N: Tensor, positions_N: Tensor, attend: Attend, adapters: Adapters | None = None
    ) -> Tensor:
        """The normed output of the last layer, [N, D]: `logits` of a row is the prediction of the token after it."""
        dtype = self.norm_D.dtype
        turn = rotation(positions_N, self.config, dtype)
        x_ND = F.embedding(token_ids_N, self.embedding_VD).to(dtype)
        delta_ND = None if adapters is None else adapters.embedding_delta(token_ids_N)
        x_ND = x_ND if delta_ND is None else x_ND + delta_ND
        for index in range(len(self.layers)):
            x_ND = self.through(index, x_ND, turn, attend, adapters)
        return self._norm(x_ND, self.norm_D)

    def through(
        self, index: int, x_ND: Tensor, turn: tuple[Tensor, Tensor], attend: Attend, adapters: Adapters | None = None
    ) -> Tensor:
        """The states behind a layer, from those before it; `turn` is the `rotation` of their positions."""
        config, (cos_Nd, sin_Nd) = self.config, turn
        layer, matrix = self.bare(index), partial(self.matrix, index, dtype=self.norm_D.dtype)
        y_ND = self._norm(x_ND, layer.attention_norm_D)
        qkv = _adapted(y_ND, matrix("qkv"), layer.qkv_bias, adapters, index, "qkv")
        q, k, v = qkv.split_with_sizes([config.query_width, config.key_width, config.key_width], dim=-1)
        q_NHd = q.unflatten(-1, (config.heads, config.head_width))
        k_NKd = k.unflatten(-1, (config.kv_heads, config.head_width))
        if layer.q_norm_d is not None and layer.k_norm_d is not None:
            q_NHd, k_NKd = self._norm(q_NHd, layer.q_norm_d), self._norm(k_NKd, layer.k_norm_d)
        q_NHd, k_NKd = _rotate(q_NHd, cos_Nd, sin_Nd), _rotate(k_NKd, cos_Nd, sin_Nd)
        v_NKd = v.unflatten(-1, (config.kv_heads, config.head_width))
        a_ND = attend(index, q_NHd, k_NKd, v_NKd).flatten(-2)
        x_ND = x_ND + _adapted(a_ND, matrix("o"), None, adapters, index, "o")

        y_ND = self._norm(x_ND, layer.feed_norm_D)
        gate_up = _adapted(y_ND, matrix("gate_up"), None, adapters, index, "gate_up")
        gate_NF, up_NF = gate_up.chunk(2, dim=-1)
        z_NF = F.silu(gate_NF) * up_NF
        return x_ND + _adapted(z_NF, matrix("down"), None, adapters, index, "down")

    def logits(self, hidden_ND: Tensor, token_ids: Sequence[int] | None = None) -> Tensor:
        """See `Decoder`."""
        head_VD = self.head_VD if token_ids is None else self.head_VD[list(token_ids)]
        return F.linear(hidden_ND, head_VD.to(hidden_ND.dtype))

    def bare(self, index: int) -> Layer:
        """A layer, of which its matrices will not be asked: they may not be there."""
        return self.layers.bare(index) if isinstance(self.layers, KeptLayers) else self.layers[index]

    def matrix(self, index: int, site: Site, dtype: torch.dtype) -> Tensor:
        """The weights of a site of a layer [O, I]."""
        if isinstance(self.layers, KeptLayers):
            return self.layers.matrix(index, site, dtype)
        layer = self.layers[index]
        weight_OI: Tensor = getattr(layer, site)
        return weight_OI.to(dtype)

    def parameters(self) -> Iterator[Tensor]:
        """Every weight once, in a fixed order, in the dtype of the model."""
        yield from (tensor for _, tensor in self._stacked())

    def over(self, parameters: Sequence[Tensor]) -> Llama:
        """The same model with other weights, in the order of `parameters`."""
        supply, config = iter(parameters), self.config
        embedding_VD = next(supply)
        layers = [
            Layer(
                attention_norm_D=next(supply),
                qkv_parts=[next(supply)],
                qkv_bias=next(supply) if config.qkv_bias else None,
                q_norm_d=next(supply) if config.qk_norm else None,
                k_norm_d=next(supply) if config.qk_norm else None,
                o=next(supply),
                feed_norm_D=next(supply),
                gate_up=next(supply),
                down=next(supply),
            )
            for _ in range(config.layers)
        ]
        norm_D = next(supply)
        return Llama(config, embedding_VD, layers, norm_D, embedding_VD if config.tied else next(supply))

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
        dtype = self.norm_D.dtype
        yield "model.embed_tokens.weight", self.embedding_VD.to(dtype)
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
            yield "lm_head.weight", self.head_VD.to(dtype)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_epsilon)


def from_state(config: LlamaConfig, state: dict[str, Tensor]) -> Llama:
    """A model from weights under checkpoint names.

    Raises KeyError naming a weight that is missing, ValueError for one that is not of the shape that the config says.
    """
    layers = []
    for index, sites in enumerate(matrix_names(config)):
        matrices = {
            site: [checked_shape(shape, name, state[name]) for name, shape in names] for site, names in sites.items()
        }
        (o,), (down,) = matrices["o"], matrices["down"]
        layer = without_matrices(config, state, index)
        gate_up = stacked(matrices["gate_up"])
        layers.append(replace(layer, qkv_parts=matrices["qkv"], o=o, gate_up=gate_up, down=down))
    return assembled(config, layers, state)


def matrix_names(config: LlamaConfig) -> Iterator[dict[Site, list[tuple[str, tuple[int, int]]]]]:
    """What a checkpoint calls the matrices of each layer, and their shapes; those of a site one below the other."""
    for index, sites in enumerate(config.layout.layers):
        prefix = f"model.layers.{index}."
        yield {
            site: [(f"{prefix}{linear.name}.weight", (linear.outputs, linear.inputs)) for linear in linears]
            for site, linears in sites.items()
        }


def without_matrices(config: LlamaConfig, state: Mapping[str, Tensor], index: int) -> Layer:
    """A layer that has all else. Raises as `from_state`."""
    nothing = torch.empty(0)

    def vector(name: str, size: int) -> Tensor:
        whole = f"model.layers.{index}.{name}"
        return checked_shape((size,), whole, state[whole])

    heads = (("q", config.query_width), ("k", config.key_width), ("v", config.key_width))
    biases = [vector(f"self_attn.{part}_proj.bias", size) for part, size in heads] if config.qkv_bias else None
    return Layer(
        attention_norm_D=vector("input_layernorm.weight", config.width),
        qkv_parts=[],
        qkv_bias=torch.cat(biases) if biases else None,
        q_norm_d=vector("self_attn.q_norm.weight", config.head_width) if config.qk_norm else None,
        k_norm_d=vector("self_attn.k_norm.weight", config.head_width) if config.qk_norm else None,
        o=nothing,
        feed_norm_D=vector("post_attention_layernorm.weight", config.width),
        gate_up=nothing,
        down=nothing,
    )


def assembled(config: LlamaConfig, layers: Sequence[Layer], state: Mapping[str, Tensor]) -> Llama:
    """The model of these layers. Raises as `from_state`."""
    shape = (config.vocabulary_size, config.width)
    embedding_VD = checked_shape(shape, "model.embed_tokens.weight", state["model.embed_tokens.weight"])
    head_VD = embedding_VD if config.tied else checked_shape(shape, "lm_head.weight", state["lm_head.weight"])
    norm_D = checked_shape((config.width,), "model.norm.weight", state["model.norm.weight"])
    return Llama(config, embedding_VD, layers, norm_D, head_VD)


def checked_shape(shape: tuple[int, ...], name: str, tensor: Tensor) -> Tensor:
    """The tensor. Compiled code goes by the config: another shape would have it read beside it. Raises ValueError."""
    if tensor.shape != shape or not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name} has the shape {list(tensor.shape)} of {kind}, and config.json says {list(shape)}")
    return tensor


def load(folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Llama:
    """A model from a checkpoint folder: `config.json` and one or more safetensors files, of plain numbers.

    Raises ValueError if the checkpoint is of another architecture, FileNotFoundError if it has no safetensors.
    """
    described = json.loads((folder / "config.json").read_text())
    if described.get("quantization_config"):
        raise ValueError("the weights are quantised: those are for decoder.loading")
    config = LlamaConfig.from_json(described)
    state = {
        name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in tensors_of(folder)
    }
    return from_state(config, state)


def tensors_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint folder, by name, as its files have them. Raises FileNotFoundError as `load`."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no *.safetensors in {folder}; pickled weights are never read")
    for path in files:
        with safe_open(path, framework="pt") as tensors:
            names = tensors.keys()  # no mapping
            for name in names:
                yield name, tensors.get_tensor(name)


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
