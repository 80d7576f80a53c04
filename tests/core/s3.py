"""Enough of S3 for a client to believe in: objects, uploads in parts, listings. One bucket, in memory, over HTTP."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.etree import ElementTree

STAMP = "2024-01-02T03:04:05.000Z"


class Bucket:
    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.uploads: dict[str, dict[int, bytes]] = {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def do_PUT(self) -> None:
        key, query, body = self._request()
        if "uploadId" in query:
            self.bucket.uploads[query["uploadId"]][int(query["partNumber"])] = body
        else:
            self.bucket.objects[key] = body
        self._answer(headers={"ETag": '"e"'})

    def do_POST(self) -> None:
        key, query, body = self._request()
        if "delete" in query:
            names = [node.text or "" for node in ElementTree.fromstring(body).iter() if node.tag.endswith("Key")]
            gone = "".join(f"<Deleted><Key>{name}</Key></Deleted>" for name in names)
            for name in names:
                self.bucket.objects.pop(name, None)
            self._answer(f"<DeleteResult>{gone}</DeleteResult>")
        elif "uploads" in query:
            upload = uuid.uuid4().hex
            self.bucket.uploads[upload] = {}
            self._answer(f"<R><Bucket>b</Bucket><Key>{key}</Key><UploadId>{upload}</UploadId></R>")
        else:
            parts = self.bucket.uploads.pop(query["uploadId"])
            self.bucket.objects[key] = b"".join(parts[number] for number in sorted(parts))
            self._answer('<R><ETag>"e"</ETag></R>')

    def do_GET(self) -> None:
        key, query, _ = self._request()
        if "list-type" in query:
            entries = "".join(
                f'<Contents><Key>{name}</Key><Size>{len(content)}</Size><ETag>"e"</ETag>'
                f"<LastModified>{STAMP}</LastModified></Contents>"
                for name, content in sorted(self.bucket.objects.items())
                if name.startswith(query.get("prefix", ""))
            )
            self._answer(f"<ListBucketResult><IsTruncated>false</IsTruncated>{entries}</ListBucketResult>")
        elif key in self.bucket.objects:
            stamp = "Tue, 02 Jan 2024 03:04:05 GMT"
            self._answer(self.bucket.objects[key], headers={"ETag": '"e"', "Last-Modified": stamp})
        else:
            self._answer("<Error><Code>NoSuchKey</Code></Error>", status=404)

    def do_DELETE(self) -> None:
        key, query, _ = self._request()
        if "uploadId" in query:
            del self.bucket.uploads[query["uploadId"]]
        else:
            self.bucket.objects.pop(key, None)
        self._answer(status=204)

    def _request(self) -> tuple[str, dict[str, str], bytes]:
        parts = urlsplit(self.path)
        _, _, key = unquote(parts.path).lstrip("/").partition("/")
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        return key, query, self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, body: str | bytes = b"", status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        """Quiet."""


@contextmanager
def serve() -> Iterator[tuple[Bucket, str]]:
    """The bucket and the server's address."""
    bucket = Bucket()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"bucket": bucket}))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield bucket, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
