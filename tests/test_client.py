"""The client of our own /v1 against a small real server: what it sends, what it makes of answers, how it goes on."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import AsyncIterator

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tests.cli.loopback import listening
from tunesmith.client import PATIENCE_S, ApiError, Client, ServerUnreachable

EVENTS = [{"created_at": 1_700_000_000 + n, "level": "info", "message": f"event {n}"} for n in range(1, 6)]


def sse(*events: tuple[int, dict[str, object]], done: bool = False) -> list[str]:
    """Frames of an event stream, a comment first."""
    frames = [": ping\n\n", *(f"id: {n}\ndata: {json.dumps(event)}\n\n" for n, event in events)]
    return [*frames, "data: [DONE]\n\n"] if done else frames


async def stream(frames: list[str], *, broken: bool = False) -> AsyncIterator[str]:
    for frame in frames:
        yield frame
    if broken:
        raise ConnectionAbortedError("the server goes away in the middle of the answer")


def test_ids_are_quoted_and_the_key_and_organization_are_sent() -> None:
    async def echo(request: Request) -> Response:
        headers = {name: request.headers.get(name) for name in ("authorization", "openai-organization")}
        return JSONResponse(
            {"raw_path": request.scope["raw_path"].decode(), "query": str(request.query_params), **headers}
        )

    app = Starlette(routes=[Route("/v1/{rest:path}", echo)])
    with listening(app) as base_url, Client(base_url + "/", "sk-secret", "org-1") as client:
        assert client.get("models", "ada:ft-x/y z", limit=3) == {
            "raw_path": "/v1/models/ada%3Aft-x%2Fy%20z",
            "query": "limit=3",
            "authorization": "Bearer sk-secret",
            "openai-organization": "org-1",
        }


def test_cancel_has_neither_body_nor_content_type() -> None:
    async def echo(request: Request) -> Response:
        return JSONResponse({"type": request.headers.get("content-type"), "body": (await request.body()).decode()})

    with (
        listening(Starlette(routes=[Route("/v1/fine-tunes/ft-1/cancel", echo, methods=["POST"])])) as base_url,
        Client(base_url, "sk-x") as client,
    ):
        assert client.post("fine-tunes", "ft-1", "cancel") == {"type": None, "body": ""}


def test_upload_sends_purpose_name_and_bytes() -> None:
    async def receive(request: Request) -> Response:
        async with request.form() as form:
            file = form["file"]
            assert not isinstance(file, str)
            return JSONResponse({"purpose": form["purpose"], "filename": file.filename, "size": len(await file.read())})

    with (
        listening(Starlette(routes=[Route("/v1/files", receive, methods=["POST"])])) as base_url,
        Client(base_url, "sk-x") as client,
    ):
        answer = client.upload("a/b.jsonl", io.BytesIO(b"x" * 300_000), "fine-tune")
    assert answer == {"purpose": "fine-tune", "filename": "a/b.jsonl", "size": 300_000}


def test_a_refusal_carries_every_field() -> None:
    async def refuse(request: Request) -> Response:
        error = {
            "message": "No such model",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
        return JSONResponse({"error": error}, status_code=404)

    with (
        listening(Starlette(routes=[Route("/v1/models/x", refuse)])) as base_url,
        Client(base_url, "sk-x") as client,
        pytest.raises(ApiError) as caught,
    ):
        client.get("models", "x")
    error = caught.value
    assert (error.status, error.message, error.error_type, error.param, error.code) == (
        404,
        "No such model",
        "invalid_request_error",
        "model",
        "model_not_found",
    )


def test_an_answer_that_is_not_of_this_api_is_shown_as_it_is() -> None:
    async def gateway(request: Request) -> Response:
        return PlainTextResponse("upstream is down", status_code=502)

    with (
        listening(Starlette(routes=[Route("/v1/models", gateway)])) as base_url,
        Client(base_url, "sk-x") as client,
        pytest.raises(ApiError, match=r"HTTP 502.*upstream is down"),
    ):
        client.get("models")


def test_nothing_there_says_how_to_start_a_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with (
        Client(f"http://127.0.0.1:{port}/v1", "sk-x") as client,
        pytest.raises(ServerUnreachable, match="tunesmith serve"),
    ):
        client.get("models")


def test_a_streamed_completion_ends_at_done_and_an_error_in_it_is_raised() -> None:
    async def complete(request: Request) -> Response:
        good = f"data: {json.dumps({'choices': []})}\n\n"
        bad = f"data: {json.dumps({'error': {'message': 'the engine died', 'type': 'server_error'}})}\n\n"
        frames = [good, bad] if (await request.json())["fail"] else [good, good, "data: [DONE]\n\n"]
        return StreamingResponse(stream(frames), media_type="text/event-stream")

    with (
        listening(Starlette(routes=[Route("/v1/completions", complete, methods=["POST"])])) as base_url,
        Client(base_url, "sk-x") as client,
    ):
        assert list(client.stream("completions", body={"fail": False})) == [{"choices": []}] * 2
        with pytest.raises(ApiError, match="the engine died"):
            list(client.stream("completions", body={"fail": True}))


SHUTTING_DOWN = (
    f"data: {json.dumps({'error': {'message': 'The server is shutting down.', 'type': 'server_error'}})}\n\n"
)


@pytest.mark.parametrize(
    ("last_frames", "broken"),
    [([], True), ([], False), ([SHUTTING_DOWN], False)],
    ids=["connection breaks", "stream ends without [DONE]", "server says it is shutting down"],
)
def test_follow_goes_on_after_the_last_event_it_saw(last_frames: list[str], broken: bool) -> None:
    asked: list[str | None] = []

    async def events(request: Request) -> Response:
        assert request.query_params["stream"] == "true"
        asked.append(request.headers.get("last-event-id"))
        if len(asked) == 1:
            frames, breaks = sse(*enumerate(EVENTS[:2], start=1)) + last_frames, broken
        elif len(asked) == 2:
            return JSONResponse({"error": {"message": "starting", "type": "server_error"}}, status_code=503)
        else:
            frames, breaks = sse(*enumerate(EVENTS[2:], start=3), done=True), False
        return StreamingResponse(stream(frames, broken=breaks), media_type="text/event-stream")

    pauses: list[float] = []
    reasons: list[str] = []
    app = Starlette(routes=[Route("/v1/fine-tunes/ft-1/events", events)])
    with listening(app) as base_url, Client(base_url, "sk-x") as client:
        seen = list(client.follow("ft-1", sleep=pauses.append, interrupted=reasons.append))
    assert seen == EVENTS
    assert asked == [None, "2", "2"]
    assert pauses == [0.5, 1.0]
    assert len(reasons) == 2


def test_follow_does_not_try_a_refusal_again() -> None:
    async def refuse(request: Request) -> Response:
        return JSONResponse({"error": {"message": "No such job", "type": "invalid_request_error"}}, status_code=404)

    app = Starlette(routes=[Route("/v1/fine-tunes/ft-1/events", refuse)])
    with listening(app) as base_url, Client(base_url, "sk-x") as client, pytest.raises(ApiError, match="No such job"):
        list(client.follow("ft-1", sleep=lambda pause_s: pytest.fail("asked again")))


def test_follow_gives_up_in_the_end() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    pauses: list[float] = []
    with Client(f"http://127.0.0.1:{port}/v1", "sk-x") as client, pytest.raises(ServerUnreachable, match="Gave up"):
        list(client.follow("ft-1", sleep=pauses.append))
    assert PATIENCE_S <= sum(pauses) < PATIENCE_S + 10


def test_a_proxy_is_asked_for_the_whole_address() -> None:
    async def forward(scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        answer = JSONResponse({"asked": scope["raw_path"].decode(), "host": headers[b"host"].decode()})
        await answer(scope, receive, send)

    with (
        listening(forward) as proxy_url,
        Client("http://far.example/v1", "sk-secret", proxies=[proxy_url, "https://other.example:3128"]) as client,
    ):
        assert client.get("models") == {"asked": "http://far.example/v1/models", "host": "far.example"}
