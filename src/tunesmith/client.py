"""A small HTTP client of our own /v1. Knows the wire and nothing of the server behind it; prints nothing.

with Client("http://127.0.0.1:8000/v1", api_key) as client:
    job = client.post("fine-tunes", body={"training_file": "file-..."})
    for event in client.follow(job["id"]):
        ...
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote, urlsplit

import httpx

from tunesmith.errors import TunesmithError

USUAL_TIMEOUT = httpx.Timeout(600.0, connect=5.0)
"""A request may wait for a model to load, as the published clients do: ten minutes."""
STREAM_TIMEOUT = httpx.Timeout(60.0, connect=5.0)
"""Event streams carry a comment every few seconds: a minute of silence is a dead connection."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 5.0
PATIENCE_S = 600.0
"""How long `follow` keeps trying a server that does not answer."""

LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class ApiError(TunesmithError):
    """The server refused a request, in OpenAI's error shape."""

    def __init__(
        self, status: int, message: str, error_type: str | None, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status
        self.error_type = error_type


class ServerUnreachable(TunesmithError):
    """Nothing answers at the base URL, or the connection broke before the answer was whole."""


def is_loopback(base_url: str) -> bool:
    """Whether a URL names this very machine."""
    return urlsplit(base_url).hostname in LOOPBACK


class Client:
    """One base URL and one key. Paths are given as segments, each quoted: `client.get("models", "ada:ft-x")`.

    Every method raises ApiError for a refusal and ServerUnreachable where there was no answer.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        organization: str | None = None,
        proxies: Sequence[str] = (),
        *,
        timeout_s: float | None = None,
    ) -> None:
        """`proxies`: URLs of HTTP proxies; one that starts with https is for https servers, any other for http ones.

        `timeout_s` is for a caller who waits less than USUAL_TIMEOUT. Raises ValueError for what is no URL.
        """
        try:
            httpx.URL(base_url)
        except httpx.InvalidURL as error:
            raise ValueError(str(error)) from error
        headers = {"Authorization": f"Bearer {api_key}"}
        if organization is not None:
            headers["OpenAI-Organization"] = organization
        self.base_url = base_url.rstrip("/")
        # A proxy of the environment is for the world outside; it cannot reach this machine's loopback.
        self._http = httpx.Client(
            headers=headers,
            timeout=USUAL_TIMEOUT if timeout_s is None else timeout_s,
            trust_env=not is_loopback(base_url),
            mounts={f"{urlsplit(proxy).scheme}://": httpx.HTTPTransport(proxy=proxy) for proxy in proxies},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections. Idempotent."""
        self._http.close()

    def get(self, *segments: str, **query: str | int) -> Any:
        """The JSON answer to GET."""
        return _json(self._ask("GET", segments, params=query))

    def post(self, *segments: str, body: dict[str, Any] | None = None) -> Any:
        """The JSON answer to POST, with a JSON body or none at all."""
        return _json(self._ask("POST", segments, json=body))

    def delete(self, *segments: str) -> Any:
        """The JSON answer to DELETE."""
        return _json(self._ask("DELETE", segments))

    def content(self, file_id: str) -> bytes:
        """The bytes of a file."""
        return self._ask("GET", ("files", file_id, "content")).content

    def download(self, *segments: str, to: BinaryIO, **query: str) -> Mapping[str, str]:
        """Writes the bytes that GET answers with, as they come; the headers of the answer."""
        with self._open("GET", segments, params=query) as response:
            for chunk in response.iter_bytes():
                to.write(chunk)
            return response.headers

    def import_model(self, package: BinaryIO, base: str, suffix: str | None = None) -> Any:
        """The model object of a zip of weights for `base`."""
        fields = {"model": base} | ({} if suffix is None else {"suffix": suffix})
        return _json(self._ask("POST", ("models",), data=fields, files={"file": ("model.zip", package)}))

    def upload(self, filename: str, file: BinaryIO, purpose: str) -> Any:
        """The file object of an upload; `file` is read once from its position, in pieces."""
        return _json(self._ask("POST", ("files",), data={"purpose": purpose}, files={"file": (filename, file)}))

    def stream(self, *segments: str, body: dict[str, Any]) -> Iterator[Any]:
        """The JSON chunks of a streamed POST, up to `[DONE]`. An error inside the stream is an ApiError."""
        with self._open("POST", segments, json=body) as response:
            for _, data in _messages(response.iter_lines()):
                if data == "[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise _api_error(response.status_code, chunk)
                yield chunk

    def follow(
        self,
        job_id: str,
        *,
        metrics: bool = False,
        sleep: Callable[[float], None] = time.sleep,
        interrupted: Callable[[str], None] = lambda reason: None,
        connected: Callable[[], None] = lambda: None,
    ) -> Iterator[dict[str, Any]]:
        """The events of a legacy fine-tune, past and to come, each once, until the job has ended.

        With `metrics` the numbers of its steps are among them; see `type` and `data` of an event.

        A connection that breaks (the server restarts, say) is opened again after the last event seen, by
        `Last-Event-ID`. `interrupted` hears the reason of each break, `connected` of each opening; after PATIENCE_S
        without an answer ServerUnreachable is raised.
        """
        last_id: str | None = None
        pause_s, waited_s = FIRST_PAUSE_S, 0.0
        while True:
            try:
                for event_id, data in self._events(job_id, last_id, metrics, connected):
                    if data == "[DONE]":
                        return
                    event = json.loads(data)
                    if "error" in event:  # the server says why it ends the stream early; the job is not touched by it
                        raise _api_error(500, event)
                    pause_s, waited_s, last_id = FIRST_PAUSE_S, 0.0, event_id
                    yield event
                reason = "The event stream ended before the job did."
            except ServerUnreachable as error:
                reason = error.message
            except ApiError as error:
                if error.status < 500:  # a refusal stays one; a server that is just starting does not
                    raise
                reason = error.message
            if waited_s >= PATIENCE_S:
                raise ServerUnreachable(f"Gave up following {job_id} after {PATIENCE_S:.0f} s: {reason}")
            interrupted(reason)
            sleep(pause_s)
            pause_s, waited_s = min(2 * pause_s, LONGEST_PAUSE_S), waited_s + pause_s

    def _events(
        self, job_id: str, last_id: str | None, metrics: bool, connected: Callable[[], None]
    ) -> Iterator[tuple[str | None, str]]:
        """(event id, data) of one connection to the event stream."""
        headers = {} if last_id is None else {"Last-Event-ID": last_id}
        segments = ("fine-tunes", job_id, "events")
        query = {"stream": "true"} | ({"metrics": "true"} if metrics else {})
        with self._open("GET", segments, params=query, headers=headers, timeout=STREAM_TIMEOUT) as response:
            connected()
            yield from _messages(response.iter_lines())

    def _url(self, segments: Iterable[str]) -> str:
        return "/".join([self.base_url, *(quote(segment, safe="") for segment in segments)])

    def _ask(self, method: str, segments: tuple[str, ...], **request: Any) -> httpx.Response:
        try:
            response = self._http.request(method, self._url(segments), **request)
        except httpx.RequestError as error:
            raise self._unreachable(error) from error
        _raise_for(response)
        return response

    @contextmanager
    def _open(self, method: str, segments: tuple[str, ...], **request: Any) -> Iterator[httpx.Response]:
        try:
            with self._http.stream(method, self._url(segments), **request) as response:
                if response.is_error:
                    response.read()
                _raise_for(response)
                yield response
        except httpx.RequestError as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: httpx.RequestError) -> ServerUnreachable:
        return ServerUnreachable(
            f"No answer from {self.base_url} ({error or type(error).__name__}). "
            "Start a server with `tunesmith serve`, or name another with -b/--api-base."
        )


def _messages(lines: Iterable[str]) -> Iterator[tuple[str | None, str]]:
    """(last id given, data) of each server-sent event; comments and other fields are passed over."""
    event_id: str | None = None
    data: list[str] = []
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if name == "id":
            event_id = value
        elif name == "data":
            data.append(value)
        elif line == "" and data:
            yield event_id, "\n".join(data)
            data = []


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError as error:
        raise _api_error(response.status_code, None, response.text) from error


def _raise_for(response: httpx.Response) -> None:
    if response.is_success:
        return
    try:
        body = response.json()
    except ValueError:
        body = None
    raise _api_error(response.status_code, body, response.text)


def _api_error(status: int, body: Any, text: str = "") -> ApiError:
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return ApiError(status, f"HTTP {status}, with no error of this API in it: {text[:200]!r}", None)
    return ApiError(status, error["message"], error.get("type"), error.get("param"), error.get("code"))
