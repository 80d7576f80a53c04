"""Random adapters for tests, and what a plain forward of one model alone says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.adapters import checkpoint
from tunesmith.adapters.lora import Lora, LowRank
from tunesmith.decoder import loading


def make_adapter(base_dir: Path, folder: Path, *, seed: int, rank: int = 4, alpha: float = 8.0) -> Path:
    """Saves an adapter whose factors are all random, so that it changes every product; returns the folder.

    Deltas are about half as large as what they are added to: with much larger ones attention saturates, and the
    rounding of a plain fp32 forward alone exceeds 1e-4 nats.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = loading.load(base_dir).config.layout

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    factors: tuple[dict[str, LowRank], ...] = tuple({} for _ in layout.layers)
    for layer, linear in layout.linears():
        a_RI, b_OR = random(rank, linear.inputs), random(linear.outputs, rank) * 0.5 * rank / alpha
        factors[layer][linear.name] = LowRank(a_RI, b_OR)
    embedding = None
    if layout.embedding is not None and seed % 2:  # some adapters leave the embeddings alone
        a_RV, b_DR = random(rank, layout.embedding.inputs), random(layout.embedding.outputs, rank)
        embedding = LowRank(a_RV * layout.embedding.inputs**0.5, b_DR * 0.01 * rank / alpha)
    lora = Lora(layout, factors, alpha / rank, embedding)
    checkpoint.save(lora, folder, base_name_or_path=str(base_dir), rank=rank, alpha=alpha)
    return folder


@torch.inference_mode()
def plain_logprobs(base_dir: Path, adapter_dir: Path | None, token_ids: Sequence[int]) -> Tensor:
    """Log-probabilities [T, V] of the token after each of `token_ids`, from one forward over the whole row."""
    model = loading.load(base_dir)
    lora = checkpoint.load(adapter_dir, model.config.layout)[0] if adapter_dir else None

    def attend(layer: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor, *, window: int | None = None) -> Tensor:
        groups = q_NHd.shape[1] // k_NKd.shape[1]
        k_NHd, v_NHd = k_NKd.repeat_interleave(groups, 1), v_NKd.repeat_interleave(groups, 1)
        q, k, v = (x.transpose(0, 1) for x in (q_NHd, k_NHd, v_NHd))
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        seen = torch.ones(scores.shape[1:], dtype=torch.bool).tril().triu(1 - (window or len(token_ids)))
        return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(0, 1)

    ids = torch.tensor(token_ids)
    hidden = model.hidden(ids, torch.arange(len(token_ids)), attend, lora)
    return model.logits(hidden).float().log_softmax(-1)
