from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from tunesmith.engine.blocks import BLOCK_TOKENS, BlockPool
from tunesmith.engine.kvcache import KVCache


@dataclass
class _Span:
    start: int
    end: int
    blocks: list[int]


def test_where_memory_ran_out_the_rest_grows_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = KVCache(BlockPool(64), layers=3, kv_heads=2, head_width=8, dtype=torch.float32, device=torch.device("cpu"))
    small, large = _Span(0, BLOCK_TOKENS, [0]), _Span(0, BLOCK_TOKENS, [7])
    cache.reserve([small])
    cat, calls = torch.cat, []

    def fails_later(tensors: list[torch.Tensor]) -> torch.Tensor:
        calls.append(tensors)
        if len(calls) == 5:
            raise torch.OutOfMemoryError
        return cat(tensors)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", fails_later)
        with pytest.raises(torch.OutOfMemoryError):
            cache.reserve([large])
    keys, values = cache.reserve([large])

    assert {len(each) for each in (*keys, *values)} == {8 * 2 * BLOCK_TOKENS}
