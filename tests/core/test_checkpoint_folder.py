"""Safetensors headers, indexes and configs from strangers: each way of being wrong has its sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from tunesmith.core.checkpoint_folder import Tensor, context_tokens_of, read_config, read_tensors, shards_of

F32 = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def packed(header: Any, data: bytes = b"\0" * 24) -> bytes:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(content).to_bytes(8, "little") + content + data


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.zeros((), np.float16), "c": np.zeros((0, 4), np.int8)}
    save_file(tensors, tmp_path / "m.safetensors", metadata={"format": "np"})
    assert read_tensors(tmp_path / "m.safetensors") == {
        "a": Tensor("F32", (2, 3)),
        "b": Tensor("F16", ()),
        "c": Tensor("I8", (0, 4)),
    }


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "0 bytes, too few"),
        (b"\1\2\3", "3 bytes, too few"),
        (b"\xff" * 8 + b"{}", "claims a header of 18,446,744,073,709,551,615 bytes"),
        ((100_000_001).to_bytes(8, "little") + b"{}", "claims a header of 100,000,001 bytes"),
        ((1000).to_bytes(8, "little") + b"{}", "cut short: its header alone has 1,000 bytes"),
        (packed(b"not json"), "is not JSON"),
        (packed(b"\xff\xfe"), "is not JSON"),
        (packed(b"[" * 50_000), "is not JSON"),
        (packed(b'{"a": ' + b"9" * 5_000 + b"}"), "is not JSON"),
        (packed([]), "holds no JSON object but a list"),
        (packed({}), "holds no tensors"),
        (packed({"__metadata__": {"format": "pt"}}), "holds no tensors"),
        (packed(b'{"a": 1, "a": 2}'), "stands there twice"),
        (packed({"a": 5}), "does not describe tensor 'a'"),
        (packed({"a": F32 | {"more": 1}}), "does not describe tensor 'a'"),
        (packed({"a": F32 | {"data_offsets": [0]}}), "does not describe tensor 'a'"),
        (packed({"x" * 1000: 5}), r"tensor 'x{77}\.\.\.'"),
        (packed({"a": F32 | {"dtype": "PICKLE"}}), "dtype 'PICKLE', which is not known"),
        (packed({"a": F32 | {"shape": [2, -3]}}), r"has shape \[2, -3\]"),
        (packed({"a": F32 | {"shape": [2.0, 3]}}), "has shape"),
        (packed({"a": F32 | {"shape": [2**40, 2**40]}}), "cannot have the bytes 0 to 24"),
        (packed({"a": F32 | {"data_offsets": [24, 0]}}), "cannot have the bytes 24 to 0"),
        (packed({"a": F32 | {"data_offsets": [-8, 16]}}), "cannot have the bytes"),
        (packed({"a": F32, "b": F32}), "overlap or leave a gap at byte 0"),
        (packed({"a": F32 | {"data_offsets": [8, 32]}}, b"\0" * 32), "overlap or leave a gap at byte 0"),
        (packed({"a": F32}, b"\0" * 20), r"cut short: 4 of \d+ bytes lack"),
        (packed({"a": F32}, b"\0" * 30), "6 bytes after its last tensor"),
    ],
)
def test_a_wrong_file_is_told_in_words(content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        read_tensors(tmp_path / "m.safetensors")
    assert "m.safetensors" in str(caught.value)


@settings(max_examples=50)
@given(st.binary(max_size=64), st.integers(0, 90))
def test_no_bytes_are_a_traceback(tmp_path_factory: pytest.TempPathFactory, noise: bytes, place: int) -> None:
    whole = packed({"a": F32})
    path = tmp_path_factory.getbasetemp() / "noise.safetensors"
    path.write_bytes(whole[:place] + noise + whole[place + len(noise) :])
    try:
        read_tensors(path)
    except ValueError as error:
        assert "noise.safetensors" in str(error)


@pytest.mark.parametrize(
    ("index", "complaint"),
    [
        ({}, "no weight_map"),
        ({"weight_map": []}, "no weight_map"),
        ({"weight_map": {"a": 5}}, "names 5"),
        ({"weight_map": {"a": "../m.safetensors"}}, "directly in the folder"),
        ({"weight_map": {"a": "/etc/m.safetensors"}}, "directly in the folder"),
        ({"weight_map": {"a": "m.bin"}}, "names 'm.bin', which is no safetensors file"),
    ],
)
def test_a_wrong_index(index: object, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=complaint):
        shards_of(tmp_path)


def test_a_config_is_bounded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config\.json is not there"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(ValueError, match="more than 1,048,576 bytes"):
        read_config(tmp_path)


LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [2.0, 2.0]}


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"max_position_embeddings": 8192}, 8192),
        ({"model_type": "gpt2", "n_positions": 1024, "n_ctx": 1024}, 1024),
        ({"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": 4096}, 4096),
        ({"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": None}, 32768),
        (
            {
                "model_type": "qwen2",
                "max_position_embeddings": 32768,
                "sliding_window": 4096,
                "use_sliding_window": False,
            },
            32768,
        ),
        ({"model_type": "phi3", "max_position_embeddings": 131_072, "rope_scaling": LONG}, 131_072),
        ({"model_type": "phi3", "max_position_embeddings": 131_072, "original_max_position_embeddings": 4096}, 131_072),
        (
            {
                "model_type": "phi3",
                "max_position_embeddings": 131_072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": LONG,
            },
            4096,
        ),
        (
            {"max_position_embeddings": 8192, "rope_parameters": LONG | {"original_max_position_embeddings": 1024}},
            1024,
        ),
        (
            {
                "max_position_embeddings": 8192,
                "rope_parameters": {"full_attention": LONG | {"original_max_position_embeddings": 512}},
            },
            512,
        ),
        ({"max_position_embeddings": 8192, "rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, 8192),
        ({"text_config": {"max_position_embeddings": 512}, "max_position_embeddings": 1024}, 512),
        ({"max_position_embeddings": "many"}, None),
        ({}, None),
    ],
)
def test_how_much_a_model_reads(config: dict[str, Any], tokens: int | None) -> None:
    assert context_tokens_of(config) == tokens


@pytest.mark.parametrize("spelt", ["rope_scaling", "rope_parameters"])
def test_no_more_is_advertised_than_the_decoder_reads(spelt: str, tmp_path: Path) -> None:
    """Phi-3 changes its rotations where a text is longer than those of its pretraining: there both stop."""
    from tests.architectures import make_base
    from tunesmith.decoder import loading

    fields = {
        "model_type": "phi3",
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 128,
        "pad_token_id": 0,
        spelt: {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4},
    }
    base = make_base(tmp_path, fields)
    assert context_tokens_of(read_config(base)) == loading.load(base).config.context_tokens == 128
    assert context_tokens_of(fields) == 128
