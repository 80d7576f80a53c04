"""The pieces of the wire on their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect
from starlette.types import Message

from tunesmith.api.body import Fields, parse_json
from tunesmith.api.connection import while_connected
from tunesmith.api.errors import error_body, error_response
from tunesmith.api.sse import DONE, PING, EventStream, frame
from tunesmith.api.transport import regular_path
from tunesmith.errors import (
    AuthenticationFailed,
    EngineUnavailable,
    InvalidRequest,
    LeaseLost,
    NotFound,
    PermissionDenied,
    RateLimited,
    StorageFull,
    TunesmithError,
    UnsupportedMedia,
)


@pytest.mark.parametrize(
    ("sent", "regular"),
    [
        ("/v1/files", "/v1/files"),
        ("//v1/v1/files//", "/v1/files"),
        ("/", "/"),
        ("", "/"),
        ("/v1/files/%2Fabs%2Ftrain.jsonl/content", "/v1/files/%2Fabs%2Ftrain.jsonl/content"),
        ("/v1/files/a%2fb", "/v1/files/a%2Fb"),
        ("/v1/models/ada:ft-x", "/v1/models/ada%3Aft-x"),
        ("/v1/models/ada%3aft-x", "/v1/models/ada%3Aft-x"),
        ("/v1/fine%2Dtunes", "/v1/fine-tunes"),
    ],
)
def test_regular_path(sent: str, regular: str) -> None:
    assert regular_path(sent) == regular


@given(st.text())
def test_a_regular_path_stays_as_it_is(sent: str) -> None:
    assert regular_path(regular_path(sent)) == regular_path(sent)


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry"),
    [
        (UnsupportedMedia("m"), 415, "invalid_request_error", "false"),
        (InvalidRequest("m", param="p"), 400, "invalid_request_error", "false"),
        (AuthenticationFailed("m", code="c"), 401, "invalid_request_error", "false"),
        (PermissionDenied("m"), 403, "invalid_request_error", "false"),
        (NotFound("m"), 404, "invalid_request_error", "false"),
        (RateLimited("m", retry_after_s=7), 429, "requests", "true"),
        (EngineUnavailable("m"), 429, "server_error", "true"),
        (StorageFull("m"), 507, "server_error", "false"),
    ],
)
def test_answer_to_each_error(error: TunesmithError, status: int, kind: str, retry: str) -> None:
    response = error_response(error)
    assert response.status_code == status
    assert error_body(error) == {"error": {"message": "m", "type": kind, "param": error.param, "code": error.code}}
    assert response.headers["x-should-retry"] == retry
    assert ("retry-after" in response.headers) == (retry == "true")


@pytest.mark.parametrize("error", [RuntimeError("secret"), LeaseLost("secret")])
def test_answer_to_what_nobody_meant(error: Exception) -> None:
    response = error_response(error)
    assert response.status_code == 500
    assert b"secret" not in response.body


def test_every_error_of_the_tree_has_its_answer() -> None:
    def leaves(kind: type[Exception]) -> list[type[Exception]]:
        return [kind, *(leaf for child in kind.__subclasses__() for leaf in leaves(child))]

    meant = {kind for kind in leaves(TunesmithError) if kind.__module__ == "tunesmith.errors"}
    known = {UnsupportedMedia, InvalidRequest, AuthenticationFailed, PermissionDenied, NotFound}
    known |= {RateLimited, EngineUnavailable, StorageFull}
    assert meant - known == {TunesmithError, LeaseLost}


def test_fields_are_taken_once_and_the_rest_refused() -> None:
    fields = Fields({"a": 1, "b": None, "c": {"d": 2, "e": 3}})
    assert fields.integer("a") == 1
    assert fields.text("b") is None
    inner = fields.nested("c")
    assert inner.number("d") == 2.0
    with pytest.raises(InvalidRequest) as refused:
        inner.done()
    assert refused.value.param == "c.e"
    assert "the arguments here are: d" in refused.value.message
    fields.done()


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists))
def test_any_value_is_taken_or_refused(value: Any) -> None:
    for kind in ("integer", "number", "text", "flag", "numbers", "nested"):
        try:
            getattr(Fields({"x": value}), kind)("x")
        except InvalidRequest as error:
            assert error.param == "x"


@given(st.binary())
def test_any_body_is_an_object_or_refused(content: bytes) -> None:
    try:
        assert isinstance(parse_json(content), dict)
    except InvalidRequest as error:
        assert error.message


def test_a_surrogate_pair_is_text_and_half_of_one_is_not() -> None:
    assert parse_json(rb'{"x": "\ud83d\ude00"}') == {"x": "\U0001f600"}
    with pytest.raises(InvalidRequest):
        parse_json(rb'{"x": "\ude00"}')


def test_a_frame_is_one_line_whatever_is_in_it() -> None:
    content = frame({"text": "a\nb\r\u2028\u0085é"}, event_id=3)
    assert content.decode("ascii").splitlines() == ["id: 3", 'data: {"text": "a\\nb\\r\\u2028\\u0085\\u00e9"}', ""]


class Client:
    """The other side of an ASGI connection."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.received: list[bytes] = []
        self.changed = asyncio.Event()

    async def receive(self) -> Message:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        self.received.append(message.get("body", b""))
        self.changed.set()

    async def has(self, content: bytes) -> None:
        while content not in self.received:
            await self.changed.wait()
            self.changed.clear()


@pytest.mark.anyio
async def test_a_stream_is_kept_awake_and_ended() -> None:
    release = asyncio.Event()

    async def frames() -> AsyncGenerator[bytes, None]:
        yield b"first"
        await release.wait()
        yield DONE

    client = Client()
    serving = asyncio.create_task(EventStream(frames(), heartbeat_s=0.01)({}, client.receive, client.send))
    await client.has(PING)
    release.set()
    await serving
    assert client.received[1] == b"first"
    assert client.received[-2:] == [DONE, b""]


@pytest.mark.anyio
async def test_an_error_in_a_stream_is_its_last_frame(caplog: pytest.LogCaptureFixture) -> None:
    for error in (EngineUnavailable("gone"), RuntimeError("secret")):

        async def frames(error: Exception = error) -> AsyncGenerator[bytes, None]:
            yield b"first"
            raise error

        client = Client()
        await EventStream(frames(), heartbeat_s=10)({}, client.receive, client.send)
        assert client.received == [b"", b"first", frame(error_body(error)), b""]
    assert "secret" in caplog.text


@pytest.mark.anyio
async def test_hanging_up_closes_what_feeds_a_stream() -> None:
    closed = asyncio.Event()

    async def frames() -> AsyncGenerator[bytes, None]:
        try:
            yield b"first"
            await asyncio.Event().wait()
        finally:
            closed.set()

    client = Client()
    serving = asyncio.create_task(EventStream(frames(), heartbeat_s=10)({}, client.receive, client.send))
    await client.has(b"first")
    client.gone.set()
    await serving
    assert closed.is_set()


@pytest.mark.anyio
async def test_work_for_a_client_that_hangs_up_is_cancelled() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    client = Client()
    waiting = asyncio.create_task(while_connected(client.receive, work()))
    await asyncio.sleep(0)
    client.gone.set()
    with pytest.raises(ClientDisconnect):
        await waiting
    assert ended.is_set()


@pytest.mark.anyio
async def test_work_gives_its_result_or_its_error() -> None:
    async def work(value: int) -> int:
        if value == 0:
            raise InvalidRequest("zero")
        return value

    assert await while_connected(Client().receive, work(2)) == 2
    with pytest.raises(InvalidRequest):
        await while_connected(Client().receive, work(0))
