"""Models on the wire."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from tests.wire.harness import error_of, masked

pytestmark = pytest.mark.anyio

PERMISSION = {
    "id": "modelperm-*",
    "object": "model_permission",
    "created": "<unix>",
    "allow_create_engine": False,
    "allow_sampling": True,
    "allow_logprobs": True,
    "allow_search_indices": False,
    "allow_view": True,
    "allow_fine_tuning": True,
    "organization": "*",
    "group": None,
    "is_blocking": False,
}


async def test_list_has_the_four_bases(shared: httpx.AsyncClient) -> None:
    body = (await shared.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [model["id"] for model in body["data"]] == ["ada", "babbage", "curie", "davinci"]


async def test_a_base(shared: httpx.AsyncClient, tiny_base: Path) -> None:
    response = await shared.get("/v1/models/ada")
    assert response.status_code == 200
    body = response.json()
    assert body.pop("owned_by")
    assert body.pop("state") in ("on disk", "resident")
    assert body.pop("description") == f"checkpoint {tiny_base.name}"
    assert masked(body) == {
        "id": "ada",
        "object": "model",
        "created": "<unix>",
        "permission": [PERMISSION],
        "root": "ada",
        "parent": None,
        "method": None,
    }


async def test_whether_a_model_can_answer_at_once(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/models/ada")).json()["state"] == "on disk"
    assert (await client.post("/v1/completions", json={"model": "ada", "prompt": "x"})).status_code == 200
    assert (await client.get("/v1/models/ada")).json()["state"] == "resident"


async def test_unknown_model(shared: httpx.AsyncClient) -> None:
    for method, path in [("GET", "/v1/models/nope"), ("DELETE", "/v1/models/nope"), ("GET", "/v1/engines/nope")]:
        response = await shared.request(method, path)
        assert response.status_code == 404
        error = error_of(response)
        assert (error["type"], error["code"]) == ("invalid_request_error", "model_not_found")
        assert "`nope` does not exist" in error["message"]


async def test_a_base_is_not_deleted(shared: httpx.AsyncClient) -> None:
    response = await shared.delete("/v1/models/ada")
    assert response.status_code == 403
    assert "ada is a base model" in error_of(response)["message"]


async def test_a_head_request_is_a_get_without_body(shared: httpx.AsyncClient) -> None:
    response = await shared.head("/v1/models")
    assert response.status_code == 200
    assert response.headers["x-request-id"].startswith("req_")
