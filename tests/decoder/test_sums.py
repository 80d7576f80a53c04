"""Sums of blocks of products, in tiles and in registers, equal to numpy's; single rows equal to blocks to the bit.

Legend: S = steps of depth.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.tiles import built

SIDE, DEEP = 32, 64
Generator = np.random.Generator


@pytest.fixture(scope="module", params=["tiles", "vectors"])
def sums(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    source = Path(__file__).parents[1] / "native" / "sums.cpp"
    return built(source, tmp_path_factory.mktemp("sums") / "sums.so", vectors=request.param == "vectors")


def _address(array: NDArray[np.generic]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def _size(size: int) -> ctypes.c_int64:
    return ctypes.c_int64(size)


def _aligned(count: int) -> NDArray[np.float32]:
    room = np.zeros(count + 16, dtype=np.float32)
    first = -room.ctypes.data % 64 // 4
    return room[first : first + count]


def _numbers(generator: Generator, *shape: int) -> NDArray[np.float32]:
    """Whole numbers, of which every product and sum is exact in bf16 and fp32."""
    return generator.integers(-8, 9, size=shape).astype(np.float32)


def _bf16(of: NDArray[np.float32]) -> NDArray[np.uint16]:
    return (np.ascontiguousarray(of).view(np.uint32) >> 16).astype(np.uint16)


def _by_pairs(of: NDArray[np.float32]) -> NDArray[np.uint16]:
    """A depth of 32 by 32 columns as two tiles: 16 columns, pairs of the depth one after another."""
    return _bf16(of.reshape(16, 2, 2, 16).transpose(2, 0, 3, 1))


@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("bottom", [True, False])
@pytest.mark.parametrize("right", [True, False])
def test_halves_are_added_to_what_there_was(sums: ctypes.CDLL, steps: int, bottom: bool, right: bool) -> None:
    generator = np.random.default_rng(steps)
    a, b = _numbers(generator, steps, SIDE, SIDE), _numbers(generator, steps, SIDE, SIDE)
    apart = 3  # blocks from one step of `a` to the next
    spread = np.full((max(1, steps), apart, SIDE, SIDE), 0x7FC0, dtype=np.uint16)  # no number lies between
    for step in range(steps):
        spread[step, 0] = _bf16(a[step])
    packed = np.stack([_by_pairs(block) for block in b]) if steps else np.zeros(1, dtype=np.uint16)
    c = _aligned(SIDE * SIDE)
    before = _numbers(generator, SIDE, SIDE)
    c[:] = before.ravel()

    sums.tested_product(
        _address(spread), _size(apart * SIDE * SIDE), _address(packed), _size(steps), bottom, right, _address(c)
    )

    there = np.ones((SIDE, SIDE), dtype=bool)
    there[SIDE // 2 :] &= bottom
    there[:, SIDE // 2 :] &= right
    expected = np.where(there, before + np.einsum("sik,skj->ij", a, b), before)
    np.testing.assert_array_equal(c.reshape(SIDE, SIDE), expected)


def test_other_work_is_done_once_a_step(sums: ctypes.CDLL) -> None:
    generator = np.random.default_rng(7)
    a, b = _numbers(generator, 4, SIDE, SIDE), _numbers(generator, 4, SIDE, SIDE)
    packed_a, packed_b = _bf16(a), np.stack([_by_pairs(block) for block in b])
    c = _aligned(SIDE * SIDE)
    sums.tested_meanwhile.restype = ctypes.c_int64
    called = sums.tested_meanwhile(_address(packed_a), _address(packed_b), _size(4), _address(c))
    assert called == 1 + 2 + 3 + 4
    top = np.einsum("sik,skj->ij", a, b)[: SIDE // 2]
    np.testing.assert_array_equal(c.reshape(SIDE, SIDE)[: SIDE // 2], top)
    assert not c[SIDE * SIDE // 2 :].any()


@pytest.mark.parametrize("steps", [1, 3])
def test_products_of_eight_bits_are_exact(sums: ctypes.CDLL, steps: int) -> None:
    generator = np.random.default_rng(steps)
    a = generator.integers(-128, 128, size=(steps, SIDE, DEEP), dtype=np.int8)
    b = generator.integers(0, 256, size=(steps, DEEP, SIDE), dtype=np.uint8)
    tiles = np.ascontiguousarray(b.reshape(steps, DEEP // 4, 4, 2, SIDE // 2).transpose(3, 0, 1, 4, 2))
    c = _aligned(SIDE * SIDE)
    sums.tested_eight(
        _address(a), _size(SIDE * DEEP), _address(tiles[0]), _address(tiles[1]), _size(steps), _address(c)
    )
    expected = np.einsum("sik,skj->ij", a.astype(np.int32), b.astype(np.int32))
    np.testing.assert_array_equal(c.view(np.int32).reshape(SIDE, SIDE), expected)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_row_by_itself_has_the_bits_of_its_block(sums: ctypes.CDLL, steps: int) -> None:
    generator = np.random.default_rng(steps)
    rounded = np.uint32(0xFFFF0000)  # to what bf16 can be
    a, b = (generator.standard_normal((steps, SIDE, SIDE), dtype=np.float32).view(np.uint32) & rounded for _ in "ab")
    packed_b = np.stack([_by_pairs(block) for block in b.view(np.float32)])
    packed_a, row = _bf16(a.view(np.float32)), np.ascontiguousarray(a.view(np.float32)[:, 0])
    c = _aligned(2 * SIDE)
    sums.tested_row(_address(packed_a), _address(row), _address(packed_b), _size(steps), _address(c))
    np.testing.assert_array_equal(c[:SIDE], c[SIDE:])
    np.testing.assert_allclose(c[:SIDE], np.einsum("sk,skj->j", row, b.view(np.float32)), atol=1e-4)
