"""What holds for every request: paths, keys, headers, the one shape of errors."""

from __future__ import annotations

import gzip
import logging

import httpx
import pytest

from tests.wire.harness import OWNER_KEY, client_of, error_of
from tunesmith.server import Parts

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    "path",
    ["/v1/models", "/v1/models/", "/v1//models", "//v1/models", "/v1/v1/models", "/v1//v1/models//", "/v1/mo%64els"],
)
async def test_spellings_of_one_path(shared: httpx.AsyncClient, path: str) -> None:
    assert (await shared.get("http://test" + path)).json()["data"][0]["id"] == "ada"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/nope"),
        ("GET", "/nope"),
        ("GET", "/"),
        ("POST", "/v1/answers"),
        ("POST", "/v1/engines/ada/search"),
        ("GET", "/v1/fine_tuning/alpha/graders/run"),
        ("GET", "/v1/files/some/dir/train.jsonl"),
    ],
)
async def test_unknown_url_names_method_and_path(shared_parts: Parts, method: str, path: str) -> None:
    async with client_of(shared_parts, key=None) as anybody:
        response = await anybody.request(method, path)
    assert response.status_code == 404
    error = error_of(response)
    assert f"({method} {path})" in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", None, None)
    assert response.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("DELETE", "/v1/fine-tunes/ft-x", {"GET", "HEAD"}),
        ("PUT", "/v1/files", {"GET", "HEAD", "POST"}),
        ("GET", "/v1/completions", {"POST"}),
        ("DELETE", "/v1/engines/ada", {"GET", "HEAD", "POST"}),
    ],
)
async def test_wrong_method(shared: httpx.AsyncClient, method: str, path: str, allowed: set[str]) -> None:
    response = await shared.request(method, path)
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == allowed
    assert f"Not allowed to {method} on {path}" in error_of(response)["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {OWNER_KEY}"},
        {"Authorization": f"bearer  {OWNER_KEY}"},
        {"api-key": OWNER_KEY},
        {"Authorization": "Basic abc", "api-key": OWNER_KEY},
        {"Authorization": f"Bearer {OWNER_KEY}", "OpenAI-Organization": "org-of-another-time"},
    ],
)
async def test_ways_to_send_a_key(shared_parts: Parts, headers: dict[str, str]) -> None:
    async with client_of(shared_parts, key=None) as anybody:
        response = await anybody.get("/v1/models", headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer "}, {"Authorization": f"Basic {OWNER_KEY}"}])
async def test_no_key(shared_parts: Parts, headers: dict[str, str]) -> None:
    async with client_of(shared_parts, key=None) as anybody:
        response = await anybody.get("/v1/models", headers=headers)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    error = error_of(response)
    assert error["message"].startswith("You didn't provide an API key")
    assert (error["type"], error["code"]) == ("invalid_request_error", None)


@pytest.mark.parametrize(
    ("path", "status"), [("/v1/files/a%00b", 404), ("/v1/models/%00", 404), ("/v1/files?purpose=%00", 400)]
)
async def test_no_text_with_nul_reaches_the_database(shared: httpx.AsyncClient, path: str, status: int) -> None:
    response = await shared.get(path)
    assert response.status_code == status
    assert "the NUL character" in error_of(response)["message"]


async def test_wrong_key_is_not_echoed(shared_parts: Parts) -> None:
    wrong = "sk-" + "wrong" * 10
    async with client_of(shared_parts, wrong) as intruder:
        response = await intruder.get("/v1/models")
    assert response.status_code == 401
    error = error_of(response)
    assert error["message"].startswith("Incorrect API key provided: sk-wr***rong")
    assert error["code"] == "invalid_api_key"
    assert wrong not in response.text


async def test_headers_of_every_answer(shared_parts: Parts, shared: httpx.AsyncClient) -> None:
    answers = [await shared.get("/v1/models"), await shared.get("/v1/nope"), await shared.post("/v1/completions")]
    async with client_of(shared_parts, key=None) as anybody:
        answers += [await anybody.get("/v1/models"), await anybody.get("/healthz")]
    assert [answer.status_code for answer in answers] == [200, 404, 400, 401, 200]
    for answer in answers:
        assert answer.headers["x-request-id"].startswith("req_")
        assert answer.headers["openai-version"] == "2020-10-01"
        assert float(answer.headers["openai-processing-ms"]) >= 0
        assert "request-id" not in answer.headers  # the old clients would put it before every message
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)
    assert [answer.headers.get("openai-organization") for answer in answers] == [
        "personal",
        None,
        "personal",
        None,
        None,
    ]


async def test_a_fault_of_ours_leaks_nothing(
    parts: Parts, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    parts.store.close()
    with parts.store.transaction() as connection:
        connection.exec_driver_sql("ALTER TABLE files RENAME TO misplaced")
    with caplog.at_level(logging.ERROR):
        response = await client.get("/v1/files")
    assert response.status_code == 500
    error = error_of(response)
    assert (error["type"], error["param"], error["code"]) == ("server_error", None, None)
    assert "no such table" not in response.text
    assert "no such table" in caplog.text
    assert response.headers["x-request-id"] in caplog.text


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "could not parse"),
        (b"{", "could not parse"),
        (b'{"model": NaN}', "NaN is no JSON number"),
        (b'{"model": "\xff"}', "UTF-8"),
        (b'{"model": "\\ud800"}', "Unicode"),
        (b"[" * 100_000, "could not parse"),
        (b'["ada"]', "it is a list"),
        (b"null", "it is null"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/fine-tunes", "/v1/organization/keys"])
async def test_body_that_is_no_json_object(shared: httpx.AsyncClient, path: str, content: bytes, told: str) -> None:
    response = await shared.post(path, content=content, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    error = error_of(response)
    assert told in error["message"]
    assert error["type"] == "invalid_request_error"


async def test_body_of_another_kind(shared: httpx.AsyncClient) -> None:
    response = await shared.post("/v1/completions", data={"model": "ada"})
    assert response.status_code == 415
    assert "Content-Type: application/json" in error_of(response)["message"]


async def test_body_that_is_packed(shared: httpx.AsyncClient) -> None:
    packed = gzip.compress(b'{"model": "ada"}')
    headers = {"Content-Type": "application/json", "Content-Encoding": "gzip"}
    response = await shared.post("/v1/completions", content=packed, headers=headers)
    assert response.status_code == 415
    assert "sent as gzip" in error_of(response)["message"]


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json", None]
)
async def test_kinds_of_json(shared: httpx.AsyncClient, kind: str | None) -> None:
    headers = {} if kind is None else {"Content-Type": kind}
    response = await shared.post("/v1/fine-tunes", content=b"{}", headers=headers)
    assert response.status_code == 400
    assert error_of(response)["param"] == "training_file"


async def test_a_json_body_is_bounded(shared: httpx.AsyncClient) -> None:
    body = b'{"model": "' + b"a" * (32 * 1024 * 1024) + b'"}'
    response = await shared.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "larger than" in error_of(response)["message"]
