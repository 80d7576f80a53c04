"""From the key of a request to its `Caller`. Knows the two headers that carry keys; who has which key, `core` knows.

`OpenAI-Organization` on a request chooses nothing here: a key belongs to exactly one organisation.
"""

from __future__ import annotations

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from tunesmith.core.accounts import Accounts, Caller, Role
from tunesmith.errors import PermissionDenied


async def authenticate(request: Request, accounts: Accounts) -> Caller:
    """The caller, also kept in `request.state` for the headers of the answer. Raises AuthenticationFailed."""
    caller = await run_in_threadpool(accounts.authenticate, presented_key(request))
    request.state.caller = caller
    return caller


def presented_key(request: Request) -> str:
    """The key of `Authorization: Bearer KEY`, or of `api-key: KEY` as Azure's clients send it; "" if there is none."""
    scheme, _, secret = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and secret.strip():
        return secret.strip()
    return request.headers.get("api-key", "").strip()


def require_owner(caller: Caller, deed: str) -> None:
    """Raises PermissionDenied naming `deed` if the caller is no owner."""
    if caller.role is not Role.OWNER:
        raise PermissionDenied(f"Your key has the role {caller.role}; to {deed} takes a key with the role owner.")
