from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.data.formats import Example
from tunesmith.errors import InvalidRequest
from tunesmith.tokenizer import Tokenizer
from tunesmith.training.batches import Schedule, encode_rows, validation_batch


@pytest.fixture(scope="module")
def tokenizer(tiny_base: Path) -> Tokenizer:
    return Tokenizer.from_folder(tiny_base)


def test_prompt_and_completion_are_encoded_apart(tokenizer: Tokenizer) -> None:
    (row,) = encode_rows([Example(" posit", "ive")], tokenizer, context_tokens=10, param="training_file")

    assert list(row.token_ids) == [*tokenizer.encode(" posit"), *tokenizer.encode("ive")]
    assert row.completion_start == len(tokenizer.encode(" posit"))
    assert len(tokenizer.encode(" positive")) < len(row.token_ids)  # encoded as one it would be fewer


def test_an_empty_prompt_is_the_start_of_a_document(tokenizer: Tokenizer) -> None:
    (row,) = encode_rows([Example("", " yes")], tokenizer, context_tokens=10, param="training_file")

    assert list(row.token_ids) == [tokenizer.end_of_text_id, *tokenizer.encode(" yes")]
    assert row.completion_start == 1


def test_a_row_over_the_context_is_named_across_blocks(tokenizer: Tokenizer) -> None:
    rows = [Example("a", " b")] * 1_500 + [Example("word " * 50, " b")]
    beats: list[None] = []

    with pytest.raises(InvalidRequest, match=r"Line 1501 of the validation_file .* at most 20\.") as caught:
        encode_rows(rows, tokenizer, context_tokens=20, param="validation_file", beat=lambda: beats.append(None))
    assert caught.value.param == "validation_file"
    assert len(beats) == 1


def test_each_epoch_takes_every_row_once_in_its_own_order() -> None:
    schedule = Schedule(n_rows=10, n_epochs=3, batch_size=4, seed=1)

    batches = list(schedule.batches(after_step=0))

    assert [len(batch) for batch in batches] == [4] * 7 + [2]
    assert schedule.n_steps == 8
    taken = [index for batch in batches for index in batch]
    epochs = [taken[0:10], taken[10:20], taken[20:30]]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [schedule.epochs_completed(step) for step in range(9)] == [0, 0, 0, 1, 1, 2, 2, 2, 3]


@pytest.mark.parametrize("after_step", range(9))
def test_batches_can_be_taken_up_anywhere(after_step: int) -> None:
    schedule = Schedule(n_rows=10, n_epochs=3, batch_size=4, seed=1)

    assert list(schedule.batches(after_step)) == list(schedule.batches(0))[after_step:]


def test_a_batch_larger_than_the_data_spans_epochs() -> None:
    schedule = Schedule(n_rows=3, n_epochs=4, batch_size=8, seed=1)

    assert [len(batch) for batch in schedule.batches(0)] == [8, 4]
    assert [schedule.epochs_completed(step) for step in (1, 2)] == [2, 4]


def test_another_seed_gives_another_order() -> None:
    assert list(Schedule(50, 1, 50, seed=1).batches(0)) != list(Schedule(50, 1, 50, seed=2).batches(0))


def test_validation_batches_depend_on_the_step_alone() -> None:
    assert validation_batch(100, 8, seed=1, step=5) == validation_batch(100, 8, seed=1, step=5)
    assert validation_batch(100, 8, seed=1, step=5) != validation_batch(100, 8, seed=1, step=6)
    assert sorted(validation_batch(3, 8, seed=1, step=5)) == [0, 1, 2]
