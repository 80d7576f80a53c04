"""Our forward pass against transformers' on the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

from tunesmith.decoder.llama import LlamaConfig, RopeStretch, from_state, load

torch.set_num_threads(1)


def attend_causally(layer: int, q_NHd: torch.Tensor, k_NKd: torch.Tensor, v_NKd: torch.Tensor) -> torch.Tensor:
    q, k, v = (x[None].transpose(1, 2) for x in (q_NHd, k_NKd, v_NKd))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


LLAMA_3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # of its rotations some are fast, some between, some slow
}
SHAPES = {
    "llama": {},
    "llama 3": {"rope_parameters": LLAMA_3, "head_dim": 32},
    "mistral": {"sliding_window": 4096},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {"head_dim": 16, "use_sliding_window": False},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_those_of_transformers(shape: str, tied: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        shape.split()[0],
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        rms_norm_eps=1e-6,
        **SHAPES[shape],
    )
    oracle = AutoModelForCausalLM.from_config(config).eval()
    for parameter in oracle.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that norms, biases and rotations all matter
    oracle.save_pretrained(tmp_path)
    token_ids = torch.randint(0, 97, (120,))

    ours = load(tmp_path)
    with torch.no_grad():
        expected = oracle(token_ids[None]).logits[0]
        actual = ours.logits(ours.hidden(token_ids, torch.arange(120), attend_causally))

    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_older_spelling_of_llama_3_is_read_too(tiny_base: Path) -> None:
    config = json.loads((tiny_base / "config.json").read_text())
    older = {key: value for key, value in LLAMA_3.items() if key != "rope_theta"}  # it stood beside
    stretch = LlamaConfig.from_json(config | {"rope_scaling": older}).rope_stretch
    assert stretch == RopeStretch(8.0, 1.0, 4.0, 64)


def test_a_state_read_back_is_the_same_model(tiny_base: Path) -> None:
    model = load(tiny_base)
    again = from_state(model.config, model.state())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_what_the_forward_pass_does_not_compute_is_refused(tiny_base: Path) -> None:
    config = json.loads((tiny_base / "config.json").read_text())
    with pytest.raises(ValueError, match="gpt2"):
        LlamaConfig.from_json(config | {"model_type": "gpt2"})
    with pytest.raises(ValueError, match="rope"):
        LlamaConfig.from_json(config | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    with pytest.raises(ValueError, match="gelu"):
        LlamaConfig.from_json(config | {"hidden_act": "gelu"})
    for bias in ("attention_bias", "mlp_bias"):
        with pytest.raises(ValueError, match=bias):
            LlamaConfig.from_json(config | {bias: True})


def test_a_folder_without_safetensors_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(FileNotFoundError, match="pickled weights are never read"):
        load(tmp_path)
