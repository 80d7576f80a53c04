"""GGUF, the file format of llama.cpp: a model of the Llama family written whole, and read back. Needs `gguf`.

Written with the package that llama.cpp's authors publish, not with their `convert_hf_to_gguf.py`: that one is not on
PyPI, and refuses every tokenizer whose fingerprint it does not list, those of the models in the box among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path

import gguf
import torch
from torch import Tensor

from tunesmith.decoder.gguf_words import Words
from tunesmith.decoder.llama import Llama, LlamaConfig, from_state

ROPE_FACTORS = "rope_freqs.weight"
"""What llama.cpp divides the frequencies of Llama 3 by."""


class Precision(StrEnum):
    """How the matrices of a file are kept, by llama.cpp's names. Norms and biases are always fp32."""

    F32 = "f32"
    BF16 = "bf16"
    Q8_0 = "q8_0"
    """Eight bits, 32 numbers of a row sharing a scale; rows that are no multiple of 32 are kept in bf16."""


_TYPES = {
    Precision.F32: (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    Precision.BF16: (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    Precision.Q8_0: (gguf.GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_Q8_0_ROW = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType.Q8_0][0]


def write(model: Llama, words: Words, path: Path, precision: Precision, *, name: str) -> None:
    """Writes `path`; `name` is what llama.cpp shows of it. Equal models give equal bytes."""
    config, (_, file_type) = model.config, _TYPES[precision]
    out = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[_architecture(config)])
    out.add_name(name)
    out.add_file_type(file_type)
    out.add_quantization_version(gguf.GGML_QUANT_VERSION)
    out.add_vocab_size(config.vocabulary_size)
    out.add_context_length(config.context_tokens)
    out.add_embedding_length(config.width)
    out.add_block_count(config.layers)
    out.add_feed_forward_length(config.feed_forward_width)
    out.add_head_count(config.heads)
    out.add_head_count_kv(config.kv_heads)
    out.add_key_length(config.head_width)
    out.add_value_length(config.head_width)
    out.add_rope_dimension_count(config.head_width)
    out.add_rope_freq_base(config.rope_theta)
    out.add_layer_norm_rms_eps(config.norm_epsilon)
    words.add_to(out)
    for key, tensor in tensors(model.state(), config):
        kind = _kind(tensor, precision)
        out.add_tensor(key, gguf.quantize(tensor.numpy(), kind), raw_dtype=kind)
    if config.rope_stretch is not None:
        plain = config.rope_theta ** -(torch.arange(0, config.head_width, 2) / config.head_width)
        out.add_tensor(ROPE_FACTORS, (plain / config.rope_stretch(plain)).numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def read(path: Path, like: Llama) -> Llama:
    """The model in a file that `write` made of one of the shape of `like`: fp32, rounded as the file is."""
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    config, state = like.config, {}
    for name, key in _names(like.state(), config):
        values = torch.from_numpy(gguf.dequantize(found[key].data, found[key].tensor_type).copy())
        heads = _turned(name, config)
        state[name] = values if heads is None else _halves_apart(values, heads)
    return from_state(config, state)


def tensors(state: Mapping[str, Tensor], config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Weights under the names of a checkpoint, as llama.cpp calls and lays them out; fp32."""
    for name, key in _names(state, config):
        heads, tensor = _turned(name, config), state[name].float()
        yield key, (tensor if heads is None else pairs_together(tensor, heads)).contiguous()


def pairs_together(rows: Tensor, heads: int) -> Tensor:
    """The rows of a query or key projection reordered within each head: llama.cpp turns neighbours, we turn halves.

    Source: `LlamaModel.permute` of llama.cpp's conversion/llama.py.
    """
    return torch.unflatten(rows, 0, (heads, 2, -1)).swapaxes(1, 2).reshape(rows.shape)


def _halves_apart(rows: Tensor, heads: int) -> Tensor:
    return torch.unflatten(rows, 0, (heads, -1, 2)).swapaxes(1, 2).reshape(rows.shape)


def _turned(name: str, config: LlamaConfig) -> int | None:
    """The heads of a tensor whose rows are reordered; only llama.cpp's `llama` wants that."""
    if _architecture(config) is gguf.MODEL_ARCH.LLAMA:
        for site, heads in ((".q_proj.", config.heads), (".k_proj.", config.kv_heads)):
            if site in name:
                return heads
    return None


def _names(checkpoint: Iterable[str], config: LlamaConfig) -> Iterator[tuple[str, str]]:
    """(name in a checkpoint, name in a GGUF file) of each tensor."""
    known = gguf.get_tensor_name_map(_architecture(config), config.layers)
    for name in checkpoint:
        key = known.get_name(name, try_suffixes=(".weight", ".bias"))
        assert key is not None
        yield name, key


def _architecture(config: LlamaConfig) -> gguf.MODEL_ARCH:
    if config.qk_norm:
        return gguf.MODEL_ARCH.QWEN3
    return gguf.MODEL_ARCH.QWEN2 if config.qkv_bias else gguf.MODEL_ARCH.LLAMA


def _kind(tensor: Tensor, precision: Precision) -> gguf.GGMLQuantizationType:
    if tensor.dim() == 1:
        return gguf.GGMLQuantizationType.F32
    if precision is Precision.Q8_0 and tensor.shape[1] % _Q8_0_ROW:
        return gguf.GGMLQuantizationType.BF16
    return _TYPES[precision][0]
