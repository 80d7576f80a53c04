"""Writing prepared rows: JSONL lines, names that are free, files that are there whole or not at all."""

from __future__ import annotations

import errno
import itertools
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from tunesmith.data.formats import MAX_LINE_BYTES
from tunesmith.data.rows import Batch
from tunesmith.errors import InvalidRequest

BUFFER_BYTES = 1 << 20
MOST_ESCAPED_BYTES = 6
"""Of a character in JSON: `\\u0000`."""
EMPTY_ROW_BYTES = len('{"prompt":"","completion":""}\n')
_ENCODER = msgspec.json.Encoder()
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP)
"""What file systems say that know no second name for a file; there the name is taken first, then the file put in."""


class _Line(msgspec.Struct, gc=False):
    prompt: str
    completion: str


def output_names(path: Path, parts: Sequence[str]) -> list[Path]:
    """Where new rows of `path` go: a file for each part, `NAME_prepared.jsonl` for `_prepared`.

    If one of them is there already, all get ` (1)`, ` (2)`, ...
    """
    for count in itertools.count():
        number = f" ({count})" if count else ""
        names = [path.with_name(f"{path.stem}{part}{number}.jsonl") for part in parts]
        if not any(os.path.lexists(name) for name in names):
            return names
    raise AssertionError("count never ends")


def prepared_lines(batch: Batch) -> bytes:
    r"""The rows as JSON Lines, prompt first, `/` as `\/`, characters as they are: what the published command writes."""
    lines = _ENCODER.encode_lines(list(map(_Line, batch.prompts, batch.completions)))
    return lines.replace(b"/", b"\\/")


class Staged:
    """A file that grows in its folder without a name; gone at the end unless it was published.

    Where files without a name are not to be had, it has a hidden one, which kill -9 leaves behind.
    """

    def __init__(self, folder: Path) -> None:
        """Raises InvalidRequest if nothing can be written there."""
        self.folder = folder
        self._path: Path | None = None
        try:
            try:
                number = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o666)
            except (AttributeError, OSError):  # another system, or a file system without them
                number, name = tempfile.mkstemp(prefix=".tunesmith-", suffix=".jsonl", dir=folder)
                self._path = Path(name)
                os.fchmod(number, 0o666 & ~_umask())  # a file like any other, once it is published
        except OSError as error:
            raise InvalidRequest(f"Nothing can be written to {folder}: {error.strerror}.", param="file") from error
        self._file: BinaryIO = os.fdopen(number, "w+b", buffering=BUFFER_BYTES)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def write(self, batch: Batch) -> None:
        """Raises InvalidRequest for a row longer than an upload may have."""
        lines = prepared_lines(batch)
        if len(lines) > MAX_LINE_BYTES and _most_bytes(batch) > MAX_LINE_BYTES:  # or there is no such row for sure
            for place, line in enumerate(lines.splitlines()):
                if len(line) > MAX_LINE_BYTES:
                    raise InvalidRequest(
                        f"Prepared row {batch.first + place:,} is {len(line):,} bytes long; a line of a training file "
                        f"may have {MAX_LINE_BYTES:,}. Accept that long rows are removed, or remove it.",
                        param="file",
                    )
        self.write_bytes(lines)

    def write_bytes(self, content: bytes) -> None:
        """More of the file, as it is. Raises InvalidRequest if the disk is full."""
        try:
            self._file.write(content)
        except OSError as error:
            raise InvalidRequest(f"Writing beside the file failed: {error.strerror}. Nothing was kept.") from error

    def part(self, masks: Iterable[NDArray[np.bool_]], yes: Staged, no: Staged) -> tuple[int, int]:
        """Writes each line to `yes` or `no`, as the masks say; how many went where."""
        self._file.flush()
        self._file.seek(0)
        ahead = iter(masks)
        rest, mask, n_yes, n_no = b"", np.empty(0, dtype=np.bool_), 0, 0
        while block := self._file.read(BUFFER_BYTES):
            content = rest + block
            ends = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("\n")) + 1
            while len(mask) < len(ends):
                mask = np.concatenate((mask, next(ahead)))
            here, mask = mask[: len(ends)], mask[len(ends) :]
            last = np.flatnonzero(np.append(here[1:] != here[:-1], True)[: len(ends)])  # of each run of one side
            start = 0
            for end, side in zip(ends[last].tolist(), here[last].tolist(), strict=True):
                (yes if side else no).write_bytes(content[start:end])
                start = end
            rest = content[start:]
            n_yes, n_no = n_yes + int(here.sum()), n_no + int((~here).sum())
        return n_yes, n_no

    def lines_at(self, order: NDArray[np.int64]) -> Iterator[bytes]:
        """The lines at these places, in this order."""
        self._file.flush()
        self._file.seek(0)
        ends = np.fromiter(itertools.accumulate(map(len, self._file)), dtype=np.int64)
        starts = np.concatenate(([0], ends[:-1]))
        for start, end in zip(starts[order].tolist(), ends[order].tolist(), strict=True):
            yield os.pread(self._file.fileno(), end - start, start)

    def sync(self) -> None:
        """What has been written survives a loss of power. Raises InvalidRequest if the disk is full."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InvalidRequest(f"Writing beside the file failed: {error.strerror}. Nothing was kept.") from error

    def allow(self, mode: int) -> None:
        """Who may read and write the file, as bits of its mode."""
        os.fchmod(self._file.fileno(), mode)

    def link(self, name: Path) -> None:
        """The file gets its name. Raises FileExistsError if that is taken: nothing is ever written over."""
        if self._path is None:
            # Naming a directory has Python call linkat(2), which follows the link in /proc to the file itself.
            os.link(f"/proc/self/fd/{self._file.fileno()}", name, src_dir_fd=self._file.fileno())
            return
        try:
            os.link(self._path, name)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            os.close(os.open(name, os.O_CREAT | os.O_EXCL))
            self._path.replace(name)


def publish(path: Path, files: Sequence[tuple[str, Staged]]) -> list[Path]:
    """Gives each file the name of its part; all of them or none. The names."""
    for _, staged in files:
        staged.sync()
    while True:
        names = output_names(path, [part for part, _ in files])
        linked: list[Path] = []
        try:
            for name, (_, staged) in zip(names, files, strict=True):
                staged.link(name)
                linked.append(name)
        except FileExistsError:  # somebody else took it since
            for name in linked:
                name.unlink()
            continue
        except OSError as error:
            for name in linked:
                name.unlink()
            raise InvalidRequest(f"{names[0]} cannot be written: {error.strerror}.", param="file") from error
        return names


def _most_bytes(batch: Batch) -> int:
    """No row of these is longer as a line."""
    characters = max(map(len, batch.prompts), default=0) + max(map(len, batch.completions), default=0)
    return MOST_ESCAPED_BYTES * characters + EMPTY_ROW_BYTES


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
