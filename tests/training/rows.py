"""Models, rows, adapters and run folders for tests of the trainer."""

from __future__ import annotations

import json
from array import array
from dataclasses import replace
from pathlib import Path

import torch

from pretraining.shapes import SHAPES, random_llama
from tunesmith.adapters.lora import Layout, Lora, initial
from tunesmith.decoder.llama import Llama
from tunesmith.rundir import ResolvedHyperparameters, RunDir, RunSpec
from tunesmith.training.batches import Row

LABELS = (" positive", " negative")
VOCABULARY = 4_096
"""Of random models: a quarter of that in the box, for the head is most of what they compute."""


def random_lora(layout: Layout, *, rank: int, alpha: float, seed: int = 3) -> Lora:
    """An adapter with both factors random, so that it changes every product and the embeddings."""
    chance = torch.Generator().manual_seed(seed)
    lora = initial(layout, rank=rank, alpha=alpha, generator=chance)
    for _, _, part in lora.tensors():
        part.b_OR.normal_(std=0.1, generator=chance)
    if lora.embedding is not None:
        lora.embedding.a_RI.normal_(std=0.02, generator=chance)
    return lora


def random_model(
    *,
    head_width: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    bias: bool = False,
    vocabulary: int = VOCABULARY,
    tied: bool = True,
    qk_norm: bool = False,
) -> Llama:
    """A small Llama for compiled steps, each weight random: gains and biases too."""
    chance = torch.Generator().manual_seed(5)
    shape = replace(
        SHAPES["tiny"],
        width=96,
        layers=3,
        heads=heads,
        kv_heads=kv_heads,
        head_width=head_width,
        feed_forward_width=288,
        vocabulary_size=vocabulary,
    )
    model = random_llama(shape, chance)
    for parameter in model.parameters():
        parameter += 0.05 * torch.randn(parameter.shape, generator=chance)
    if qk_norm:
        model = replace(model, config=replace(model.config, qk_norm=True))
        for layer in model.layers:
            layer.q_norm_d, layer.k_norm_d = (1 + 0.3 * torch.randn(head_width, generator=chance) for _ in "qk")
    if bias:
        model = replace(model, config=replace(model.config, qkv_bias=True))
        for layer in model.layers:
            layer.qkv_bias = torch.randn(len(layer.qkv), generator=chance) * 0.1
    if not tied:
        head_VD = model.head_VD + 0.1 * torch.randn(model.head_VD.shape, generator=chance)
        model = replace(model, config=replace(model.config, tied=False), head_VD=head_VD)
    return model


def extreme_attention() -> Llama:
    """A model whose tokens look away from themselves: their own scores are 140 below the largest."""
    model = random_model(bias=True, vocabulary=16_384)
    for layer in model.layers:
        assert layer.qkv_bias is not None
        q, k, _ = layer.qkv_bias.split([4 * 32, 2 * 32, 2 * 32])
        for part, value in ((q, 20.0), (k, -20.0)):
            part.view(-1, 32)[:, [0, 16]] = value * 0.5**0.5  # the pair that turns by one radian a token
    return model


def extreme_head() -> Llama:
    """A model whose logits lie hundreds apart."""
    model = random_model(vocabulary=16_384)
    model.norm_D *= 300.0
    return model


def random_rows(lengths: list[tuple[int, int]], *, seed: int = 7, vocabulary: int = VOCABULARY) -> list[Row]:
    """Rows of (prompt, completion) tokens each."""
    chance = torch.Generator().manual_seed(seed)
    return [
        Row(array("i", torch.randint(0, vocabulary, (prompt + completion,), generator=chance).tolist()), prompt)
        for prompt, completion in lengths
    ]


def examples(n: int) -> list[dict[str, str]]:
    """Sentences whose label can be learnt: it depends on one word."""
    words = ("good", "bad", "fine day", "sad rain", "great food and a long walk home", "awful")
    return [{"prompt": f"row {i}: {words[i % 6]} ->", "completion": LABELS[i % 2]} for i in range(n)]


def make_run(
    folder: Path,
    base: Path,
    *,
    train: list[dict[str, str]],
    valid: list[dict[str, str]] | None = None,
    hyperparameters: ResolvedHyperparameters,
    checkpoint_interval_s: float = 1e9,
    parent_adapter_dir: Path | None = None,
    context_tokens: int = 2_048,
    base_learning_rate: float = 0.05,
) -> RunDir:
    """A run folder as the platform prepares it."""
    run_dir = RunDir(folder)
    folder.mkdir(parents=True)
    run_dir.training_file.write_text("".join(json.dumps(example) + "\n" for example in train))
    if valid is not None:
        run_dir.validation_file.write_text("".join(json.dumps(example) + "\n" for example in valid))
    run_dir.write_spec(
        RunSpec(
            run_id=folder.name,
            job_id="ft-test",
            base_dir=str(base),
            parent_adapter_dir=None if parent_adapter_dir is None else str(parent_adapter_dir),
            context_tokens=context_tokens,
            hyperparameters=hyperparameters,
            base_learning_rate=base_learning_rate,
            lora_rank=4,
            lora_alpha=8.0,
            seed=11,
            threads=1,
            checkpoint_interval_s=checkpoint_interval_s,
            precision="float32",
        )
    )
    return run_dir


CLASSIFY = ResolvedHyperparameters(
    n_epochs=3,
    batch_size=4,
    learning_rate_multiplier=0.1,
    prompt_loss_weight=0.01,
    compute_classification_metrics=True,
    classification_n_classes=2,
    classification_positive_class=LABELS[0],
    classification_betas=(1.0, 0.5),
)
"""Binary classification with every column of results.csv."""
