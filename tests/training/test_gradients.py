"""The trainer's loss and gradients against a plain step of transformers and PEFT, and against each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.training.rows import random_lora, random_rows
from tunesmith.adapters import checkpoint
from tunesmith.decoder import llama
from tunesmith.decoder.llama import Llama
from tunesmith.training.batches import Row
from tunesmith.training.factors import TrainableLora
from tunesmith.training.gradients import Learner, Lesson
from tunesmith.training.workers import Workers

ROWS = random_rows([(5, 1), (12, 3), (1, 4), (30, 1), (7, 2)])


@pytest.fixture(scope="module")
def model(tiny_base: Path) -> Llama:
    return llama.load(tiny_base)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers for it
@pytest.mark.parametrize("prompt_loss_weight", [0.0, 0.01, 1.0])
def test_loss_and_gradients_are_those_of_transformers_and_peft(
    tiny_base: Path, tmp_path: Path, model: Llama, prompt_loss_weight: float
) -> None:
    from peft import PeftModel
    from transformers import LlamaForCausalLM

    lora = random_lora(model.config.layout, rank=4, alpha=8.0)
    checkpoint.save(lora, tmp_path, base_name_or_path="tiny", rank=4, alpha=8.0)
    theirs = PeftModel.from_pretrained(
        LlamaForCausalLM.from_pretrained(tiny_base, dtype=torch.float32), str(tmp_path), is_trainable=True
    )
    total, weight = torch.zeros(()), 0.0
    for row in ROWS:
        ids = torch.tensor(row.token_ids)
        logprobs = theirs(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None]).squeeze(1)
        weights = torch.where(torch.arange(1, len(ids)) < row.completion_start, prompt_loss_weight, 1.0)
        total, weight = total - (weights * logprobs).sum(), weight + float(weights.sum())
    (total / weight).backward()
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.requires_grad}

    loss, gradients = _step(model, ROWS, prompt_loss_weight)

    assert loss == pytest.approx(total.item() / weight, abs=1e-5)
    assert gradients.keys() == {name.replace(".default", "") for name in expected}
    for name, gradient in expected.items():
        assert gradient is not None
        assert (gradients[name.replace(".default", "")] - gradient).abs().max() < 1e-5 * gradient.abs().max().clamp(
            min=1
        ), name
        assert gradient.abs().max() > 1e-4  # there is something to compare


@pytest.mark.parametrize(("max_tokens", "threads"), [(1, 1), (20, 1), (1_000, 2), (20, 3), (1_000, 8)])
def test_how_a_step_is_cut_does_not_matter(model: Llama, max_tokens: int, threads: int) -> None:
    whole_loss, whole = _step(model, ROWS, 0.01)

    loss, gradients = _step(model, ROWS, 0.01, max_tokens=max_tokens, threads=threads)

    assert loss == pytest.approx(whole_loss, abs=1e-6)
    for name, gradient in whole.items():
        assert (gradients[name] - gradient).abs().max() < 1e-6 * max(1.0, gradient.abs().max()), name


def test_steps_on_threads_are_repeatable_to_the_bit(model: Llama) -> None:
    _, once = _step(model, ROWS, 0.01, threads=3)
    _, again = _step(model, ROWS, 0.01, threads=3)

    assert all(torch.equal(once[name], again[name]) for name in once)


def test_the_factors_in_training_add_what_the_adapter_adds(model: Llama) -> None:
    lora = random_lora(model.config.layout, rank=4, alpha=8.0)
    factors = TrainableLora(lora)
    chance = torch.Generator().manual_seed(0)
    for layer, sites in enumerate(lora.layout.layers):
        for site, linears in sites.items():
            x = torch.randn(6, linears[0].inputs, generator=chance)
            expected = lora.delta(layer, site, x)
            assert torch.allclose(factors.views(1)[0].delta(layer, site, x), expected, atol=1e-6)
            assert torch.allclose(factors.lora.delta(layer, site, x), expected, atol=1e-6)
    ids = torch.tensor([5, 0, 5, 16_383])
    expected = lora.embedding_delta(ids)
    assert expected is not None and expected.abs().min() > 0
    assert torch.allclose(factors.views(1)[0].embedding_delta(ids), expected, atol=1e-6)
    assert torch.allclose(factors.lora.embedding_delta(ids), expected, atol=1e-6)


def test_an_adapter_that_leaves_the_embedding_alone_goes_on_so(model: Llama) -> None:
    lora = replace(random_lora(model.config.layout, rank=4, alpha=8.0), embedding=None)

    factors = TrainableLora(lora)

    assert factors.lora.embedding is None
    assert factors.views(1)[0].embedding_delta(torch.tensor([1])) is None
    assert len(factors.flat) == sum(part.a_RI.numel() + part.b_OR.numel() for _, _, part in lora.tensors())


def test_all_tokens_of_a_long_row_count_once(model: Llama) -> None:
    (row,) = random_rows([(700, 500)])  # several chunks of the vocabulary product
    factors = TrainableLora(random_lora(model.config.layout, rank=4, alpha=8.0))

    with Workers(1) as workers:
        learner = Learner(model, factors.site_outputs, workers, beat=lambda: None)
        (tally,) = learner.learn([Lesson(factors, [row], 0.5)])

    assert tally.weight == 699 * 0.5 + 500
    assert (tally.tokens, tally.sequences) == (500, 1)


def _step(
    model: Llama, rows: list[Row], prompt_loss_weight: float, *, max_tokens: int = 10_000, threads: int = 1
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss, and gradients by the names of PEFT."""
    factors = TrainableLora(random_lora(model.config.layout, rank=4, alpha=8.0))
    with Workers(threads) as workers:
        learner = Learner(model, factors.site_outputs, workers, beat=lambda: None)
        (tally,) = learner.learn([Lesson(factors, rows, prompt_loss_weight, max_tokens)])
    factors.flat.copy_(factors.flat_gradient)  # `lora` is a view of it: now it names the gradients
    named = {}
    for layer, name, part in factors.lora.tensors():
        for letter, tensor in (("A", part.a_RI), ("B", part.b_OR)):
            named[f"base_model.model.model.layers.{layer}.{name}.lora_{letter}.weight"] = tensor.clone()
    assert factors.lora.embedding is not None
    for letter, tensor in (("A", factors.lora.embedding.a_RI), ("B", factors.lora.embedding.b_OR)):
        named[f"base_model.model.model.embed_tokens.lora_embedding_{letter}"] = tensor.clone()
    return tally.loss, named
