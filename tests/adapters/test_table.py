"""Adapters in a table add what each adds by itself, whatever was in their places before."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from tests.training.rows import random_lora, random_model
from tunesmith.adapters.stack import AdapterStacks, PackedAdapter
from tunesmith.adapters.table import PATIENCE, AdapterTable

MOST_BYTES = 1 << 30
LAYOUT = random_model(vocabulary=64).config.layout


def _adapter(seed: int, *, rank: int = 4, embedding: bool = True) -> PackedAdapter:
    lora = random_lora(LAYOUT, rank=rank, alpha=8.0, seed=seed)
    return PackedAdapter.from_lora(lora if embedding else replace(lora, embedding=None), torch.float32, "cpu")


def _assert_right(table: AdapterTable, adapters: list[PackedAdapter | None]) -> None:
    """By what a batch of one adapter gives (`adapters.stack`, which is held against plain adapters)."""
    chance = torch.Generator().manual_seed(len(adapters))
    places = table.places(adapters)
    assert places is not None
    placed = table.at(torch.tensor(places))
    token_ids_N = torch.randint(0, 64, (len(adapters),), generator=chance)
    inputs = {
        site: torch.randn(len(adapters), linears[0].inputs, generator=chance)
        for site, linears in LAYOUT.layers[1].items()
    }
    found = {site: placed.delta(1, site, x_NI) for site, x_NI in inputs.items()}
    embedded = placed.embedding_delta(token_ids_N)
    for row, adapter in enumerate(adapters):
        alone = None if adapter is None else AdapterStacks().mix(0, [(adapter, 1)])
        for site, x_NI in inputs.items():
            expected = torch.zeros(1, found[site].shape[1]) if alone is None else alone.delta(1, site, x_NI[[row]])
            torch.testing.assert_close(found[site][[row]], expected)
        delta = None if alone is None else alone.embedding_delta(token_ids_N[[row]])
        if embedded is None:
            assert delta is None
        else:
            torch.testing.assert_close(embedded[[row]], torch.zeros_like(embedded[[row]]) if delta is None else delta)


def test_each_token_gets_what_its_adapter_adds() -> None:
    table, (one, other) = AdapterTable(MOST_BYTES), (_adapter(1), _adapter(2, embedding=False))
    _assert_right(table, [one])
    _assert_right(table, [None, one, None, other, one])
    _assert_right(table, [other])


def test_adapters_come_and_go_through_few_places() -> None:
    chance, table = random.Random(0), AdapterTable(MOST_BYTES)
    adapters = [_adapter(seed, embedding=seed % 2 == 0) for seed in range(9)]
    for _ in range(20):
        _assert_right(table, [chance.choice([None, *adapters]) for _ in range(3)])
    assert len(table._used_at) == 4
    assert table.version <= 3


def test_what_takes_too_much_memory_is_not_placed() -> None:
    low, high, others = _adapter(1), _adapter(2, rank=40), [_adapter(seed) for seed in range(3, 9)]
    one_bytes = sum(factor.nbytes for layer in low.factors for pair in layer.values() for factor in pair)
    assert low.embedding is not None
    one_bytes += sum(factor.nbytes for factor in low.embedding)
    table = AdapterTable(10 * one_bytes)
    assert table.places([high]) is None
    _assert_right(table, [low, None, *others])
    assert table.places([low, high]) is None
    _assert_right(table, [low, *others])
    roomy = AdapterTable(25 * one_bytes)
    _assert_right(roomy, [high])
    answers = [roomy.places([low, *others]) for _ in range(PATIENCE)]
    assert answers.index(None) == 0 and answers[-1] is not None  # it is not laid out anew again and again
    _assert_right(roomy, [low, *others])
    assert roomy.version == 2


def test_higher_ranks_and_the_first_embedding_make_a_new_table() -> None:
    table = AdapterTable(MOST_BYTES)
    low, high, embedded = _adapter(1, embedding=False), _adapter(2, rank=9, embedding=False), _adapter(3)
    for version, adapters in enumerate(([low], [high], [low, high], [embedded], [low, embedded]), start=1):
        _assert_right(table, [None, *adapters])
        assert table.version <= version
    before = table.version
    _assert_right(table, [high, low])
    assert table.version == before


def test_an_adapter_that_nobody_has_any_more_is_not_kept() -> None:
    table, kept = AdapterTable(MOST_BYTES), _adapter(1)
    table.places([kept, _adapter(2)])
    assert list(table._place_of) == [kept]


@pytest.mark.parametrize("again", [1, 5])
def test_places_stay_while_there_is_room(again: int) -> None:
    table, adapters = AdapterTable(MOST_BYTES), [_adapter(seed) for seed in range(3)]
    first = table.places(adapters)
    for _ in range(again):
        assert table.places(adapters[::-1]) == first[::-1]
    assert table.version == 1
