from __future__ import annotations

import pytest

from tests.training.rows import random_rows
from tunesmith.training.packing import MOST_PADDED, micro_batches


@pytest.mark.parametrize("lengths", [[(990, 1), *[(4, 1)] * 300], [(40, 2)] * 100, [(3_000, 1), (5, 1)]])
def test_no_part_has_more_tokens_than_it_may_nor_many_times_as_many_cells(lengths: list[tuple[int, int]]) -> None:
    rows = random_rows(lengths)
    parts = micro_batches(rows, prompt_loss_weight=0.0, max_tokens=1_000)

    assert sorted(index for part in parts for index in part.source) == list(range(len(rows)))
    for part in parts:
        alone = len(part.row_lengths) == 1
        assert alone or sum(part.row_lengths) <= 1_000
        assert alone or len(part.row_lengths) * max(part.row_lengths) <= MOST_PADDED * 1_000


def test_short_rows_are_not_padded_to_a_long_one() -> None:
    rows = random_rows([(700, 1), *[(4, 1)] * 50])
    first, *_ = micro_batches(rows, prompt_loss_weight=0.0, max_tokens=1_000)
    assert len(first.row_lengths) == MOST_PADDED * 1_000 // 701  # else it were all 51, of 951 tokens and 35,751 cells
