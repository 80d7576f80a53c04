from __future__ import annotations

import math

import pytest
import torch

from tunesmith.adapters.lora import LAYER_NAMES, SITE_LAYERS, initial

SHAPES = {
    "self_attn.q_proj": (12, 8),
    "self_attn.k_proj": (4, 8),
    "self_attn.v_proj": (4, 8),
    "self_attn.o_proj": (8, 12),
    "mlp.gate_proj": (16, 8),
    "mlp.up_proj": (16, 8),
    "mlp.down_proj": (8, 16),
}


def test_initial_factors_are_drawn_as_peft_draws_them() -> None:
    lora = initial(2, SHAPES, rank=3, alpha=6.0, generator=torch.Generator().manual_seed(5))

    reference = torch.Generator().manual_seed(5)
    for _, name, part in lora.tensors():
        expected = torch.empty(3, SHAPES[name][1])
        torch.nn.init.kaiming_uniform_(expected, a=math.sqrt(5), generator=reference)
        assert torch.allclose(part.a_RI, expected, atol=1e-7)
        assert torch.equal(part.b_OR, torch.zeros(SHAPES[name][0], 3))
    assert (lora.scale, lora.rank) == (2.0, 3)


def test_tensors_come_in_a_fixed_order() -> None:
    lora = initial(2, SHAPES, rank=1, alpha=1.0, generator=torch.Generator().manual_seed(0))

    assert [(layer, name) for layer, name, _ in lora.tensors()] == [(i, name) for i in range(2) for name in LAYER_NAMES]


@pytest.mark.parametrize("site", SITE_LAYERS)
def test_delta_is_the_product_of_each_layer_side_by_side(site: str) -> None:
    lora = initial(1, SHAPES, rank=3, alpha=6.0, generator=torch.Generator().manual_seed(0))
    chance = torch.Generator().manual_seed(1)
    for _, _, part in lora.tensors():
        part.b_OR.normal_(generator=chance)
    names = SITE_LAYERS[site]  # type: ignore[index]
    x = torch.randn(5, SHAPES[names[0]][1], generator=chance)

    expected = torch.cat([2.0 * x @ lora.factors[0][n].a_RI.T @ lora.factors[0][n].b_OR.T for n in names], dim=-1)
    assert torch.allclose(lora.delta(0, site, x), expected, atol=1e-5)  # type: ignore[arg-type]
