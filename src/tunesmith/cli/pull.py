"""`tunesmith models pull`: a model of the hub becomes a base. The only command that leaves this machine's network."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bars

from tunesmith.cli.home import home_settings
from tunesmith.cli.output import Output, UsageError
from tunesmith.core.catalogue import FILE, read_catalogue
from tunesmith.core.hub import DEFAULT_ENDPOINT, Hub, Progress, PullFailed, RemoteFile
from tunesmith.core.pull import Pulled, pull, pulling
from tunesmith.settings import read_flag

SHOWN_EVERY = 0.1
"""A log gets a line each time so much more of a file is here."""
LARGE_BYTES = 8 << 20
DIGEST_CHARACTERS = 12


def pull_models(args: argparse.Namespace, output: Output) -> int:
    """Pulls one repository, or without one every hub model of the catalogue that is not here yet."""
    settings = home_settings(args)
    if settings.offline or _hub_is_off(os.environ):
        raise PullFailed(
            "Offline mode is on, so nothing is downloaded. To pull, unset TUNESMITH_OFFLINE and HF_HUB_OFFLINE; or "
            f"copy a checkpoint here by other means and give its folder in {settings.home / FILE}."
        )
    if args.repository is None and (args.revision is not None or args.alias is not None):
        raise UsageError("--revision and --as go with a repository: tunesmith models pull ORG/NAME.")
    wanted = _missing(settings.home) if args.repository is None else [(args.repository, args.revision, args.alias)]
    if not wanted:
        output.say(f"Every hub model in {settings.home / FILE} is here.")
    endpoint, token = os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT, os.environ.get("HF_TOKEN")
    with pulling(settings.home), Hub(endpoint, token) as hub:
        for repository, revision, alias in wanted:
            with _watching(output) as view:
                pulled = pull(settings.home, hub, repository, revision, alias, view)
            if output.machine:
                output.record(_record(pulled))
            else:
                output.say(_story(pulled, args.home))
    return 0


def _hub_is_off(environment: Mapping[str, str]) -> bool:
    """What other programs that use the hub go by."""
    value = environment.get("HF_HUB_OFFLINE", "")
    try:
        return bool(value) and read_flag(value)
    except ValueError as error:
        raise UsageError(f"HF_HUB_OFFLINE={value!r} is not a valid bool: {error}") from error


def _missing(home: Path) -> list[tuple[str, str | None, str | None]]:
    try:
        entries = read_catalogue(home).values()
    except ValueError as error:
        raise UsageError(str(error)) from error
    return [(entry.hub, entry.revision, entry.name) for entry in entries if entry.hub and not entry.folder.is_dir()]


def _story(pulled: Pulled, home: str | None) -> str:
    repository = pulled.repository
    where = "" if home is None else f" --home {shlex.quote(home)}"
    lines = [
        f"{pulled.name} is {repository.name} at {repository.commit}, in {pulled.folder}.",
        f"Its card states the licence {repository.licence}." if repository.licence else "Its card states no licence.",
    ]
    if pulled.was is not None:
        lines.append(f"It was {pulled.was} before; models tuned on that need it back.")
    if pulled.fetched_bytes == 0:
        lines.append("Everything was here already; all digests are right.")
    lines.append(f"To see whether it can be used: tunesmith models check {pulled.name}{where}")
    lines.append("A server that is running takes up new names when it starts again.")
    return "\n".join(lines)


def _record(pulled: Pulled) -> dict[str, Any]:
    return {
        "name": pulled.name,
        "hub": pulled.repository.name,
        "revision": pulled.repository.commit,
        "licence": pulled.repository.licence,
        "folder": str(pulled.folder),
        "sha256": pulled.sha256,
        "fetched_bytes": pulled.fetched_bytes,
    }


@contextmanager
def _watching(output: Output) -> Iterator[Progress]:
    if not output.terminal:
        yield LineView(output)
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()
    with Bars(*columns, TimeRemainingColumn(), console=Console(highlight=False)) as bars:
        yield BarView(bars)


class BarView:
    """A bar for each file."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars

    def began(self, file: RemoteFile, have_bytes: int) -> None:
        """A bar of its own."""
        self._task = self._bars.add_task(file.name, total=file.size_bytes, completed=have_bytes)

    def moved(self, change_bytes: int) -> None:
        """The bar moves."""
        self._bars.advance(self._task, change_bytes)

    def stalled(self, reason: str) -> None:
        """Said above the bars."""
        self._bars.console.print(f"{reason}; trying again", markup=False, style="yellow")

    def ended(self, file: RemoteFile, sha256: str) -> None:
        """The bar stays, full."""
        self._bars.update(self._task, completed=file.size_bytes)


class LineView:
    """Plain lines: where a file begins, each tenth of a large one, where it ends. Machines hear nothing of it."""

    def __init__(self, output: Output) -> None:
        self._output = output

    def began(self, file: RemoteFile, have_bytes: int) -> None:
        """Said at once for what goes on from before."""
        self._file, self._bytes = file, have_bytes
        self._shown = have_bytes
        if have_bytes:
            self._output.say(f"{file.name}: going on after {have_bytes:,} of {file.size_bytes:,} bytes")

    def moved(self, change_bytes: int) -> None:
        """A line for each tenth."""
        self._bytes += change_bytes
        size_bytes = self._file.size_bytes
        if self._shown + SHOWN_EVERY * size_bytes <= self._bytes < size_bytes and size_bytes > LARGE_BYTES:
            self._shown = self._bytes
            self._output.say(f"{self._file.name}: {self._bytes / size_bytes:.0%} of {size_bytes:,} bytes")

    def stalled(self, reason: str) -> None:
        """Why it takes longer."""
        self._output.say(f"{self._file.name}: {reason}; trying again")

    def ended(self, file: RemoteFile, sha256: str) -> None:
        """What came."""
        self._output.say(f"{file.name}: {file.size_bytes:,} bytes, sha256 {sha256[:DIGEST_CHARACTERS]}...")
