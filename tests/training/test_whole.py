"""All weights in training: gradients against a plain step of transformers, and what is saved against the model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.rows import random_lora, random_rows
from tunesmith.decoder import llama
from tunesmith.decoder.llama import Llama
from tunesmith.decoder.merging import merged
from tunesmith.training.packing import micro_batches
from tunesmith.training.whole import TrainableWeights, WholeLearner
from tunesmith.training.workers import Workers

ROWS = random_rows([(5, 1), (12, 3), (1, 4), (30, 1), (7, 2)])


def _untied(model: Llama) -> Llama:
    head = model.head_VD + 0.1 * torch.randn(model.head_VD.shape, generator=torch.Generator().manual_seed(1))
    return replace(model, config=replace(model.config, tied=False), head_VD=head)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("prompt_loss_weight", [0.0, 0.5])
def test_gradients_are_those_of_transformers(
    tiny_base: Path, tmp_path: Path, tied: bool, prompt_loss_weight: float
) -> None:
    from transformers import LlamaForCausalLM

    model = llama.load(tiny_base)
    weights = TrainableWeights(model if tied else _untied(model))
    weights.save(tmp_path, tiny_base)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    total = torch.zeros(())
    for row in ROWS:
        ids = torch.tensor(row.token_ids)
        logprobs = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        of_tokens = torch.where(torch.arange(1, len(ids)) < row.completion_start, prompt_loss_weight, 1.0)
        total = total - (of_tokens * logprobs).sum()
    total.backward()

    with Workers(2) as workers:
        learner = WholeLearner(weights, workers, beat=lambda: None, dtype=torch.float32)
        tally = learner.learn(ROWS, prompt_loss_weight=prompt_loss_weight, max_tokens=40)
        again = weights.flat_gradient.clone()
        learner.learn(ROWS, prompt_loss_weight=prompt_loss_weight, max_tokens=40)

    assert torch.equal(again, weights.flat_gradient)
    assert tally.loss == pytest.approx(total.item() / tally.weight, rel=1e-5)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    found = weights.model.over(weights.parts(weights.flat_gradient * tally.weight)).state()
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient is not None
        assert (found[name] - gradient).abs().max() < 2e-5 * gradient.abs().max().clamp(min=1), name
        assert gradient.abs().max() > 1e-4  # there is something to compare


def test_in_bf16_the_gradient_points_the_same_way(tiny_base: Path) -> None:
    weights = TrainableWeights(llama.load(tiny_base))
    (batch,) = micro_batches(ROWS, prompt_loss_weight=0.1)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        (view,) = weights.views(1)
        view.flat_gradient.zero_()
        weights.learn(batch, view, 1.0, dtype)
        found.append(view.flat_gradient.clone())
    assert torch.cosine_similarity(*found, dim=0) > 0.99
    assert not torch.equal(*found)


def test_what_is_saved_is_the_model_as_it_is_now(tiny_base: Path, tmp_path: Path) -> None:
    weights = TrainableWeights(llama.load(tiny_base))
    weights.flat.add_(0.01)
    for name in ("one", "two"):
        weights.save(tmp_path / name, tiny_base)

    saved = llama.load(tmp_path / "one")
    assert [torch.equal(a, b) for a, b in zip(saved.parameters(), weights.parts(weights.flat), strict=True)] == [
        True
    ] * len(list(saved.parameters()))
    for file in sorted((tmp_path / "one").iterdir()):
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()
        assert str(tmp_path).encode() not in file.read_bytes()
    assert (tmp_path / "one" / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("embedding", [True, False])
def test_a_merged_adapter_says_what_it_said_beside_its_base(tiny_base: Path, tmp_path: Path, embedding: bool) -> None:
    model = llama.load(tiny_base)
    lora = random_lora(model.config.layout, rank=4, alpha=8.0)
    lora = lora if embedding else replace(lora, embedding=None)
    (batch,) = micro_batches(ROWS, prompt_loss_weight=0.0)

    whole = merged(model, lora)
    TrainableWeights(whole).save(tmp_path, tiny_base)
    loaded = llama.load(tmp_path)

    arguments = (batch.token_ids_N, batch.positions_N, batch.attend)
    expected = model.logits(model.hidden(*arguments, lora))
    assert (loaded.logits(loaded.hidden(*arguments)) - expected).abs().max() < 1e-4
    assert (model.logits(model.hidden(*arguments)) - expected).abs().max() > 0.1
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is not embedding
