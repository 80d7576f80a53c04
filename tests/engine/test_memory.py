from __future__ import annotations

import gc

from tunesmith.engine.memory import PAGE_BYTES, SLAB_BYTES, Pieces, Slots, empty


class Owner:
    pass


def test_pieces_do_not_overlap_and_begin_at_cache_lines() -> None:
    take = Pieces()
    pieces = [take(size) for size in (100, 64, 1, SLAB_BYTES + 1, 5_000_000, SLAB_BYTES - 5_000_000)]
    for number, piece in enumerate(pieces):
        piece.fill_(number)
    for number, piece in enumerate(pieces):
        assert piece.data_ptr() % 64 == 0
        assert bool((piece == number).all())


def test_large_memory_begins_at_a_large_page() -> None:
    memory = empty(3 * PAGE_BYTES)
    assert memory.data_ptr() % PAGE_BYTES == 0
    assert len(memory) == 3 * PAGE_BYTES
    assert int(memory.fill_(7)[-1]) == 7


def test_a_slot_goes_to_the_next_of_its_size_when_its_owner_is_gone() -> None:
    slots, first, second = Slots(), Owner(), Owner()
    mine = slots.take(1_000, first).data_ptr()
    assert slots.take(1_000, second).data_ptr() != mine
    del first
    gc.collect()
    assert slots.take(2_000, second).data_ptr() != mine
    assert slots.take(1_000, second).data_ptr() == mine
