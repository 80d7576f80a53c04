"""Putting a new file in place of another: the old one stays beside it and can be put back. Nothing is ever lost."""

from __future__ import annotations

import itertools
import os
import stat
from pathlib import Path

from tunesmith.data.outputs import Staged
from tunesmith.errors import InvalidRequest

KEPT, UNDONE = "orig", "fixed"
"""Endings of the file as it was, and of what an undo has put aside."""


def put_in_place(path: Path, staged: Staged) -> Path:
    """`path` becomes what was staged, at once and whole; where its old content is now.

    Raises InvalidRequest for a link, whose place is somebody else's, and where nothing can be written.
    """
    _check(path)
    staged.sync()
    try:
        staged.allow(stat.S_IMODE(path.stat().st_mode))
        kept = _link_beside(path, KEPT)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            staged.link(fresh)
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            kept.unlink()
            raise
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be replaced: {error.strerror}. It is as it was.", param="file") from error
    return kept


def undo(path: Path) -> Path:
    """`path` becomes again what it was before the last change; where what it is now has gone.

    Raises InvalidRequest if no change is remembered.
    """
    _check(path)
    count = _count(path, KEPT)
    if not count:
        raise InvalidRequest(
            f"There is no {path.name}.{KEPT} beside {path}, so there is nothing to undo. Fixes that are written beside "
            "a file leave it as it is.",
            param="file",
        )
    try:
        aside = _link_beside(path, UNDONE)
        path.with_name(_name(path, KEPT, count - 1)).replace(path)
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be put back: {error.strerror}.", param="file") from error
    return aside


def _check(path: Path) -> None:
    if path.is_symlink():
        raise InvalidRequest(f"{path} is a link. Name the file itself: {path.resolve()}.", param="file")
    if not path.is_file():
        raise InvalidRequest(f"{path} is no file, or does not exist.", param="file", code="no_file")


def _link_beside(path: Path, ending: str) -> Path:
    """Gives the file a second name, the next that is free."""
    for number in itertools.count(_count(path, ending)):
        name = path.with_name(_name(path, ending, number))
        try:
            os.link(path, name, follow_symlinks=False)
        except FileExistsError:
            continue
        return name
    raise AssertionError("count never ends")


def _count(path: Path, ending: str) -> int:
    """How many such names are taken, one after another."""
    return next(n for n in itertools.count() if not os.path.lexists(path.with_name(_name(path, ending, n))))


def _name(path: Path, ending: str, number: int) -> str:
    return f"{path.name}.{ending}" + (f".{number}" if number else "")
