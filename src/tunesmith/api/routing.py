"""How the route table is written: one line for each path, its verbs beside it, each handed its caller."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tunesmith.api.auth import authenticate
from tunesmith.core.accounts import Accounts, Caller
from tunesmith.errors import InvalidRequest

ENCODED_NUL = "%00"
"""Not every database takes it in a text."""

Verb = Callable[[Request, Caller], Awaitable[Response]]


class Keyed:
    """Writes routes that need a key. An unknown URL or method is told to anybody, before any key is looked at."""

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts

    def at(self, path: str, **verbs: Verb) -> Route:
        """The route of one path: `at("/v1/models", GET=models.list)`. A HEAD is answered as GET, without its body."""

        async def endpoint(request: Request) -> Response:
            if ENCODED_NUL in request.url.path or ENCODED_NUL in request.url.query:
                raise InvalidRequest(f"The URL holds {ENCODED_NUL}, the NUL character, which is in no id. Remove it.")
            verb = verbs["GET" if request.method == "HEAD" else request.method]
            return await verb(request, await authenticate(request, self.accounts))

        return Route(path, endpoint, methods=list(verbs), name=path)


def path_id(request: Request) -> str:
    """The `{id}` of a route's path, decoded."""
    return unquote(request.path_params["id"])
