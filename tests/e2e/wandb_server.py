"""As much of W&B's server as a run needs that is written, broken off and gone on with.

History is kept by line and resumed by step.
Its package sends GraphQL, and lines of files, each with the number of its first line: what comes again overwrites.
Source: the requests of wandb 0.31, as they arrive.
"""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

HISTORY, SUMMARY = "wandb-history.jsonl", "wandb-summary.json"


class WandbServer(ThreadingHTTPServer):
    """Holds one run."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.history: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.exit_code: int | None = None
        self.resumed = 0
        """How often the run was gone on with."""
        self.exists = False

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that was killed in the midst of a request is what this is for."""

    def query(self, operation: str | None, variables: dict[str, Any]) -> dict[str, Any]:
        """The data that answers a GraphQL request."""
        project = {"id": "1", "name": "reviews", "entity": {"id": "1", "name": "a-team"}}
        match operation:
            case "RunResumeStatus":
                self.resumed += self.exists
                return {"model": {**project, "bucket": self._bucket() if self.exists else None}}
            case "UpsertBucket":
                inserted, self.exists = not self.exists, True
                self.config |= json.loads(variables.get("config") or "{}")
                return {"upsertBucket": {"bucket": {**self._bucket(), "project": project}, "inserted": inserted}}
            case "CreateRunFiles":
                files = [{"name": name, "uploadUrl": f"{self.url}/upload"} for name in variables["files"]]
                return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": files}}
            case _:
                return {}

    def stream(self, sent: dict[str, Any]) -> None:
        """Lines of the run's files."""
        for name, chunk in (sent.get("files") or {}).items():
            lines = [json.loads(line) for line in chunk["content"]]
            if name == HISTORY:
                self.history[chunk["offset"] : chunk["offset"] + len(lines)] = lines
            elif name == SUMMARY:
                self.summary |= lines[-1]
        if sent.get("complete"):
            self.exit_code = sent.get("exitcode")

    def _bucket(self) -> dict[str, Any]:
        return {
            "id": "run",
            "name": "run",
            "displayName": "run",
            "summaryMetrics": json.dumps(self.summary),
            "config": json.dumps(self.config),
            "logLineCount": 0,
            "eventsLineCount": 0,
            "historyLineCount": len(self.history),
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsTail": "[]",
            "tags": [],
            "wandbConfig": json.dumps({"t": 1}),
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.query(asked.get("operationName"), asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            self.server.stream(json.loads(body))
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_PUT = do_POST

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A server on a free port."""
    with WandbServer() as server:
        threading.Thread(target=server.serve_forever).start()
        try:
            yield server
        finally:
            server.shutdown()
