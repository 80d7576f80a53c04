"""What only a socket shows: streams as they grow, connections that close, clients that hang up."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.waiting import until
from tests.wire.harness import OWNER_KEY, ROWS, Live, error_of, finish, live, settings_for
from tunesmith.engine.scripted import ScriptedEngine

BOUNDARY = "limit-of-parts"
LONG = {"model": "ada", "prompt": "Hello", "max_tokens": 2000, "n": 16, "seed": 1, "logit_bias": {"0": -100}}
"""More work than any test waits for."""


def new_job(client: httpx.Client) -> str:
    file = client.post("/files", data={"purpose": "fine-tune"}, files={"file": ("t.jsonl", ROWS)}).json()
    job_id: str = client.post("/fine-tunes", json={"training_file": file["id"], "model": "ada"}).json()["id"]
    return job_id


def running(server: Live) -> int:
    assert isinstance(server.parts.engine, ScriptedEngine)
    return server.parts.engine.running


def raw_request(server: Live, head: str, headers: dict[str, str] | None = None) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    lines = [head, "Host: test", f"Authorization: Bearer {OWNER_KEY}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    connection.sendall("\r\n".join([*lines, "", ""]).encode())
    return connection


def read_all(connection: socket.socket) -> bytes:
    """All until the server closes the connection; a server that does not is a timeout."""
    with connection, connection.makefile("rb") as content:
        return content.read()


def test_following_a_job_to_its_end(server: Live, tmp_path: Path) -> None:
    jobs = server.parts.services.jobs
    with server.client() as client, server.client() as other:
        job_id = new_job(client)
        with client.stream("GET", f"/fine-tunes/{job_id}/events", params={"stream": "true"}) as response:
            assert response.headers["content-type"] == "text/event-stream"
            lines = response.iter_lines()
            assert next(lines) == "id: 1"
            assert json.loads(next(lines).removeprefix("data: "))["message"] == f"Created fine-tune: {job_id}"
            assert next(lines) == ""
            assert next(lines) == ": ping"  # nothing happens: the connection is kept awake
            claim = jobs.claim("test", 60)
            assert claim is not None
            jobs.started(claim, "handle", jobs.hyperparameters(claim.job, 8))
            while "Fine-tune started" not in (line := next(lines)):
                assert line == "" or line.startswith((": ping", "id: ", "data: "))
            finish(server.parts, claim, tmp_path)
            rest = list(lines)  # ends: the connection is closed
        assert rest[-2:] == ["data: [DONE]", ""]
        job = other.get(f"/fine-tunes/{job_id}").json()
        assert job["status"] == "succeeded"
        assert job["fine_tuned_model"]


def test_the_connection_is_closed_after_done(server: Live) -> None:
    with server.client() as client:
        job_id = new_job(client)
        client.post(f"/fine-tunes/{job_id}/cancel")
    answer = read_all(raw_request(server, f"GET /v1/fine-tunes/{job_id}/events?stream=true HTTP/1.1"))
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert b"data: [DONE]\n\n" in body


def test_a_completion_stream_closes_its_connection(server: Live) -> None:
    body = json.dumps({"model": "ada", "prompt": "x", "max_tokens": 2, "stream": True}).encode()
    head = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    connection = raw_request(server, "POST /v1/completions HTTP/1.1", head)
    connection.sendall(body)
    assert b"data: [DONE]\n\n" in read_all(connection)


def test_resuming_after_the_last_event_seen(server: Live) -> None:
    with server.client() as client:
        job_id = new_job(client)
        client.post(f"/fine-tunes/{job_id}/cancel")
        whole = client.get(f"/fine-tunes/{job_id}/events", params={"stream": "true"}).text
        path, query = f"/fine-tunes/{job_id}/events", {"stream": "true"}
        done = "data: [DONE]\n\n"
        ids = [("0", whole), ("2", done), ("99", done), (str(2**63 - 1), done)]
        no_ids = [(text, whole) for text in ("x", "-1", "1.5", str(2**63), "9" * 5_000)]
        for seen, left in ids + no_ids:
            assert client.get(path, params=query, headers={"Last-Event-ID": seen}).text == left


@pytest.mark.parametrize("stream", [True, False])
def test_hanging_up_ends_the_generation(server: Live, stream: bool) -> None:
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    connection = raw_request(server, "POST /v1/completions HTTP/1.1", head)
    connection.sendall(body)
    until(lambda: running(server) > 0)
    if stream:
        assert connection.recv(12) == b"HTTP/1.1 200"
    connection.close()
    until(lambda: running(server) == 0, within_s=20)


def test_others_are_answered_while_one_generates(server: Live) -> None:
    with server.client() as client, server.client() as other:
        with client.stream("POST", "/completions", json={**LONG, "stream": True}) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            assert other.get("/models").status_code == 200
            assert running(server) > 0
        until(lambda: running(server) == 0, within_s=20)


def chunks(size: int) -> Iterator[bytes]:
    """A form, file first, of undeclared length."""
    yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="a/b.jsonl"\r\n\r\n'.encode()
    for _ in range(size // 100_000):
        yield ROWS * (100_000 // len(ROWS))
    yield (
        f'\r\n--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--{BOUNDARY}--\r\n'
    ).encode()


FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def test_a_chunked_upload(server: Live) -> None:
    with server.client() as client:
        response = client.post("/files", content=chunks(1_000_000), headers=FORM)
        assert response.status_code == 200
        assert response.json()["filename"] == "a/b.jsonl"
        assert response.json()["bytes"] > 900_000


def test_an_upload_too_large_hears_so(server: Live) -> None:
    with server.client() as client:
        response = client.post("/files", content=chunks(3_500_000), headers=FORM)
        assert response.status_code == 400
        assert "2000000 bytes" in error_of(response)["message"]


def test_an_upload_with_a_wrong_key_hears_so(server: Live) -> None:
    """And not that the connection broke: what is still being sent is read, and thrown away."""
    with server.client("sk-" + "wrong" * 10) as client:
        response = client.post("/files", content=chunks(1_900_000), headers=FORM)
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"


def test_a_refused_client_that_asked_first_need_not_send(server: Live) -> None:
    head = {**FORM, "Content-Length": "1000000", "Expect": "100-continue", "Authorization": "Bearer nobody"}
    connection = socket.create_connection(("127.0.0.1", server.port), timeout=20)
    lines = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "test", **head}.items())
    connection.sendall(f"POST /v1/files HTTP/1.1\r\n{lines}\r\n".encode())
    assert read_all(connection).startswith(b"HTTP/1.1 401")


def test_an_upload_that_breaks_off_leaves_nothing(server: Live) -> None:
    before = stored(server)
    connection = raw_request(server, "POST /v1/files HTTP/1.1", {**FORM, "Content-Length": "1900000"})
    content = b"".join(chunks(1_000_000))
    connection.sendall(content[:500_000])
    until(lambda: open_spools(server) == 1)
    connection.close()
    until(lambda: open_spools(server) == 0)
    assert stored(server) == before
    with server.client() as client:
        assert client.get("/models").status_code == 200


def stored(server: Live) -> list[Path]:
    home = server.settings.home
    return sorted(path for folder in ("uploads", "files") for path in (home / folder).rglob("*"))


def open_spools(server: Live) -> int:
    """Unnamed files this process has open on the spool folder."""
    count = 0
    for link in Path("/proc/self/fd").iterdir():
        try:
            count += str(link.readlink()).startswith(str(server.settings.home / "uploads"))
        except FileNotFoundError:
            continue
    return count


@pytest.mark.parametrize("path", [".%2Ftrain.jsonl", "%2Fabs%2Ftrain.jsonl", "http%3A%2F%2Fhost%2Ft.jsonl"])
def test_encoded_slashes_reach_us(server: Live, path: str) -> None:
    answer = read_all(raw_request(server, f"GET /v1//files/{path} HTTP/1.1", {"Connection": "close"}))
    assert answer.startswith(b"HTTP/1.1 404")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["param"] == "id"


def test_stopping_ends_the_streams_of_running_jobs(tmp_path: Path, tiny_base: Path) -> None:
    received: list[Any] = []
    with live(settings_for(tmp_path / "home", tiny_base)) as server, server.client() as client:
        job_id = new_job(client)
        following = threading.Event()

        def follow() -> None:
            with client.stream("GET", f"/fine-tunes/{job_id}/events?stream=true") as response:
                for line in response.iter_lines():
                    received.append(line)
                    following.set()

        follower = threading.Thread(target=follow)
        follower.start()
        assert following.wait(20)
        server.end()
        follower.join(20)
        assert not follower.is_alive()
    assert "data: [DONE]" not in received
    last = json.loads(received[-2].removeprefix("data: "))
    assert "shutting down" in last["error"]["message"]
