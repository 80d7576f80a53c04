"""The caller's organisation and its keys, and the health of the server."""

from __future__ import annotations

from urllib.parse import unquote

import httpx
import pytest

from tests.wire.harness import client_of, error_of, masked
from tunesmith.core.accounts import Role
from tunesmith.server import Parts

pytestmark = pytest.mark.anyio


async def test_who_am_i(client: httpx.AsyncClient, member: httpx.AsyncClient) -> None:
    expected = {
        "id": "org-*",
        "object": "organization",
        "title": "personal",
        "name": "personal",
        "role": "owner",
        "key_id": "key-*",
    }
    assert masked((await client.get("/v1/organization")).json()) == expected
    assert masked((await member.get("/v1/organization")).json()) == {**expected, "role": "member"}


async def test_a_title_of_any_script_stands_in_a_header(parts: Parts) -> None:
    accounts = parts.services.accounts
    _, secret = accounts.create_key(accounts.create_organization("組織 Ünal"), Role.OWNER, "s")
    async with client_of(parts, secret) as client:
        answer = await client.get("/v1/organization")
    assert (answer.status_code, answer.json()["name"]) == (200, "組織-ünal")
    assert unquote(answer.headers["openai-organization"]) == "組織-ünal"


async def test_a_key_from_making_to_revoking(client: httpx.AsyncClient, parts: Parts) -> None:
    made = (await client.post("/v1/organization/keys", json={"name": "laptop"})).json()
    secret = made.pop("secret")
    assert masked(made) == {
        "id": "key-*",
        "object": "api_key",
        "name": "laptop",
        "role": "member",
        "hint": f"{secret[:5]}***{secret[-4:]}",
        "created_at": "<unix>",
        "revoked_at": None,
    }
    listed = await client.get("/v1/organization/keys")
    assert listed.json()["data"][-1] == made
    assert secret not in listed.text
    async with client_of(parts, secret) as member:
        assert (await member.get("/v1/models")).status_code == 200
        deleted = await client.delete(f"/v1/organization/keys/{made['id']}")
        assert deleted.json() == {"id": made["id"], "object": "api_key", "deleted": True}
        assert (await member.get("/v1/models")).status_code == 401


async def test_an_owner_makes_owners(client: httpx.AsyncClient) -> None:
    made = (await client.post("/v1/organization/keys", json={"name": "boss", "role": "owner"})).json()
    assert made["role"] == "owner"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "name"),
        ({"name": "x" * 101}, "name"),
        ({"name": "x\0"}, "name"),
        ({"name": "x", "role": "king"}, "role"),
        ({"name": "x", "y": 1}, "y"),
    ],
)
async def test_keys_that_are_refused(client: httpx.AsyncClient, body: dict[str, object], param: str) -> None:
    response = await client.post("/v1/organization/keys", json=body)
    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert len((await client.get("/v1/organization/keys")).json()["data"]) == 1


async def test_keys_are_for_owners(member: httpx.AsyncClient, client: httpx.AsyncClient) -> None:
    key_id = (await client.get("/v1/organization")).json()["key_id"]
    for response in [
        await member.get("/v1/organization/keys"),
        await member.post("/v1/organization/keys", json={"name": "x", "role": "owner"}),
        await member.delete(f"/v1/organization/keys/{key_id}"),
    ]:
        assert response.status_code == 403
        assert "owner" in error_of(response)["message"]
    assert (await client.get("/v1/models")).status_code == 200


async def test_keys_of_others_are_unknown(client: httpx.AsyncClient, stranger: httpx.AsyncClient) -> None:
    key_id = (await client.get("/v1/organization")).json()["key_id"]
    assert (await stranger.delete(f"/v1/organization/keys/{key_id}")).status_code == 404
    assert len((await stranger.get("/v1/organization/keys")).json()["data"]) == 1


async def test_health(parts: Parts) -> None:
    async with client_of(parts, key=None) as anybody:
        assert (await anybody.get("/healthz")).json() == {"status": "ok"}
        before = await anybody.get("/readyz")
        assert before.status_code == 503
        assert before.json()["parts"] == {"database": "ok", "dispatcher": "failing", "engine": "ok"}
        parts.dispatcher.tick()
        after = await anybody.get("/readyz")
        assert after.status_code == 200
        assert after.json() == {
            "status": "ok",
            "parts": {"database": "ok", "dispatcher": "ok", "engine": "ok"},
        }
        await parts.engine.close()
        assert (await anybody.get("/healthz")).status_code == 200
