"""`/v1/organization`: whose key this is, and the keys of the organisation. Our own; the published API has no such."""

from __future__ import annotations

from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tunesmith.api.auth import require_owner
from tunesmith.api.body import read_json
from tunesmith.api.pages import envelope
from tunesmith.api.routing import path_id
from tunesmith.core.accounts import Accounts, ApiKey, Caller, Role
from tunesmith.errors import InvalidRequest

MAX_NAME_CHARACTERS = 100


class OrganizationApi:
    """The verbs of the caller's own organisation."""

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts

    async def get(self, _request: Request, caller: Caller) -> Response:
        """GET /v1/organization: the organisation, key and role of the caller."""
        return JSONResponse(
            {
                "id": caller.organization_id,
                "object": "organization",
                "title": caller.organization_title,
                "name": caller.organization_slug,
                "role": caller.role,
                "key_id": caller.key_id,
            }
        )

    async def list_keys(self, _request: Request, caller: Caller) -> Response:
        """GET /v1/organization/keys, for owners: oldest first, without secrets."""
        require_owner(caller, "see the keys of the organisation")
        keys = await run_in_threadpool(self.accounts.keys, caller)
        return JSONResponse(envelope([key_to_wire(key) for key in keys]))

    async def create_key(self, request: Request, caller: Caller) -> Response:
        """POST /v1/organization/keys `{"name", "role": "member"}`, for owners. The secret is in this answer only."""
        require_owner(caller, "make keys")
        fields = await read_json(request)
        name = fields.required_text("name")
        role = fields.text("role") or Role.MEMBER
        fields.done()
        if len(name) > MAX_NAME_CHARACTERS:
            raise InvalidRequest(f"'name' has at most {MAX_NAME_CHARACTERS} characters, not {len(name)}.", param="name")
        if role not in list(Role):
            raise InvalidRequest(f"'role' must be one of {', '.join(Role)}; it is {role!r}.", param="role")
        key, secret = await run_in_threadpool(self.accounts.create_key, caller.organization_id, Role(role), name)
        return JSONResponse({**key_to_wire(key), "secret": secret})

    async def delete_key(self, request: Request, caller: Caller) -> Response:
        """DELETE /v1/organization/keys/{id}, for owners: the key opens nothing from now on."""
        require_owner(caller, "revoke keys")
        key_id = path_id(request)
        await run_in_threadpool(self.accounts.revoke, caller, key_id)
        return JSONResponse({"id": key_id, "object": "api_key", "deleted": True})


def key_to_wire(key: ApiKey) -> dict[str, Any]:
    """The key object: everything but the secret, which is not kept."""
    return {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "role": key.role,
        "hint": key.hint,
        "created_at": key.created_unix,
        "revoked_at": key.revoked_unix,
    }
