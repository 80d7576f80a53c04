from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.rows import random_lora
from tunesmith.adapters import checkpoint
from tunesmith.decoder import llama
from tunesmith.training.batches import Row
from tunesmith.training.packing import micro_batches


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
def test_peft_reads_the_folder_and_computes_the_same(tiny_base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    model = llama.load(tiny_base)
    lora = random_lora(model.config.layout, rank=4, alpha=8.0)
    checkpoint.save(lora, tmp_path, base_name_or_path="tiny", rank=4, alpha=8.0)

    theirs = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), str(tmp_path))
    ids = torch.randint(0, model.config.vocabulary_size, (23,), generator=torch.Generator().manual_seed(2))
    (batch,) = micro_batches([Row(array("i", ids.tolist()), 1)], prompt_loss_weight=0.0)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        loaded, _ = checkpoint.load(tmp_path, model.config.layout)
        ours = model.logits(model.hidden(batch.token_ids_N, batch.positions_N, batch.attend, loaded))
        base = model.logits(model.hidden(batch.token_ids_N, batch.positions_N, batch.attend))
    assert (ours - expected).abs().max() < 1e-4
    assert (base - expected).abs().max() > 0.1  # the adapter says something


def test_equal_adapters_give_equal_bytes_and_no_path(tiny_base: Path, tmp_path: Path) -> None:
    lora = random_lora(llama.load(tiny_base).config.layout, rank=2, alpha=4.0)
    for name in ("one", "two"):
        checkpoint.save(lora, tmp_path / name, base_name_or_path="tiny", rank=2, alpha=4.0)

    for name in (checkpoint.CONFIG, checkpoint.WEIGHTS):
        one, two = ((tmp_path / folder / name).read_bytes() for folder in ("one", "two"))
        assert one == two
        assert str(tmp_path).encode() not in one


def test_what_is_saved_is_loaded(tiny_base: Path, tmp_path: Path) -> None:
    lora = random_lora(llama.load(tiny_base).config.layout, rank=2, alpha=3.0)
    checkpoint.save(lora, tmp_path, base_name_or_path="tiny", rank=2, alpha=3.0)

    loaded, config = checkpoint.load(tmp_path, llama.load(tiny_base).config.layout)

    assert loaded.scale == 1.5
    assert config["base_model_name_or_path"] == "tiny"
    for (_, _, a), (_, _, b) in zip(lora.tensors(), loaded.tensors(), strict=True):
        assert torch.equal(a.a_RI, b.a_RI)
        assert torch.equal(a.b_OR, b.b_OR)
    assert lora.embedding is not None and loaded.embedding is not None
    assert torch.equal(lora.embedding.a_RI, loaded.embedding.a_RI)
    assert torch.equal(lora.embedding.b_OR, loaded.embedding.b_OR)


def test_the_embedding_may_be_left_out_but_not_by_half(tiny_base: Path, tmp_path: Path) -> None:
    layout = llama.load(tiny_base).config.layout
    lora = replace(random_lora(layout, rank=2, alpha=4.0), embedding=None)
    checkpoint.save(lora, tmp_path, base_name_or_path="tiny", rank=2, alpha=4.0)
    loaded, config = checkpoint.load(tmp_path, layout)

    assert loaded.embedding is None
    assert "embed_tokens" not in config["target_modules"]

    name = "base_model.model.model.embed_tokens.lora_embedding_A"
    save_file(load_file(tmp_path / checkpoint.WEIGHTS) | {name: torch.ones(2, 16_384)}, tmp_path / checkpoint.WEIGHTS)
    with pytest.raises(ValueError, match=r"no module that it covers: .*lora_embedding_A"):
        checkpoint.load(tmp_path, layout)
    with pytest.raises(ValueError, match=r"has no .*lora_embedding_B"):
        _change_config(tmp_path, target_modules=[*config["target_modules"], "embed_tokens"])
        checkpoint.load(tmp_path, layout)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.1\..*down_proj", ["embed_tokens"]])
def test_an_adapter_of_peft_that_covers_less_is_read(tiny_base: Path, tmp_path: Path, targets: list[str] | str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(4)
    base = LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    model = llama.load(tiny_base)

    lora, _ = checkpoint.load(tmp_path, model.config.layout)
    checkpoint.save(lora, tmp_path / "again", base_name_or_path="tiny", rank=4, alpha=8.0)

    ids = torch.arange(100, 120)
    (batch,) = micro_batches([Row(array("i", ids.tolist()), 1)], prompt_loss_weight=0.0)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        ours = model.logits(model.hidden(batch.token_ids_N, batch.positions_N, batch.attend, lora))
    assert (ours - expected).abs().max() < 1e-4
    if isinstance(targets, list):
        assert lora.covered() == targets
        written = load_file(tmp_path / "again" / checkpoint.WEIGHTS)
        assert written.keys() == load_file(tmp_path / checkpoint.WEIGHTS).keys()


def test_pickled_weights_are_not_read(tiny_base: Path, tmp_path: Path) -> None:
    checkpoint.save(
        random_lora(llama.load(tiny_base).config.layout, rank=2, alpha=4.0),
        tmp_path,
        base_name_or_path="b",
        rank=2,
        alpha=4.0,
    )
    (tmp_path / checkpoint.WEIGHTS).rename(tmp_path / "adapter_model.bin")

    with pytest.raises(FileNotFoundError, match="pickled weights are never read"):
        checkpoint.load(tmp_path, llama.load(tiny_base).config.layout)


@pytest.mark.parametrize(
    ("option", "value"), [("peft_type", "IA3"), ("use_dora", True), ("rank_pattern", {"q_proj": 4}), ("bias", "all")]
)
def test_an_option_that_is_not_computed_is_refused(tiny_base: Path, tmp_path: Path, option: str, value: object) -> None:
    _save_tiny(tiny_base, tmp_path)
    _change_config(tmp_path, **{option: value})

    with pytest.raises(ValueError, match=option):
        checkpoint.load(tmp_path, llama.load(tiny_base).config.layout)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("r", "4"),
        ("r", 0),
        ("r", 10**12),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", float("inf")),
        ("target_modules", 3),
        ("target_modules", [1]),
    ],
)
def test_an_option_that_is_no_such_thing_is_named(tiny_base: Path, tmp_path: Path, option: str, value: object) -> None:
    _save_tiny(tiny_base, tmp_path)
    _change_config(tmp_path, **{option: value})

    with pytest.raises(ValueError, match=f"{option} must be .* it is "):
        checkpoint.load(tmp_path, llama.load(tiny_base).config.layout)


@pytest.mark.parametrize(("content", "reason"), [("[]", "no JSON object but a list"), ("[" * 99_999, "is not JSON")])
def test_a_config_that_is_none_is_refused(tiny_base: Path, tmp_path: Path, content: str, reason: str) -> None:
    _save_tiny(tiny_base, tmp_path)
    (tmp_path / checkpoint.CONFIG).write_text(content)

    with pytest.raises(ValueError, match=reason):
        checkpoint.load(tmp_path, llama.load(tiny_base).config.layout)


def test_a_pattern_that_would_never_end_is_not_tried(tiny_base: Path, tmp_path: Path) -> None:
    _save_tiny(tiny_base, tmp_path)
    _change_config(tmp_path, target_modules=r"(.*.*)*(.*.*)*(.*.*)*x")

    loaded, _ = checkpoint.load(tmp_path, llama.load(tiny_base).config.layout)

    assert len(list(loaded.covered())) == 8


def test_a_missing_layer_a_stray_tensor_and_a_damaged_file_are_named(tiny_base: Path, tmp_path: Path) -> None:
    _save_tiny(tiny_base, tmp_path)
    weights = tmp_path / checkpoint.WEIGHTS
    whole = load_file(weights)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"

    save_file({key: value for key, value in whole.items() if key != name}, weights)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        checkpoint.load(tmp_path, llama.load(tiny_base).config.layout)

    save_file(whole | {"base_model.model.lm_head.lora_A.weight": torch.ones(1)}, weights)
    with pytest.raises(ValueError, match="lm_head"):
        checkpoint.load(tmp_path, llama.load(tiny_base).config.layout)

    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match="damaged"):
        checkpoint.load(tmp_path, llama.load(tiny_base).config.layout)


def _save_tiny(tiny_base: Path, folder: Path) -> None:
    lora = random_lora(llama.load(tiny_base).config.layout, rank=2, alpha=4.0)
    checkpoint.save(lora, folder, base_name_or_path="tiny", rank=2, alpha=4.0)


def _change_config(folder: Path, **options: object) -> None:
    config = json.loads((folder / checkpoint.CONFIG).read_text())
    (folder / checkpoint.CONFIG).write_text(json.dumps(config | options))
