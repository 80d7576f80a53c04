"""How far a job is, told from its events: state, losses, rate, time left, cost. Pure; shows nothing."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

STEP = re.compile(r"Step (\d+)/(\d+):")
COST = re.compile(r"Fine-tune costs (\S+)")
STATES = {
    "Fine-tune started": "running",
    "Fine-tune paused": "paused",
    "Fine-tune resumed": "running",
    "Fine-tune succeeded": "succeeded",
    "Fine-tune cancelled": "cancelled",
}
"""What a job is from a message on; one that failed says why, and is told by its beginning."""
FAILED = ("Fine-tune failed", "Error:")
RATE_OVER_S = 10
"""The rate is that of the latest reports, over at least so long where there are as many: events tell whole seconds."""


@dataclass(frozen=True, slots=True)
class Point:
    """What a trainer reported of one step."""

    step: int
    at_unix: int
    tokens: int
    """Trained so far, repeats included."""
    training_loss: float
    validation_loss: float | None
    """Of one batch."""
    full_validation_loss: float | None
    """Of the whole validation file: at the end of an epoch."""
    token_accuracy: float
    """Of the validation batch where there is one, else of the training batch."""


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a job is going."""

    tokens_per_s: float
    ends_unix: float
    """When the last step is likely to be done."""


class Course:
    """Grows with every event. `job` is the fine-tune object as it was last seen."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.state = "pending"
        self.started = False
        self.cost: str | None = None
        self.n_steps: int | None = None
        self.points: list[Point] = []
        self.messages: list[dict[str, Any]] = []
        self.seen = 0
        self._since = 0

    def add(self, event: dict[str, Any]) -> None:
        """The next event of the job, in order."""
        self.seen += 1
        if event["type"] == "metrics":
            self._measure(event)
            return
        message = event["message"]
        self.messages.append(event)
        if (state := STATES.get(message)) is not None:
            self.started |= message == "Fine-tune started"
            self.state = state if self.started or state != "running" else "pending"
        elif event["level"] == "error" and message.startswith(FAILED):
            self.state = "failed"
        if event["level"] == "warn" or message == "Fine-tune resumed":
            self._since = len(self.points)  # what came before an interruption says nothing about the pace after it
        if (cost := COST.match(message)) is not None:
            self.cost = cost[1]

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to come."""
        return self.state in ("succeeded", "failed", "cancelled")

    @property
    def step(self) -> int:
        """The last that was reported; 0 before the first."""
        return self.points[-1].step if self.points else 0

    @property
    def share(self) -> float:
        """Of all steps, in [0, 1]."""
        if self.state == "succeeded":
            return 1.0
        return self.step / self.n_steps if self.n_steps else 0.0

    @property
    def epoch(self) -> tuple[int, int]:
        """The one it is in, counted from 1, and how many there are."""
        n_epochs: int = self.job["hyperparams"]["n_epochs"]
        return min(n_epochs, math.floor(self.share * n_epochs) + 1), n_epochs

    def pace(self) -> Pace | None:
        """None as long as the reports do not tell."""
        recent = self.points[self._since :]
        if not recent or self.n_steps is None:
            return None
        last = recent[-1]
        earlier = next((one for one in reversed(recent) if last.at_unix - one.at_unix >= RATE_OVER_S), recent[0])
        took_s = last.at_unix - earlier.at_unix
        if not took_s:
            return None
        per_step_s = took_s / (last.step - earlier.step)
        rate = (last.tokens - earlier.tokens) / took_s
        return Pace(rate, last.at_unix + per_step_s * (self.n_steps - last.step))

    def _measure(self, event: dict[str, Any]) -> None:
        data = event["data"]
        if (told := STEP.match(event["message"])) is not None:
            self.n_steps = int(told[2])
        validated = data.get("validation_token_accuracy")
        self.points.append(
            Point(
                step=int(data["step"]),
                at_unix=event["created_at"],
                tokens=int(data["elapsed_tokens"]),
                training_loss=data["training_loss"],
                validation_loss=data.get("validation_loss"),
                full_validation_loss=data.get("full_validation_loss"),
                token_accuracy=data["training_token_accuracy"] if validated is None else validated,
            )
        )


def clock_time(seconds: float) -> str:
    """A span as a clock shows it.

    >>> [clock_time(s) for s in (0, 41.2, 125, 3725, 90_000)]
    ['0:00', '0:41', '2:05', '1:02:05', '25:00:00']
    """
    minutes, rest_s = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest_s:02}" if hours else f"{minutes}:{rest_s:02}"
