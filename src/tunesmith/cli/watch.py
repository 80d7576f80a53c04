"""Watching a job until it has ended: a chart on a terminal, lines in a log, each event as JSON for machines."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live

from tunesmith.cli.course import Course, clock_time
from tunesmith.cli.dashboard import Dashboard
from tunesmith.cli.follow import event_line
from tunesmith.cli.output import Output
from tunesmith.client import ApiError, Client, ServerUnreachable

FRAMES_PER_S = 4
LOGGED_EVERY_S = 5
"""A log gets the numbers of a step at most so often; each message it gets."""


class View(Protocol):
    """Where a course is shown as it grows."""

    def event(self, event: dict[str, Any]) -> None:
        """The course has grown by this event."""

    def trouble(self, told: str | None) -> None:
        """Why nothing new comes; None: it comes again."""


def watch_job(client: Client, job_id: str, output: Output, *, clock: Callable[[], float] = time.time) -> int:
    """Shows a job until it has ended; 0 if it succeeded, 1 if not. Raises ApiError at once for one that is unknown."""
    job = client.get("fine-tunes", job_id)
    told_before = len(job["events"])
    course = Course(job)
    connection = _Connection()
    with _view(course, output, clock) as view:
        connection.view = view
        for event in client.follow(
            job_id, metrics=True, interrupted=connection.interrupted, connected=connection.connected
        ):
            course.add(event)
            if len(course.messages) > told_before and event["type"] == "message":
                course.job = _seen_again(client, course.job)  # its place in the queue, and what it was resolved to
            view.event(event)
        course.job = job = client.get("fine-tunes", job_id)
    if output.machine:
        output.record(job)
    elif job["status"] == "succeeded":
        output.say(f'\nTo ask it:\n  tunesmith complete -m {job["fine_tuned_model"]} "YOUR PROMPT"')
    else:
        output.aside(f"The job has ended as {job['status']}. {job['events'][-1]['message']}")
    return 0 if job["status"] == "succeeded" else 1


class _Connection:
    """Says once for each break that it is broken, and once that it is not."""

    view: View
    _broken = False

    def interrupted(self, reason: str) -> None:
        if not self._broken:
            self.view.trouble(f"Connection lost, trying again: {reason}")
        self._broken = True

    def connected(self) -> None:
        if self._broken:
            self.view.trouble(None)
        self._broken = False


def _seen_again(client: Client, job: dict[str, Any]) -> dict[str, Any]:
    try:
        seen: dict[str, Any] = client.get("fine-tunes", job["id"])
    except (ServerUnreachable, ApiError):  # the stream is what counts, and says so where it breaks too
        return job
    return seen


@contextmanager
def _view(course: Course, output: Output, clock: Callable[[], float]) -> Iterator[View]:
    if output.machine:
        yield Records(output)
    elif output.terminal:
        dashboard = Dashboard(course, clock)
        with Live(dashboard, console=Console(highlight=False), refresh_per_second=FRAMES_PER_S) as live:
            yield Screen(dashboard, live)
    else:
        yield Lines(course, output)


class Screen:
    """A dashboard that is drawn again and again; what it says of the connection stays above it."""

    def __init__(self, dashboard: Dashboard, live: Live) -> None:
        self._dashboard, self._live = dashboard, live

    def event(self, event: dict[str, Any]) -> None:
        """Drawn with the next frame."""

    def trouble(self, told: str | None) -> None:
        """Below the events as long as it lasts."""
        self._dashboard.trouble = told
        if told is None:
            seen = self._dashboard.course.seen
            self._live.console.print(f"Connected again, going on after event {seen}.", style="yellow")


class Lines:
    """A plain line an event, and one now and then with the numbers of a step."""

    def __init__(self, course: Course, output: Output) -> None:
        self._course, self._output = course, output
        self._logged_unix = 0

    def event(self, event: dict[str, Any]) -> None:
        """`[local time] message`; for a step its losses, rate and time left too."""
        if event["type"] == "message":
            self._output.say(event_line(event))
        elif event["created_at"] - self._logged_unix >= LOGGED_EVERY_S or self._course.step == self._course.n_steps:
            self._logged_unix = event["created_at"]
            self._output.say(event_line(event) + self._numbers())

    def trouble(self, told: str | None) -> None:
        """On standard error: it is no event of the job."""
        self._output.aside(told or f"Connected again, going on after event {self._course.seen}.")

    def _numbers(self) -> str:
        last, pace = self._course.points[-1], self._course.pace()
        told = "" if last.validation_loss is None else f", validation loss={last.validation_loss:.2f}"
        if pace is not None:
            left_s = pace.ends_unix - last.at_unix
            told += f", {pace.tokens_per_s:,.0f} tokens/s, {clock_time(left_s)} left"
        return told


class Records:
    """Each event as JSON, a line."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def event(self, event: dict[str, Any]) -> None:
        """As it came."""
        self._output.record(event)

    def trouble(self, told: str | None) -> None:
        """On standard error."""
        self._output.aside(told or "Connected again.")
