"""What the events of a job tell of it."""

from __future__ import annotations

from typing import Any

import pytest

from tunesmith.cli.course import Course, clock_time


def course() -> Course:
    return Course({"hyperparams": {"n_epochs": 4}})


def message(text: str, level: str = "info", at: int = 0) -> dict[str, Any]:
    return {"type": "message", "level": level, "message": text, "created_at": at, "data": None}


def step(number: int, of: int, at: int, **data: float) -> dict[str, Any]:
    measured = {"step": number, "elapsed_tokens": 10 * number, "training_loss": 1.0, "training_token_accuracy": 0.5}
    text = f"Step {number}/{of}: training loss=1.00"
    return {"type": "metrics", "level": "info", "message": text, "created_at": at, "data": measured | data}


def told(*events: dict[str, Any]) -> Course:
    found = course()
    for event in events:
        found.add(event)
    return found


@pytest.mark.parametrize(
    ("messages", "state"),
    [
        (["Created fine-tune: ft-x"], "pending"),
        (["Fine-tune paused"], "paused"),
        (["Fine-tune paused", "Fine-tune resumed"], "pending"),
        (["Fine-tune started"], "running"),
        (["Fine-tune started", "Fine-tune paused"], "paused"),
        (["Fine-tune started", "Fine-tune paused", "Fine-tune resumed"], "running"),
        (["Fine-tune started", "Fine-tune succeeded"], "succeeded"),
        (["Fine-tune cancelled"], "cancelled"),
    ],
)
def test_the_state_follows_from_the_messages(messages: list[str], state: str) -> None:
    found = told(*map(message, messages))
    assert found.state == state
    assert found.ended == (state in ("succeeded", "cancelled"))


def test_a_failure_is_an_error_that_says_so() -> None:
    assert told(message("Fine-tune failed. The loss was no number.", "error")).state == "failed"
    assert told(message("Something else went wrong", "error")).state == "pending"


def test_how_far_it_is() -> None:
    found = told(message("Fine-tune started"), message("Fine-tune costs $1.25"), step(30, 100, 0))
    assert (found.step, found.n_steps, found.share, found.epoch) == (30, 100, 0.3, (2, 4))
    assert found.cost == "$1.25"
    assert found.seen == 3
    assert course().share == 0.0


def test_the_pace_is_that_of_the_last_seconds() -> None:
    slow, fast = [step(n, 1000, 10 * n) for n in range(1, 11)], [step(10 + n, 1000, 100 + n) for n in range(1, 21)]
    pace = told(*slow, *fast).pace()
    assert pace is not None
    assert pace.tokens_per_s == pytest.approx(10.0)  # ten tokens a step, a step a second
    assert pace.ends_unix == pytest.approx(120 + 970)


def test_there_is_no_pace_before_two_reports_of_different_seconds() -> None:
    assert course().pace() is None
    assert told(step(1, 9, 5)).pace() is None
    assert told(step(1, 9, 5), step(2, 9, 5)).pace() is None


def test_an_interruption_does_not_count_as_work() -> None:
    before, after = [step(1, 100, 0), step(2, 100, 10)], [step(3, 100, 1000), step(4, 100, 1010)]
    found = told(*before, message("Training was interrupted", "warn"), *after)
    pace = found.pace()
    assert pace is not None
    assert pace.tokens_per_s == pytest.approx(1.0)
    assert told(*before, message("Fine-tune resumed")).pace() is None


def test_accuracy_is_that_of_the_validation_batch_where_there_is_one() -> None:
    found = told(step(1, 9, 0), step(2, 9, 0, validation_loss=2.0, validation_token_accuracy=0.9))
    assert [point.token_accuracy for point in found.points] == [0.5, 0.9]
    assert [point.validation_loss for point in found.points] == [None, 2.0]


@pytest.mark.parametrize(
    ("seconds", "text"), [(-3, "0:00"), (41.2, "0:41"), (59.7, "1:00"), (3725, "1:02:05"), (90_000, "25:00:00")]
)
def test_spans_as_a_clock_shows_them(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text
