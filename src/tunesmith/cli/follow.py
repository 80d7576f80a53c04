"""Watching a job: one line an event, a bar of epochs underneath where somebody is watching."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tunesmith.cli.output import Output, visible
from tunesmith.client import Client

EPOCH = re.compile(r"Completed epoch (\d+)/(\d+)")


class View(Protocol):
    """Where events go as they come."""

    def event(self, event: dict[str, Any]) -> None:
        """Something happened in the job."""

    def interrupted(self, reason: str) -> None:
        """The connection is gone; it is being opened again."""


def watch(client: Client, job_id: str, output: Output) -> dict[str, Any]:
    """Shows the events of a job until it has ended; returns the job as it then is."""
    with _view(output) as view:
        for event in client.follow(job_id, interrupted=view.interrupted):
            view.event(event)
    job: dict[str, Any] = client.get("fine-tunes", job_id)
    return job


@contextmanager
def _view(output: Output) -> Iterator[View]:
    if output.machine:
        yield RecordView(output)
    elif output.terminal:
        columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
        with Progress(*columns, console=Console(highlight=False), transient=True, refresh_per_second=5) as progress:
            yield LiveView(progress)
    else:
        yield LineView(output)


class RecordView:
    """One JSON object an event."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def event(self, event: dict[str, Any]) -> None:
        """Passed on as it came."""
        self._output.record(event)

    def interrupted(self, reason: str) -> None:
        """Told on standard error: it is no event of the job."""
        sys.stderr.write(f"{reason} Trying again...\n")


class LineView:
    """One plain line an event, as the published command line writes them."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._connected = True

    def event(self, event: dict[str, Any]) -> None:
        """`[local time] message`."""
        self._connected = True
        self._output.say(event_line(event))

    def interrupted(self, reason: str) -> None:
        """Said once for each interruption, however many tries it takes."""
        if self._connected:
            sys.stderr.write(f"{reason} Trying again...\n")
        self._connected = False


class LiveView:
    """Event lines above a bar that moves with the epochs."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task = progress.add_task("Waiting", total=None)

    def event(self, event: dict[str, Any]) -> None:
        """A line, and the bar where the event tells how far the job is."""
        style = {"warn": "yellow", "error": "red"}.get(event["level"])
        self._progress.console.print(event_line(event), markup=False, style=style)
        message = event["message"]
        if epoch := EPOCH.match(message):
            done, total = int(epoch[1]), int(epoch[2])
            self._progress.update(self._task, completed=done, total=total, description=f"Epoch {done}/{total} done")
        else:
            self._progress.update(self._task, description="Training" if message == "Fine-tune started" else None)

    def interrupted(self, reason: str) -> None:
        """Shown in the bar's place until events come again."""
        self._progress.update(self._task, description="No answer from the server, trying again")


def event_line(event: dict[str, Any]) -> str:
    """`[2023-04-18 09:31:05] Fine-tune started`, in local time."""
    return visible(f"[{datetime.fromtimestamp(event['created_at'])}] {event['message']}")
