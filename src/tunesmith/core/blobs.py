"""Bytes by opaque id: a local folder, or an object store such as S3. Knows nothing of files, owners or rows.

Reads, deletes and lists go through obstore for every kind of store. Writes to a local folder are ours: beside, sync,
rename, because obstore does not sync what it writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import obstore
import obstore.exceptions
import obstore.store

from tunesmith.errors import StorageFull
from tunesmith.rundir import NO_ROOM, sync_folder

READ_CHUNK_BYTES = 1 << 20
_UNFINISHED = ".part"


@dataclass(frozen=True, slots=True)
class Blob:
    """One entry of a listing."""

    id: str
    """What was given to `put`; for bytes whose `put` never ended, that and an extension."""
    modified_unix: float


class Blobs:
    """One store of blobs. Ids are letters, digits and dashes. Safe to share between threads."""

    def __init__(self, url: str) -> None:
        """`file:///folder` (made if absent), `s3://bucket/prefix`, or another URL that obstore reads.

        Raises ValueError for a URL that names no store, OSError for a folder that cannot be made. Keys and region of an
        object store come from its usual environment variables, such as AWS_ACCESS_KEY_ID.
        """
        parts = urlsplit(url)
        self._folder = Path(unquote(parts.path)) if parts.scheme == "file" else None
        self._store: obstore.store.ObjectStore
        if self._folder is None:
            try:
                self._store = obstore.store.from_url(url)
            except obstore.exceptions.BaseError as error:
                raise ValueError(str(error).partition("\n")[0]) from error
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._store = obstore.store.LocalStore(self._folder)

    def put(self, blob_id: str, chunks: Iterable[bytes]) -> int:
        """Keep what `chunks` yields under `blob_id`; return its size in bytes. Durable before it returns.

        If `chunks` raises, or there is no room (StorageFull), nothing is left of it.
        """
        if self._folder is not None:
            return write_durably(self._folder / blob_id, chunks)
        counted = _Counted(chunks)
        obstore.put(self._store, blob_id, counted)  # a failed upload in parts is given up by obstore
        return counted.size_bytes

    def read(self, blob_id: str) -> Iterator[bytes]:
        """The bytes, in chunks. Raises FileNotFoundError at once, not at the first chunk, if there are none."""
        stream = obstore.get(self._store, blob_id).stream(min_chunk_size=READ_CHUNK_BYTES)
        return (bytes(chunk) for chunk in stream)

    def fetch(self, blob_id: str, path: Path) -> None:
        """Copy the bytes to a local file, whole or not at all. Raises FileNotFoundError and StorageFull."""
        write_durably(path, self.read(blob_id))

    def delete(self, blob_id: str) -> None:
        """Idempotent."""
        with suppress(FileNotFoundError):
            obstore.delete(self._store, blob_id)

    def list(self) -> Iterator[Blob]:
        """Everything here, what a dead process left unfinished included."""
        for page in obstore.list(self._store):
            for entry in page:
                yield Blob(id=entry["path"], modified_unix=entry["last_modified"].timestamp())


class _Counted:
    """Passes chunks on and adds up their sizes."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = chunks
        self.size_bytes = 0

    def __iter__(self) -> Iterator[bytes]:
        for chunk in self._chunks:
            self.size_bytes += len(chunk)
            yield chunk


def read_chunks(path: Path) -> Iterator[bytes]:
    """The content of a local file. Opens it at the first chunk."""
    with path.open("rb") as file:
        while chunk := file.read(READ_CHUNK_BYTES):
            yield chunk


def write_durably(path: Path, chunks: Iterable[bytes]) -> int:
    """Writes beside, syncs and renames; returns the size. If it raises, StorageFull included, nothing is left."""
    beside = path.with_name(path.name + _UNFINISHED)
    try:
        with full_disk_is_storage_full(), beside.open("wb") as file:
            for chunk in chunks:
                file.write(chunk)
            size_bytes = file.tell()
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)
    return size_bytes


@contextmanager
def full_disk_is_storage_full() -> Iterator[None]:
    """Turns the system's error for a disk (or quota) without room into ours."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise StorageFull(
            "There is no room on the server's disk; nothing of this was kept. Delete files or models that are no "
            "longer needed, or free space on the disk, then try again."
        ) from error
