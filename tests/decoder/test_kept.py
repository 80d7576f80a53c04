"""Weights that stay in bf16 or in 4 bits: the numbers of transformers and bitsandbytes, and nothing taken on trust."""

from __future__ import annotations

import json
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from tests.architectures import FOREIGN, OWN, fourbit_network, make_base
from tunesmith.decoder import loading
from tunesmith.decoder.fourbit import pack
from tunesmith.decoder.llama import KeptLayers, Llama
from tunesmith.decoder.quantizing import INDEX, quantize
from tunesmith.decoder.saving import save_checkpoint
from tunesmith.tokenizer import Tokenizer

IDS = torch.arange(100, 140)
NORM = "model.norm.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
STATE = f"{GATE}.quant_state.bitsandbytes__nf4"


def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None) -> Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)


def loaded(folder: Path, *, lean: bool = False) -> Llama:
    model = loading.load(folder, lean=lean)
    assert isinstance(model, Llama)
    return model


@torch.inference_mode()
def logits(model: Llama) -> Tensor:
    return model.logits(model.hidden(IDS, torch.arange(len(IDS)), attend))


@pytest.fixture
def fourbit(tmp_path: Path) -> Path:
    return make_base(tmp_path / "fourbit", OWN["llama"], bits=4)


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize(("code", "nested"), [("nf4", False), ("nf4", True), ("fp4", False)])
def test_checkpoints_of_transformers_give_its_numbers(tmp_path: Path, kind: str, code: str, nested: bool) -> None:
    network = fourbit_network(make_base(tmp_path / "plain", OWN[kind]), nested=nested, kind=code)
    network.save_pretrained(tmp_path / "packed")
    with torch.no_grad():
        expected = network(IDS[None]).logits[0]
    for lean in (False, True):
        model = loaded(tmp_path / "packed", lean=lean)
        assert isinstance(model.layers, KeptLayers) == lean
        torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_lean_weights_are_the_same_to_the_bit(tmp_path: Path, bits: Any) -> None:
    base = make_base(tmp_path / "base", OWN["qwen3"], bits=bits)
    model, lean = loaded(base), loaded(base, lean=True)
    assert isinstance(lean.layers, KeptLayers) == (bits != 32)
    assert torch.equal(logits(model), logits(lean))
    for one, other in ((model.state(), lean.state()), (model.over([*model.parameters()]).state(), model.state())):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) and one[name].dtype == torch.float32 for name in one)
    assert torch.equal(lean.layers[1:][0].down, model.layers[1].down)


@pytest.mark.parametrize("bits", [16, 4])
def test_what_is_made_of_lean_weights_is_gone_with_whoever_asked(tmp_path: Path, bits: Any) -> None:
    lean = loaded(make_base(tmp_path / "base", OWN["qwen3"], bits=bits), lean=True)
    asked = [lean.layers[0].down, lean.matrix(1, "qkv", torch.float32)]
    made = [weakref.ref(weight) for weight in asked]
    assert all(weight() is not None for weight in made)
    asked.clear()
    assert all(weight() is None for weight in made)


def test_quantizing_packs_what_transformers_packs(tmp_path: Path) -> None:
    plain = make_base(tmp_path / "plain", OWN["mistral"])
    theirs = fourbit_network(plain)
    theirs.save_pretrained(tmp_path / "theirs")
    heard: list[tuple[str, int, int]] = []
    quantize(plain, tmp_path / "ours", lambda *told: heard.append(told))

    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        if "quant_state" in name:  # a JSON object
            states = [json.loads(bytes(each.tolist())) for each in (one[name], tensor)]
            assert states[0] == states[1]
        else:
            assert torch.equal(one[name], tensor), name
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("plain", "ours")]
    assert heard == [("model.safetensors", *sizes)]
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["quantization_config"]["bnb_4bit_quant_type"] == "nf4"
    assert Tokenizer.from_folder(tmp_path / "ours").vocabulary_size == Tokenizer.from_folder(plain).vocabulary_size
    with pytest.raises(ValueError, match="in 4 bits already"):
        quantize(tmp_path / "ours", tmp_path / "again", lambda *told: None)


def test_shards_and_bf16_are_quantized_one_by_one(tmp_path: Path) -> None:
    whole = make_base(tmp_path / "whole", OWN["llama"], bits=16)
    state = load_file(whole / "model.safetensors")
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    names = sorted(state)
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: state[name] for name in part}, sharded / f"part ({number}).safetensors", {"format": "pt"})
    (sharded / "config.json").write_bytes((whole / "config.json").read_bytes())
    for name in ("whole", "sharded"):
        quantize(tmp_path / name, tmp_path / f"{name}-4bit", lambda *told: None)
    models = [loaded(tmp_path / f"{name}-4bit") for name in ("whole", "sharded")]
    assert torch.equal(logits(models[0]), logits(models[1]))
    files = json.loads((tmp_path / "sharded-4bit" / INDEX).read_text())["weight_map"]
    assert files[GATE] == files[f"{GATE}.absmax"] == f"model-0000{names.index(GATE) % 2 + 1}-of-00002.safetensors"
    rounded = models[0].layers[0].down
    assert torch.equal(rounded, rounded.bfloat16().float())  # what was packed was bf16, and so is what comes out


def test_what_cannot_be_quantized_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_type 'gpt2' is not one of llama, mistral"):
        quantize(make_base(tmp_path / "gpt2", FOREIGN["gpt2"]), tmp_path / "out", lambda *told: None)
    base = make_base(tmp_path / "base", OWN["llama"])
    state = load_file(base / "model.safetensors")
    for broken, told in (
        (state | {GATE: state[GATE].to(torch.int8)}, "gate_proj.weight has the shape .* of uint8"),
        ({name: weight for name, weight in state.items() if name != GATE}, f"lack {GATE}"),
        (state | {GATE: state[GATE].T.contiguous()}, f"{GATE} has the shape"),
        (state | {GATE: state[GATE] / 0}, f"{GATE} has numbers that are not finite"),
        ({name: weight for name, weight in state.items() if name != NORM}, f"lack {NORM}"),
        (state | {NORM: state[NORM][1:].clone()}, f"{NORM} has the shape"),
    ):
        save_file(broken, base / "model.safetensors")
        with pytest.raises(ValueError, match=told):
            quantize(base, tmp_path / told, lambda *told: None)
    (base / "model.safetensors").write_bytes((base / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        quantize(base, tmp_path / "torn", lambda *told: None)
    for config, told in (("[]", "no JSON object"), ('{"model_type": "llama"}', "has no "), ("{", "Expecting")):
        (base / "config.json").write_text(config)
        with pytest.raises(ValueError, match=told):
            quantize(base, tmp_path / "odd", lambda *told: None)
    (base / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json cannot be read"):
        quantize(base, tmp_path / "odd", lambda *told: None)
    assert not (tmp_path / "odd").exists()


@pytest.mark.parametrize("bits", [16, 4])
def test_written_whole_again_it_is_a_plain_checkpoint(tmp_path: Path, bits: Any) -> None:
    base = make_base(tmp_path / "base", OWN["llama"], bits=bits)
    model = loaded(base, lean=True)
    save_checkpoint(model, tmp_path / "whole", base)
    again = loaded(tmp_path / "whole", lean=True)
    assert not isinstance(again.layers, KeptLayers)
    assert torch.equal(logits(again), logits(model))
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")  # of what dtype it is, the checkpoint says
    assert network.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(network(IDS[None]).logits[0], logits(model), atol=1e-4, rtol=0)


State = dict[str, Tensor]


def described(**changes: Any) -> Callable[[State], None]:
    """A change of what the JSON of a matrix says of it."""

    def change(state: State) -> None:
        content = json.dumps(json.loads(bytes(state[STATE].tolist())) | changes).encode()
        state[STATE] = torch.tensor(list(content), dtype=torch.uint8)

    return change


def changed(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[State], None]:
    def apply(state: State) -> None:
        state[GATE + part] = change(state[GATE + part])

    return apply


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (changed("", lambda codes: codes[:-1].clone()), "its bytes are 767 numbers"),
        (changed("", lambda codes: codes.view(torch.int8)), "its bytes are 768 numbers of torch.int8"),
        (
            changed("", lambda codes: codes.flatten().view(torch.bfloat16)),
            "its bytes are 384 numbers of torch.bfloat16",
        ),
        (changed(".absmax", lambda each: each[:-1].clone()), "absmax are 23 numbers of torch.float32"),
        (changed(".absmax", lambda each: each.double()), "absmax are 24 numbers of torch.float64"),
        (changed(".quant_map", lambda code: code[:8].clone()), "quant_map are 8 numbers"),
        (changed(".quant_map", lambda code: code.flip(0)), "its quant_map is not that of nf4"),
        (lambda state: state.pop(f"{GATE}.absmax"), "it comes with quant_map$"),
        (lambda state: state.update({STATE.replace("nf4", "fp4"): state[STATE].clone()}), "it has two quant_states"),
        (lambda state: state.update({STATE: torch.tensor(list(b"[" * 4000), dtype=torch.uint8)}), "is no JSON object"),
        (lambda state: state.update({STATE: torch.ones(9)}), "its quant_state is no JSON object"),
        (described(shape=[32, 48]), r"its quant_state has the shape \[32, 48\]"),
        (described(blocksize=1), "its quant_state has the blocksize 1"),
        (described(blocksize="64"), "its quant_state has the blocksize '64'"),
        (described(blocksize=64.0), "its quant_state has the blocksize 64.0"),
        (described(dtype=[]), r"its quant_state has the dtype \[\]"),
        (described(dtype="load"), "its quant_state has the dtype 'load'"),
        (described(quant_type="fp4"), "its quant_state is of 'fp4'"),
        (described(padding=" " * 5000), "its quant_state is no JSON object"),
        (
            lambda state: state.update({f"{GATE}.nested_absmax": torch.ones(1)}),
            "its quant_state has the nested_blocksize None",
        ),
        (lambda state: state.pop(STATE), None),
    ],
)
def test_a_matrix_that_does_not_fit_together_is_refused(
    fourbit: Path, change: Callable[[State], object], rule: str | None
) -> None:
    state = load_file(fourbit / "model.safetensors")
    change(state)
    save_file(state, fourbit / "model.safetensors")
    told = rf"{GATE} is no matrix of 4 bits and shape \[48, 32\]: .*{rule}"
    if rule is None:
        told = rf"{GATE} has the shape \[768, 1\] of uint8, and config.json says \[48, 32\]"
    for lean in (False, True):
        with pytest.raises(ValueError, match=f"^{told}"):
            loading.load(fourbit, lean=lean)


def test_what_the_description_says_besides_is_not_believed(fourbit: Path) -> None:
    expected = logits(loaded(fourbit))
    state = load_file(fourbit / "model.safetensors")
    described(absmax=[0.0], quant_map=[1.0], more="x")(state)
    save_file(state, fourbit / "model.safetensors")
    assert torch.equal(logits(loaded(fourbit)), expected)


def test_no_other_matrix_is_taken_for_one_in_4_bits(fourbit: Path) -> None:
    state = load_file(fourbit / "model.safetensors")
    packed = pack("lm_head.weight", state["lm_head.weight"])
    save_file(state | packed, fourbit / "model.safetensors")
    for lean in (False, True):
        with pytest.raises(
            ValueError, match=r"^lm_head.weight has the shape \[\d+, 1\] of uint8, and config.json says"
        ):
            loading.load(fourbit, lean=lean)


def test_4_bits_that_the_config_does_not_declare_are_refused(fourbit: Path) -> None:
    config = json.loads((fourbit / "config.json").read_text())
    del config["quantization_config"]
    (fourbit / "config.json").write_text(json.dumps(config))
    for lean in (False, True):
        with pytest.raises(ValueError, match=r"weight has the shape \[\d+, 1\] of uint8, and config.json says"):
            loading.load(fourbit, lean=lean)


@pytest.mark.parametrize("bits", [32, 16, 4])
def test_no_weight_has_another_shape_than_the_config_says(tmp_path: Path, bits: Any) -> None:
    """Compiled code goes by the config."""
    base = make_base(tmp_path / "base", OWN["qwen3"], bits=bits)
    state = load_file(base / "model.safetensors")
    names = [name for name in state if ".weight." not in name and state[name].dtype != torch.uint8]
    assert len(names) > 5
    for name in names:
        save_file(state | {name: state[name][:-1].clone()}, base / "model.safetensors")
        for lean in (False, True):
            with pytest.raises(ValueError, match=f"^{name} has the shape .*, and config.json says"):
                loading.load(base, lean=lean)


@pytest.mark.parametrize("layers", [0, 10**15, "2", 1.0, True])
@pytest.mark.parametrize("bits", [32, 4])
def test_a_number_of_layers_that_is_none_is_refused_at_once(tmp_path: Path, bits: Any, layers: Any) -> None:
    base = make_base(tmp_path / "base", OWN["llama"], bits=bits)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"num_hidden_layers": layers}))
    with pytest.raises(ValueError, match="is no number of layers"):
        loading.load(base)


@pytest.mark.parametrize(
    ("nested", "rule"),
    [
        ({"nested_dtype": "load"}, "has the nested_dtype 'load'"),
        ({"nested_offset": "0"}, "has the nested_offset '0'"),
        ({"nested_offset": float("nan")}, "has the nested_offset nan"),
        ({"nested_offset": 10**400}, "has the nested_offset 1000"),
        ({"nested_offset": 1e300}, r"has the nested_offset 1e\+300"),
        ({"nested_offset": True}, "has the nested_offset True"),
        ({"nested_blocksize": 256.0}, "has the nested_blocksize 256.0"),
        ({"nested_blocksize": 3}, "has the nested_blocksize 3"),
    ],
)
def test_nor_one_whose_largest_numbers_do_not(tmp_path: Path, nested: dict[str, Any], rule: str) -> None:
    packed = tmp_path / "packed"
    fourbit_network(make_base(tmp_path / "plain", OWN["llama"]), nested=True).save_pretrained(packed)
    state = load_file(packed / "model.safetensors")
    described(**nested)(state)
    save_file(state, packed / "model.safetensors")
    with pytest.raises(ValueError, match=rule):
        loading.load(packed)


@pytest.mark.parametrize(
    "declaration", [{"quant_method": "gptq", "bits": 4}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, 4]
)
def test_other_quantisations_are_refused(fourbit: Path, declaration: Any) -> None:
    config = json.loads((fourbit / "config.json").read_text())
    (fourbit / "config.json").write_text(json.dumps(config | {"quantization_config": declaration}))
    with pytest.raises(ValueError, match="only the 4 bits of bitsandbytes are computed here"):
        loading.load(fourbit)
    config["model_type"] = "gpt2"
    (fourbit / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="4 bits are computed for the Llama family alone"):
        loading.load(fourbit)


def test_without_the_library_it_is_said_how_to_get_it(fourbit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ValueError, match=r"pip install 'tunesmith\[bitsandbytes\]'"):
        loading.load(fourbit)
