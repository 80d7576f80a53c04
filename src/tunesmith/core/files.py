"""Files: what users upload and jobs produce. Training data is checked while it arrives; bytes are with `Blobs`.

Bytes come first and the row second, so a row always has its bytes; what a crash leaves in between, `sweep` removes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, FromClause, RowMapping, insert, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from tunesmith.core.accounts import Caller
from tunesmith.core.blobs import Blobs
from tunesmith.core.notices import about_upload
from tunesmith.core.schema import files, jobs
from tunesmith.core.statuses import LIVE
from tunesmith.core.store import Store
from tunesmith.data.chat import Chat
from tunesmith.data.formats import Example, ExampleParser, LineSplitter, read_examples, split_lines
from tunesmith.data.sample import Sample
from tunesmith.errors import InvalidRequest, NotFound

FINE_TUNE = "fine-tune"
FINE_TUNE_RESULTS = "fine-tune-results"
PURPOSES = (
    FINE_TUNE,
    FINE_TUNE_RESULTS,
    "assistants",
    "batch",
    "vision",
    "user_data",
    "evals",
    "search",
    "answers",
    "classifications",
)
MAX_FILENAME_CHARACTERS = 1_024
PROCESSED = "processed"
DELETED = "deleted"
"""Kept as a row, because jobs show the files they used; every other reader takes it for unknown."""
SWEEP_AFTER_S = 3_600
"""Bytes without a row younger than this may be an upload in progress."""


@dataclass(frozen=True, slots=True)
class File:
    """A file as clients see it."""

    id: str
    organization_id: str
    size_bytes: int
    created_unix: int
    filename: str
    """As the client gave it; may be a path or a URL."""
    purpose: str
    status: str
    status_details: str | None


class Files:
    """The files of all organisations."""

    def __init__(self, store: Store, blobs: Blobs, max_upload_bytes: int) -> None:
        self._store = store
        self._blobs = blobs
        self._max_upload_bytes = max_upload_bytes

    def create(self, caller: Caller, *, filename: str, purpose: str, chunks: Iterable[bytes]) -> File:
        """Keep what `chunks` yields. With purpose `fine-tune` every line must be an example.

        What the doctor finds in the first of them is told in `status_details`; it refuses nothing.
        Raises InvalidRequest at the first chunk that breaks a rule and StorageFull when there is no room; then, and if
        `chunks` raises, nothing is left.
        """
        _check_purpose(purpose)
        _check_filename(filename)
        sample = Sample()
        file_id, size_bytes = self.keep(self._checked(purpose, chunks, sample))
        try:
            said = about_upload(sample) if purpose == FINE_TUNE else None
            with self._store.transaction() as connection:
                return self.insert(
                    connection,
                    file_id,
                    organization_id=caller.organization_id,
                    filename=filename,
                    purpose=purpose,
                    size_bytes=size_bytes,
                    status_details=said,
                )
        except SQLAlchemyError:
            raise  # whether the commit took place is not known: `sweep` finds out
        except BaseException:
            self.discard(file_id)
            raise

    def get(self, caller: Caller, file_id: str) -> File:
        """Raises NotFound for an id that is unknown, deleted or another organisation's."""
        with self._store.reading() as connection:
            return self.find(connection, caller, file_id)

    def content(self, caller: Caller, file_id: str) -> Iterator[bytes]:
        """The bytes, in chunks. Raises NotFound at once."""
        return self._read(self.get(caller, file_id))

    def delete(self, caller: Caller, file_id: str) -> None:
        """Raises NotFound, and InvalidRequest while a job that has not ended needs the file."""
        with self._store.transaction() as connection:
            self.find(connection, caller, file_id)
            used = or_(jobs.c.training_file_id == file_id, jobs.c.validation_file_id == file_id)
            job = connection.execute(select(jobs.c.id, jobs.c.status).where(used, jobs.c.status.in_(LIVE))).first()
            if job is not None:
                raise InvalidRequest(
                    f"{file_id} is needed by fine-tune {job.id}, which is {job.status}. Wait until it has ended, or "
                    "cancel it first.",
                    param="id",
                )
            connection.execute(update(files).where(files.c.id == file_id).values(status=DELETED))
        self._blobs.delete(file_id)

    def examples(self, file: File, chat: Chat) -> Iterator[Example]:
        """The examples of a training file, conversations in the words of `chat`. Raises NotFound.

        Raises InvalidRequest for a conversation that those words cannot tell: the file was checked in others.
        """
        return read_examples(split_lines(self._read(file)), chat)

    def fetch(self, file: File, path: Path) -> None:
        """Copy the bytes to a local file, whole or not at all. Raises NotFound and StorageFull."""
        try:
            self._blobs.fetch(file.id, path)
        except FileNotFoundError as error:
            raise _gone(file) from error

    def find(self, connection: Connection, caller: Caller, file_id: str) -> File:
        """As `get`, within a transaction."""
        query = select(files).where(
            files.c.id == file_id, files.c.organization_id == caller.organization_id, files.c.status != DELETED
        )
        row = connection.execute(query).mappings().one_or_none()
        if row is None:
            raise NotFound(f"No such File object: {file_id}", param="id")
        return file_from_row(row)

    def keep(self, chunks: Iterable[bytes]) -> tuple[str, int]:
        """Write bytes under a new id; return it and their size. No file yet: `insert` or `discard` comes next."""
        file_id = self._store.new_id("file-")
        return file_id, self._blobs.put(file_id, chunks)

    def insert(
        self,
        connection: Connection,
        file_id: str,
        *,
        organization_id: str,
        filename: str,
        purpose: str,
        size_bytes: int,
        status_details: str | None = None,
    ) -> File:
        """Make a file of bytes that `keep` wrote, within a writing transaction."""
        file = File(
            id=file_id,
            organization_id=organization_id,
            size_bytes=size_bytes,
            created_unix=int(self._store.clock()),
            filename=filename,
            purpose=purpose,
            status=PROCESSED,
            status_details=status_details,
        )
        connection.execute(insert(files).values({name: getattr(file, name) for name in File.__slots__}))
        return file

    def discard(self, file_id: str) -> None:
        """Remove bytes that `keep` wrote and `insert` did not take up. Idempotent."""
        self._blobs.delete(file_id)

    def sweep(self) -> int:
        """Remove bytes that no file owns, left by a process that died between two steps; return how many blobs."""
        before_unix = self._store.clock() - SWEEP_AFTER_S
        old = [blob.id for blob in self._blobs.list() if blob.modified_unix < before_unix]
        with self._store.reading() as connection:
            owned = set(connection.scalars(select(files.c.id).where(files.c.status != DELETED)))
        orphans = [blob_id for blob_id in old if blob_id not in owned]
        for blob_id in orphans:
            self._blobs.delete(blob_id)
        return len(orphans)

    def list(self, caller: Caller, purpose: str | None = None) -> list[File]:
        """The organisation's files, oldest first."""
        query = select(files).where(files.c.organization_id == caller.organization_id, files.c.status != DELETED)
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        with self._store.reading() as connection:
            return [file_from_row(row) for row in connection.execute(query.order_by(files.c.position)).mappings()]

    def _read(self, file: File) -> Iterator[bytes]:
        try:
            return self._blobs.read(file.id)
        except FileNotFoundError as error:
            raise _gone(file) from error

    def _checked(self, purpose: str, chunks: Iterable[bytes], sample: Sample) -> Iterator[bytes]:
        """Passes the chunks on, and examples to `sample`; raises InvalidRequest at the first that breaks a rule."""
        splitter, parser = LineSplitter(), ExampleParser(Chat.plain())
        size_bytes = 0
        for chunk in chunks:
            size_bytes += len(chunk)
            if size_bytes > self._max_upload_bytes:
                raise InvalidRequest(
                    f"The file is larger than the {self._max_upload_bytes} bytes this server takes. Split it, or ask "
                    "the server's owner to raise TUNESMITH_MAX_UPLOAD_BYTES.",
                    param="file",
                )
            if purpose == FINE_TUNE:
                for line in splitter.feed(chunk):
                    sample.take(parser.read(line))
            yield chunk
        if purpose == FINE_TUNE:
            for line in splitter.end():
                sample.take(parser.read(line))
            parser.end()
        elif not size_bytes:
            raise InvalidRequest("The file is empty. Check what was sent as `file`.", param="file")


def file_from_row(row: RowMapping, table: FromClause = files) -> File:
    """The file in a row that selects all columns of `table`, an alias of `files`."""
    values: dict[str, Any] = {name: row[table.c[name]] for name in File.__slots__}
    return File(**values)


def _check_purpose(purpose: str) -> None:
    if purpose not in PURPOSES:
        raise InvalidRequest(
            f"purpose {purpose[:100]!r} is not known; give one of {', '.join(PURPOSES)}. Training data is `fine-tune`.",
            param="purpose",
        )


_UNFIT_IN_FILENAMES = {"Cc", "Cs", "Zl", "Zp"}
"""Unicode categories: controls, lone surrogates, line and paragraph separators."""


def _check_filename(filename: str) -> None:
    # Joiners and no-break spaces stand in ordinary names of many scripts; what breaks lines or terminals does not.
    broken = any(unicodedata.category(character) in _UNFIT_IN_FILENAMES for character in filename)
    if broken or not 1 <= len(filename) <= MAX_FILENAME_CHARACTERS:
        raise InvalidRequest(
            f"The filename must have 1 to {MAX_FILENAME_CHARACTERS} characters and neither control characters nor line "
            f"breaks; you gave {filename[:100]!r}. Send another in the `file` part.",
            param="file",
        )


def _gone(file: File) -> NotFound:
    return NotFound(
        f"The content of {file.id} ({file.filename}) is no longer on the server. Upload the file again.", param="id"
    )
