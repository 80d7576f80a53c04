"""A model hub on a loopback port: the two addresses that a pull asks, over real files, and what can go wrong there."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors",)
"""What the hub keeps as large files: listed by sha256, and handed out by another host."""


@dataclass
class Asked:
    path: str
    host: str
    authorization: str | None
    range: str | None


@dataclass
class Hub:
    """One repository, a folder of files, and the storage host that its large files are redirected to."""

    folder: Path
    name: str = "someone/tiny"
    commit: str = COMMIT
    token: str | None = None
    """Without it nothing is shown."""
    gated: bool = False
    """Listed for everybody, files for nobody."""
    cut_after: list[int] = field(default_factory=list)
    """How many bytes each of the next answers with large files has before the connection is closed."""
    corrupt: set[str] = field(default_factory=set)
    """Files of which other bytes come than are listed."""
    ignores_ranges: bool = False
    unlisted: set[str] = field(default_factory=set)
    listing: dict[str, Any] = field(default_factory=dict)
    """Fields to put in the place of the true ones."""
    busy: int = 0
    """So many answers are 503 first."""
    asked: list[Asked] = field(default_factory=list)
    url: str = ""
    storage_url: str = ""

    def files(self, suffix: str = "") -> list[Asked]:
        return [one for one in self.asked if "/resolve/" in one.path and one.path.endswith(suffix)]

    def describe(self) -> dict[str, Any]:
        siblings = [
            self.describe_file(path)
            for path in sorted(self.folder.rglob("*"))
            if path.is_file() and path.name not in self.unlisted
        ]
        return {"id": self.name, "sha": self.commit, "cardData": {"license": "apache-2.0"}, "siblings": siblings}

    def describe_file(self, path: Path) -> dict[str, Any]:
        content = path.read_bytes()
        told: dict[str, Any] = {"rfilename": path.relative_to(self.folder).as_posix(), "size": len(content)}
        if path.name.endswith(LARGE):
            told["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return told | {"blobId": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """The hub and its storage, each on a port of its own, until the block is left."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            _answer(hub, self)

        def log_message(self, *_: object) -> None:
            pass

    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Handler) for _ in range(2)]
    threads = [threading.Thread(target=server.serve_forever, args=(0.01,)) for server in servers]
    hub.url, hub.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def _answer(hub: Hub, request: BaseHTTPRequestHandler) -> None:
    path = unquote(urlsplit(request.path).path)
    headers = request.headers
    hub.asked.append(Asked(path, f"http://{headers['host']}", headers["authorization"], headers["range"]))
    if hub.busy:
        hub.busy -= 1
        return _send(request, 503)
    if path.startswith("/storage/"):
        return _send_file(hub, request, hub.folder / path.removeprefix("/storage/"))
    allowed = hub.token is None or headers["authorization"] == f"Bearer {hub.token}"
    if not allowed:
        return _send(request, 401, {"x-error-code": "RepoNotFound"})
    if path.startswith("/api/models/"):
        name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
        if name != hub.name:
            return _send(request, 404, {"x-error-code": "RepoNotFound"})
        if revision not in ("main", "v1.0", hub.commit):
            return _send(request, 404, {"x-error-code": "RevisionNotFound"})
        return _send(request, 200, {"content-type": "application/json"}, json.dumps(hub.describe() | hub.listing))
    if hub.gated:
        return _send(request, 403, {"x-error-code": "GatedRepo"})
    file = hub.folder / path.removeprefix(f"/{hub.name}/resolve/{hub.commit}/")
    if not file.is_file():
        return _send(request, 404, {"x-error-code": "EntryNotFound"})
    if file.name.endswith(LARGE):
        return _send(request, 302, {"location": f"{hub.storage_url}/storage/{file.name}"})
    return _send_file(hub, request, file)


def _send(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str] | None = None, body: str = "") -> None:
    request.send_response(status)
    for name, value in (headers or {}).items():
        request.send_header(name, value)
    request.send_header("content-length", str(len(body)))
    request.end_headers()
    request.wfile.write(body.encode())


def _send_file(hub: Hub, request: BaseHTTPRequestHandler, file: Path) -> None:
    content = file.read_bytes()
    if file.name in hub.corrupt:
        content = content[:-1] + bytes([content[-1] ^ 1])
    start = 0
    if (asked := request.headers["range"]) and not hub.ignores_ranges:
        start = int(asked.removeprefix("bytes=").rstrip("-"))
        request.send_response(206)
        request.send_header("content-range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    else:
        request.send_response(200)
    request.send_header("content-length", str(len(content) - start))
    request.end_headers()
    if file.name.endswith(LARGE) and hub.cut_after:
        request.wfile.write(content[start : start + hub.cut_after.pop(0)])
        request.close_connection = True
    else:
        request.wfile.write(content[start:])
