"""A server with every part real but the weights: driven in this process, or over a socket of its own."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from tunesmith.core.jobs import Claim
from tunesmith.engine.handles import ADAPTER_WEIGHTS
from tunesmith.server import Parts, build, http_config
from tunesmith.settings import Settings
from tunesmith.tokenizer import Tokenizer

OWNER_KEY = "sk-" + "owner-" * 6
ROWS = b"".join(b'{"prompt": "Row %d ->", "completion": " %s"}\n' % (i, [b"yes", b"no"][i % 2]) for i in range(8))
FILE = {
    "id": "file-*",
    "object": "file",
    "bytes": len(ROWS),
    "created_at": "<unix>",
    "filename": "train.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
    "status_details": None,
}
"""The file object of ROWS, ids and times masked."""


"""Eight examples of two classes."""


def settings_for(home: Path, base: Path, **values: Any) -> Settings:
    """Settings of a server whose four bases are the checkpoint folder `base`."""
    home.mkdir(exist_ok=True)
    names = ("ada", "babbage", "curie", "davinci")
    (home / "bases.toml").write_text("".join(f'[{name}]\nfolder = "{base}"\n' for name in names))
    return Settings(**{"home": home, "port": 0, "owner_key": OWNER_KEY, "engine": "scripted", **values})


@asynccontextmanager
async def parts_of(settings: Settings) -> AsyncIterator[Parts]:
    """A server that is built but does not listen, and whose dispatcher moves only when a test moves it."""
    parts = build(settings, is_stopping=lambda: False, loop=asyncio.get_running_loop())
    try:
        yield parts
    finally:
        await parts.engine.close()
        parts.store.close()


def client_of(parts: Parts, key: str | None = OWNER_KEY) -> httpx.AsyncClient:
    """A client that calls the app directly; the path is sent as it is written."""
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    transport = httpx.ASGITransport(app=parts.app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers, timeout=60)


class Live:
    """A built server listening on a free port of its own, on an event loop of its own."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.stopping = threading.Event()
        self.parts: Parts
        self.port = 0
        self._started = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def client(self, key: str = OWNER_KEY) -> httpx.Client:
        return httpx.Client(base_url=self.base_url, headers={"Authorization": f"Bearer {key}"}, timeout=30)

    def start(self) -> None:
        self._thread.start()
        assert self._started.wait(30)
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        self.stopping.set()
        self._http.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._error = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self.parts = build(self.settings, is_stopping=self.stopping.is_set, loop=asyncio.get_running_loop())
        self._http = uvicorn.Server(http_config(self.parts.app))
        self._http.config.port = 0
        serving = asyncio.create_task(self._http.serve())
        while not self._http.started and not serving.done():
            await asyncio.sleep(0.01)
        self.port = self._http.servers[0].sockets[0].getsockname()[1]
        self._started.set()
        await serving
        await self.parts.engine.close()
        self.parts.store.close()


@contextmanager
def live(settings: Settings) -> Iterator[Live]:
    """A server on a socket while the context lasts."""
    server = Live(settings)
    server.start()
    try:
        yield server
    finally:
        server.end()


async def upload(client: httpx.AsyncClient, content: bytes = ROWS, filename: str = "train.jsonl") -> str:
    """The id of a new training file."""
    response = await client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (filename, content)})
    assert response.status_code == 200, response.text
    file_id: str = response.json()["id"]
    return file_id


async def create_job(client: httpx.AsyncClient, **fields: Any) -> str:
    """The id of a new fine-tune of ROWS."""
    body = {"training_file": await upload(client), "model": "ada", **fields}
    response = await client.post("/v1/fine-tunes", json=body)
    assert response.status_code == 200, response.text
    job_id: str = response.json()["id"]
    return job_id


def finish(parts: Parts, claim: Claim, folder: Path) -> None:
    """Ends a claimed job well, as the dispatcher would."""
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / ADAPTER_WEIGHTS).write_bytes(b"weights")
    results = folder / "results.csv"
    results.write_text("step\n1\n")
    parts.services.jobs.succeed(claim, adapter_dir=adapter, results_csv=results, trained_tokens=1)


def masked(value: Any) -> Any:
    """`value` with what differs from run to run replaced: ids by `prefix-*`, seconds of this century by `<unix>`."""
    if isinstance(value, dict):
        return {key: masked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [masked(item) for item in value]
    if isinstance(value, str):
        return re.sub(r"\b(file|ft|org|key|cmpl|req|modelperm)([-_])[A-Za-z0-9]{24}\b", r"\1\2*", value)
    if isinstance(value, int) and not isinstance(value, bool) and value > 1_600_000_000:
        return "<unix>"
    return value


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, which has the one shape and no other key."""
    body = response.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    error: dict[str, Any] = body["error"]
    return error


def ids_of(base: Path, text: str) -> tuple[int, ...]:
    """Token ids of a text."""
    return tuple(Tokenizer.from_folder(base).encode(text))
