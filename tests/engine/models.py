"""Random adapters for tests, and what a plain forward of one model alone says of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.adapters import checkpoint
from tunesmith.adapters.lora import SITE_LAYERS, Lora, LowRank
from tunesmith.decoder import llama


def make_adapter(base_dir: Path, folder: Path, *, seed: int, rank: int = 4, alpha: float = 8.0) -> Path:
    """Saves an adapter whose factors are all random, so that it changes every product; returns the folder.

    Deltas are about half as large as what they are added to: with much larger ones attention saturates, and the
    rounding of a plain fp32 forward alone exceeds 1e-4 nats.
    """
    generator = torch.Generator().manual_seed(seed)
    model = llama.load(base_dir)
    config = model.config
    widths = {
        "self_attn.q_proj": (config.width, config.query_width),
        "self_attn.k_proj": (config.width, config.key_width),
        "self_attn.v_proj": (config.width, config.key_width),
        "self_attn.o_proj": (config.query_width, config.width),
        "mlp.gate_proj": (config.width, config.feed_forward_width),
        "mlp.up_proj": (config.width, config.feed_forward_width),
        "mlp.down_proj": (config.feed_forward_width, config.width),
    }
    names = [name for site in SITE_LAYERS.values() for name in site]

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    factors = tuple(
        {
            name: LowRank(random(rank, widths[name][0]), random(widths[name][1], rank) * 0.5 * rank / alpha)
            for name in names
        }
        for _ in range(config.layers)
    )
    lora = Lora(factors, alpha / rank)
    checkpoint.save(lora, folder, base_name_or_path=str(base_dir), rank=rank, alpha=alpha)
    return folder


@torch.inference_mode()
def plain_logprobs(base_dir: Path, adapter_dir: Path | None, token_ids: Sequence[int]) -> Tensor:
    """Log-probabilities [T, V] of the token after each of `token_ids`, from one forward over the whole row."""
    model = llama.load(base_dir)
    lora = checkpoint.load(adapter_dir)[0] if adapter_dir else None

    def attend(layer: int, q_NHd: Tensor, k_NKd: Tensor, v_NKd: Tensor) -> Tensor:
        groups = q_NHd.shape[1] // k_NKd.shape[1]
        k_NHd, v_NHd = k_NKd.repeat_interleave(groups, 1), v_NKd.repeat_interleave(groups, 1)
        q, k, v = (x.transpose(0, 1) for x in (q_NHd, k_NHd, v_NHd))
        scores = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
        future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        return (scores.masked_fill(future, -torch.inf).softmax(-1) @ v).transpose(0, 1)

    ids = torch.tensor(token_ids)
    hidden = model.hidden(ids, torch.arange(len(token_ids)), attend, lora)
    return model.logits(hidden).float().log_softmax(-1)
