"""Models run through transformers give what plain transformers gives; what would not is refused with the reason."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import tunesmith.decoder
from tests.architectures import FOREIGN, OWN, WINDOW, make_base
from tests.training.rows import random_rows
from tunesmith.adapters.lora import Linear
from tunesmith.decoder import foreign, loading, probe
from tunesmith.decoder.base import Attend
from tunesmith.decoder.llama import Llama
from tunesmith.training.packing import micro_batches

torch.set_num_threads(1)
LENGTHS = (40, 3 * WINDOW, 7)


@pytest.mark.parametrize("name", [*OWN, *FOREIGN])
def test_logits_of_packed_rows_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    base = make_base(tmp_path, (OWN | FOREIGN)[name])
    oracle = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    rows = random_rows([(length - 1, 1) for length in LENGTHS])
    (batch,) = micro_batches(rows, prompt_loss_weight=1.0)

    model = loading.load(base)
    with torch.no_grad():
        hidden = model.hidden(batch.token_ids_N, batch.positions_N, batch.attend)
        actual = model.logits(hidden).split([len(rows[source].token_ids) for source in batch.source])
        some = model.logits(hidden, [5, 3])
        for source, logits_TV in zip(batch.source, actual, strict=True):
            expected_TV = oracle(torch.tensor(rows[source].token_ids)[None]).logits[0]
            assert (logits_TV - expected_TV).abs().max() <= 1e-5 * expected_TV.abs().max()

    assert isinstance(model, Llama) == (name in OWN)
    assert torch.allclose(some, torch.cat(actual)[:, [5, 3]], atol=1e-5)


def test_shape_and_layout_are_read_off_the_model(tmp_path: Path) -> None:
    config = foreign.load(make_base(tmp_path, FOREIGN["gpt2"])).config

    assert (config.vocabulary_size, config.context_tokens, config.kv_heads, config.head_width) == (16_384, 256, 4, 8)
    assert (config.layout.path, config.layout.transposed) == ("transformer.h", True)
    assert config.layout.embedding == Linear("transformer.wte", outputs=32, inputs=16_384)
    assert [(layer, linear.name, linear.outputs, linear.inputs) for layer, linear in config.layout.linears()] == [
        (layer, *linear)
        for layer in (0, 1)
        for linear in (
            ("attn.c_attn", 96, 32),
            ("attn.c_proj", 32, 32),
            ("mlp.c_fc", 48, 32),
            ("mlp.c_proj", 32, 48),
        )
    ]


def test_rotations_that_change_with_the_length_cut_the_context(tmp_path: Path) -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi3 = {**FOREIGN["gemma"], "model_type": "phi3", "original_max_position_embeddings": 64}
    config = {**phi3, "rope_parameters": rope | {"original_max_position_embeddings": 64}}
    assert foreign.load(make_base(tmp_path, config)).config.context_tokens == 64


def test_half_precision_is_loaded_too(tmp_path: Path) -> None:
    model = foreign.load(make_base(tmp_path, FOREIGN["gemma3"]), torch.bfloat16)
    assert model.head_VD.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**FOREIGN["gemma2"], "attn_logit_softcapping": 50.0}, "soft-capped.*attn_logit_softcapping = 50"),
        ({**FOREIGN["gemma2"], "final_logit_softcapping": 30.0}, "soft-capped.*final_logit_softcapping = 30"),
        ({**FOREIGN["gemma"], "model_type": "cohere"}, "after its head"),
        ({**FOREIGN["gpt2"], "model_type": "gptj", "rotary_dim": 4}, "attention of this type of model cannot be repl"),
        ({**FOREIGN["gpt2"], "model_type": "codegen", "rotary_dim": 4}, "not let its attention be replaced"),
        ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4}, "no max_position_embeddings"),
        ({"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 64}, "bloom"),
        (
            {**FOREIGN["gemma"], "model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
            "not each of the 2 layers",
        ),
        (
            {**FOREIGN["gemma"], "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2},
            "needs 's_aux'",
        ),
    ],
)
def test_what_would_come_out_wrong_is_refused(config: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        loading.load(make_base(tmp_path, config))


def test_attention_in_chunks_is_no_window(tmp_path: Path) -> None:
    """Nothing but the mask tells that a layer sees only its chunk, and a few tokens are all in the first chunk."""
    chunked = {
        **FOREIGN["gemma"],
        "model_type": "llama4_text",
        "attention_chunk_size": 64,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 48,
        "interleave_moe_layer_step": 1,
        "layer_types": ["chunked_attention", "full_attention"],
    }
    with pytest.raises(ValueError, match="neither causal over all tokens nor over a sliding window"):
        loading.load(make_base(tmp_path, chunked))


@pytest.mark.parametrize("fault", ["positions run on", "scores are scaled", "the second pass forgets the first"])
def test_wrong_numbers_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    base = make_base(tmp_path, FOREIGN["gpt_neox"])
    model = foreign.load(base)
    network = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    probe.compare(model, network, foreign.ATTENTION)
    right = model.hidden

    def hidden(token_ids_N: Tensor, positions_N: Tensor, attend: Attend) -> Tensor:
        match fault:
            case "positions run on":
                return right(token_ids_N, torch.arange(len(positions_N)), attend)
            case "scores are scaled":
                return right(token_ids_N, positions_N, lambda layer, q, k, v: attend(layer, q * 1.01, k, v))
        passes = 2 * len(token_ids_N)  # passes differ in length, so keys and values are kept under other layers
        return right(token_ids_N, positions_N, lambda layer, q, k, v: attend(layer + passes, q, k, v))

    monkeypatch.setattr(model, "hidden", hidden)
    with pytest.raises(probe.Unfit, match="differ"):
        probe.compare(model, network, foreign.ATTENTION)


def test_weights_that_are_not_there_are_not_made_up(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    base = make_base(tmp_path, FOREIGN["opt"])
    weights = base / "model.safetensors"
    state = load_file(weights)
    del state["model.decoder.layers.1.fc1.weight"]
    save_file(state, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack model\.decoder\.layers\.1\.fc1\.weight"):
        loading.load(base)

    weights.rename(base / "pytorch_model.bin")
    with pytest.raises(ValueError, match=f"in {base.name}; pickled weights are never read"):
        loading.load(base)


def test_code_of_a_checkpoint_is_never_run(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", FOREIGN["gpt2"])
    config = json.loads((base / "config.json").read_text())
    config |= {"model_type": "own_kind", "auto_map": {k: f"code.{k}" for k in ("AutoConfig", "AutoModelForCausalLM")}}
    (base / "config.json").write_text(json.dumps(config))
    (base / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")

    with pytest.raises(ValueError, match="cannot load this model"):
        loading.load(base)
    assert not (tmp_path / "ran").exists()


def test_without_transformers_the_way_out_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path, FOREIGN["gpt2"])
    monkeypatch.delattr(tunesmith.decoder, "foreign")
    for module in ("tunesmith.decoder.foreign", "tunesmith.decoder.probe"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "transformers", None)  # what an absent package looks like to `import`

    with pytest.raises(ValueError, match=r"'gpt2' is not one of .* pip install 'tunesmith\[transformers\]'"):
        loading.load(base)


def test_the_llama_family_needs_no_transformers(tiny_base: Path) -> None:
    code = "import sys; from pathlib import Path; from tunesmith.decoder import loading; "
    code += f"loading.load(Path({str(tiny_base)!r})); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
