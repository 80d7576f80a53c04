from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from tunesmith.adapters.lora import EMBEDDING_STEPS, Layout, Linear, initial

SITES = {
    "qkv": (
        Linear("self_attn.q_proj", 12, 8),
        Linear("self_attn.k_proj", 4, 8),
        Linear("self_attn.v_proj", 4, 8),
    ),
    "o": (Linear("self_attn.o_proj", 8, 12),),
}
LAYOUT = Layout("model.layers", (SITES, {"fc": (Linear("fc", 16, 8),)}))


def test_initial_factors_are_drawn_as_peft_draws_them() -> None:
    lora = initial(LAYOUT, rank=3, alpha=6.0, generator=torch.Generator().manual_seed(5))

    reference = torch.Generator().manual_seed(5)
    for (_, _, part), (_, linear) in zip(lora.tensors(), LAYOUT.linears(), strict=True):
        expected = torch.empty(3, linear.inputs)
        torch.nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=reference)
        assert torch.allclose(part.a_RI, expected, atol=1e-7)
        assert torch.equal(part.b_OR, torch.zeros(linear.outputs, 3))
    assert (lora.scale, lora.rank) == (2.0, 3)


def test_the_embedding_starts_with_nothing_and_moves_alike_at_every_rank() -> None:
    layout = replace(LAYOUT, embedding=Linear("model.embed_tokens", outputs=8_000, inputs=5))
    for rank, alpha in ((16, 32.0), (4, 512.0)):
        lora = initial(layout, rank=rank, alpha=alpha, generator=torch.Generator().manual_seed(5))
        assert lora.embedding is not None
        assert lora.embedding_delta(torch.arange(5)).abs().max() == 0  # type: ignore[union-attr]
        # A step of the optimizer moves every entry of a token's row of A by one learning rate, up or down.
        lora.embedding.a_RI.fill_(1.0)
        moved = lora.embedding_delta(torch.tensor([3]))
        assert moved is not None
        assert float(moved.square().mean().sqrt()) == pytest.approx(EMBEDDING_STEPS, rel=0.05)


def test_what_is_no_target_adds_nothing_and_has_no_gradient() -> None:
    layout = replace(LAYOUT, embedding=Linear("model.embed_tokens", outputs=8, inputs=5))
    assert layout.targets() == ["q_proj", "k_proj", "v_proj", "o_proj", "fc", "embed_tokens"]
    chance = torch.Generator().manual_seed(5)
    lora = initial(layout, rank=2, alpha=4.0, generator=chance, targets=["q_proj", "fc"])

    assert lora.embedding is None
    assert lora.covered() == ["q_proj", "fc"]
    parts = [tensor.requires_grad_() for _, _, part in lora.tensors() for tensor in (part.a_RI, part.b_OR)]
    delta = lora.delta(0, "qkv", torch.randn(5, 8, generator=chance))
    assert delta is not None
    gradients = torch.autograd.grad(delta.square().sum() + delta.sum(), parts, allow_unused=True)
    moved = {
        name for (_, name, part), b in zip(lora.tensors(), gradients[1::2], strict=True) if b is not None and b.any()
    }
    assert moved == {"self_attn.q_proj"}


def test_tensors_come_in_the_order_of_the_layout() -> None:
    lora = initial(LAYOUT, rank=1, alpha=1.0, generator=torch.Generator().manual_seed(0))

    first = [f"self_attn.{part}_proj" for part in "qkvo"]
    assert [(layer, name) for layer, name, _ in lora.tensors()] == [*((0, name) for name in first), (1, "fc")]


@pytest.mark.parametrize("site", SITES)
def test_delta_is_the_product_of_each_layer_side_by_side(site: str) -> None:
    lora = initial(LAYOUT, rank=3, alpha=6.0, generator=torch.Generator().manual_seed(0))
    chance = torch.Generator().manual_seed(1)
    for _, _, part in lora.tensors():
        part.b_OR.normal_(generator=chance)
    x = torch.randn(5, SITES[site][0].inputs, generator=chance)

    expected = torch.cat([2.0 * x @ part.a_RI.T @ part.b_OR.T for part in lora.parts(0, site)], dim=-1)
    assert torch.allclose(lora.delta(0, site, x), expected, atol=1e-5)  # type: ignore[arg-type]
