"""How the route table is written: one line for each path, its verbs beside it, each handed its caller."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from urllib.parse import unquote

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from tunesmith.api.auth import authenticate
from tunesmith.core.accounts import Accounts, Caller
from tunesmith.errors import InvalidRequest, NotFound

Verb = Callable[[Request, Caller], Awaitable[Response]]


class Keyed:
    """Writes routes that need a key. An unknown URL or method is told to anybody, before any key is looked at."""

    def __init__(self, accounts: Accounts) -> None:
        self.accounts = accounts

    def at(self, path: str, **verbs: Verb) -> Route:
        """The route of one path: `at("/v1/models", GET=models.list)`. A HEAD is answered as GET, without its body."""

        async def endpoint(request: Request) -> Response:
            if "%00" in request.url.query:  # not every database takes it in a text
                raise InvalidRequest("The query of the URL holds %00, the NUL character. Remove it.")
            verb = verbs["GET" if request.method == "HEAD" else request.method]
            return await verb(request, await authenticate(request, self.accounts))

        return Route(path, endpoint, methods=list(verbs), name=path)


def path_id(request: Request) -> str:
    """The `{id}` of a route's path, decoded. Raises NotFound for one with NUL, which not every database takes."""
    name = unquote(request.path_params["id"])
    if "\0" in name:
        raise NotFound(f"No such object: {name}. No id holds the NUL character.", param="id")
    return name
