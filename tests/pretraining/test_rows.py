"""The order in which a token stream is read."""

from __future__ import annotations

import numpy as np
import pytest

from pretraining.rows import rows


@pytest.mark.parametrize("tokens", [101, 1_000, 4_096, 9_973])
def test_each_row_is_read_once_before_any_is_read_again(tokens: int) -> None:
    stream = np.arange(tokens, dtype=np.uint16)
    count = (tokens - 1) // 10
    read = rows(stream, 3, count, 10)
    assert sorted(read[:, 0].tolist()) == list(range(0, count * 10, 10))
    assert (np.diff(read, axis=1) == 1).all()
    assert (rows(stream, 3 + count, count, 10) == read).all()


def test_rows_of_a_batch_lie_far_apart() -> None:
    begins = np.sort(rows(np.arange(64_000, dtype=np.uint16), 0, 64, 10)[:, 0].astype(int))
    assert np.diff(begins).min() > 64_000 / 64 / 3


def test_a_batch_can_be_read_in_parts() -> None:
    stream = np.arange(5_000, dtype=np.uint16)
    parts = [rows(stream, first, 4, 16) for first in (40, 44)]
    assert (np.concatenate(parts) == rows(stream, 40, 8, 16)).all()


def test_a_stream_shorter_than_a_row_is_refused() -> None:
    with pytest.raises(ValueError, match="64 tokens of data are fewer than a row of 64"):
        rows(np.zeros(64, dtype=np.uint16), 0, 1, 64)
