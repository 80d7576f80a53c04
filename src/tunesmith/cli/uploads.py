"""Sending local files, with a bar on a terminal for those that take a while."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import rich.progress
from rich.console import Console

from tunesmith.cli.output import UsageError
from tunesmith.client import Client


def upload(client: Client, path: str, purpose: str, *, filename: str | None = None) -> Any:
    """The file object of a local file, named as typed unless `filename` is given.

    Raises UsageError if the file cannot be read.
    """
    filename = filename or path
    with _opened(path) as file:
        if not sys.stderr.isatty():
            return client.upload(filename, file, purpose)
        with rich.progress.wrap_file(
            file,
            total=Path(path).stat().st_size,
            description=f"Uploading {Path(path).name}",
            console=Console(stderr=True),
            transient=True,
        ) as watched:
            return client.upload(filename, watched, purpose)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        with Path(path).open("rb") as file:
            yield file
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}.") from error
