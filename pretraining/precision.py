"""In what products are computed: bf16 on a GPU and on a processor that multiplies it, elsewhere fp32."""

from __future__ import annotations

import torch

from tunesmith.training.folded import multiplies_bf16


def products(device: str | torch.device) -> torch.dtype:
    """The dtype of products on `device`."""
    return torch.bfloat16 if torch.device(device).type != "cpu" or multiplies_bf16() else torch.float32
