"""Multipart uploads as a stream: one file and a few short fields, in any order, of any declared or undeclared length.

The file goes to an unnamed file on the disk of the home folder as it arrives, not to memory, since the fields that
say what it is may come after it. Unnamed: whatever ends the upload, a hang-up or a kill, ends the file too.
"""

from __future__ import annotations

import tempfile
from collections.abc import AsyncGenerator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from tunesmith.core.blobs import full_disk_is_storage_full
from tunesmith.errors import InvalidRequest, UnsupportedMedia

MAX_FIELD_BYTES = 64 * 1024
MAX_FIELDS = 32
WRITE_BYTES = 1024 * 1024
"""Collected before a write, so that a fast upload does not cost a thread switch for each packet."""


@dataclass(frozen=True, slots=True)
class Upload:
    """A received form: its file, and its other fields as text."""

    filename: str
    content: IO[bytes]
    fields: dict[str, str]

    def chunks(self) -> Iterator[bytes]:
        """The content from its start."""
        self.content.seek(0)
        while chunk := self.content.read(WRITE_BYTES):
            yield chunk


@asynccontextmanager
async def receive_upload(
    request: Request, *, file_field: str, max_file_bytes: int, folder: Path
) -> AsyncGenerator[Upload, None]:
    """The upload that `request` carries; gone when the context ends.

    Raises InvalidRequest for a broken form, no file in it, or one larger than `max_file_bytes`; UnsupportedMedia for
    a body that is no form; StorageFull; and starlette's ClientDisconnect.
    """
    kind, options = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        raise UnsupportedMedia(
            f"This endpoint reads multipart/form-data with a boundary; the body was sent as "
            f"{kind.decode('latin-1') or 'nothing'}. Send the parts 'purpose' and '{file_field}' as a form."
        )
    with tempfile.TemporaryFile(dir=folder) as content:
        form = _Form(options[b"boundary"], file_field, max_file_bytes)
        try:
            with full_disk_is_storage_full():
                async for chunk in request.stream():
                    form.feed(chunk)
                    if len(form.arrived) >= WRITE_BYTES:
                        await run_in_threadpool(content.write, form.take_arrived())
                form.finish()
                await run_in_threadpool(content.write, form.take_arrived())
                await run_in_threadpool(content.flush)
        except FormParserError as error:
            raise InvalidRequest(f"The multipart body of the request is broken: {error}") from None
        if form.filename is None:
            raise InvalidRequest(f"The form has no file: send one as the part '{file_field}'.", param=file_field)
        yield Upload(form.filename, content, form.texts)


class _Form:
    """What the parser's callbacks have gathered so far."""

    def __init__(self, boundary: bytes, file_field: str, max_file_bytes: int) -> None:
        self.file_field = file_field
        self.max_file_bytes = max_file_bytes
        self.filename: str | None = None
        self.texts: dict[str, str] = {}
        self.arrived = bytearray()
        """Bytes of the file that are not written yet."""
        self._file_bytes = 0
        self._ended = False
        self._name = ""
        self._in_file = False
        self._value = bytearray()
        self._header = bytearray()
        self._header_value = bytearray()
        self._disposition = b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._part_begin,
                "on_header_field": lambda data, start, end: self._header.extend(data[start:end]),
                "on_header_value": lambda data, start, end: self._header_value.extend(data[start:end]),
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_part_end": self._part_end,
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        self._parser.write(chunk)

    def finish(self) -> None:
        self._parser.finalize()
        if not self._ended:
            raise InvalidRequest("The multipart body of the request ends before its last boundary: send it whole.")

    def take_arrived(self) -> bytes:
        taken, self.arrived = bytes(self.arrived), bytearray()
        return taken

    def _part_begin(self) -> None:
        self._value.clear()
        self._disposition = b""

    def _header_end(self) -> None:
        if bytes(self._header).lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header.clear()
        self._header_value.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        self._name = options.get(b"name", b"").decode(errors="replace")
        self._in_file = self._name == self.file_field
        if not self._in_file:
            return
        if not options.get(b"filename"):
            raise InvalidRequest(
                f"The part '{self.file_field}' must be a file, with a filename in its Content-Disposition header.",
                param=self.file_field,
            )
        if self.filename is not None:
            raise InvalidRequest(f"The form has more than one part '{self.file_field}'.", param=self.file_field)
        self.filename = options[b"filename"].decode(errors="replace")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            self._value += data[start:end]
            if len(self._value) > MAX_FIELD_BYTES:
                raise InvalidRequest(f"'{self._name}' is longer than {MAX_FIELD_BYTES} bytes.", param=self._name)
            return
        self._file_bytes += end - start
        if self._file_bytes > self.max_file_bytes:
            raise InvalidRequest(
                f"The file is larger than the {self.max_file_bytes} bytes that this server accepts. Send a smaller "
                "one, or ask the server's owner to raise TUNESMITH_MAX_UPLOAD_BYTES.",
                param=self.file_field,
            )
        self.arrived += data[start:end]

    def _part_end(self) -> None:
        if self._in_file:
            return
        self.texts[self._name] = self._value.decode(errors="replace")
        if len(self.texts) > MAX_FIELDS:
            raise InvalidRequest(f"The form has more than {MAX_FIELDS} fields.")

    def _end(self) -> None:
        self._ended = True
