"""Fixtures of the wire tests: one server for each test, or one for a module where tests leave no traces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest

from tests.wire.harness import Live, client_of, live, parts_of, settings_for
from tunesmith.core.accounts import Role
from tunesmith.server import Parts


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """One event loop for the session, so that fixtures can live as long."""
    return "asyncio"


@pytest.fixture(scope="session")
async def shared_parts(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> AsyncIterator[Parts]:
    """A built server for tests that leave nothing behind."""
    home = tmp_path_factory.mktemp("shared") / "home"
    async with parts_of(settings_for(home, tiny_base, max_upload_bytes=1_000_000)) as built:
        yield built


@pytest.fixture(scope="session")
async def shared(shared_parts: Parts) -> AsyncIterator[httpx.AsyncClient]:
    """The owner's client of that server."""
    async with client_of(shared_parts) as opened:
        yield opened


@pytest.fixture
async def parts(tmp_path: Path, tiny_base: Path) -> AsyncIterator[Parts]:
    """A built server with an empty store."""
    async with parts_of(settings_for(tmp_path / "home", tiny_base, max_upload_bytes=1_000_000)) as built:
        yield built


@pytest.fixture
async def client(parts: Parts) -> AsyncIterator[httpx.AsyncClient]:
    """The owner's client."""
    async with client_of(parts) as opened:
        yield opened


@pytest.fixture
async def member(parts: Parts) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the same organisation with role member."""
    async with client_of(parts) as owner:
        secret = (await owner.post("/v1/organization/keys", json={"name": "m"})).json()["secret"]
    async with client_of(parts, secret) as opened:
        yield opened


@pytest.fixture
async def stranger(parts: Parts) -> AsyncIterator[httpx.AsyncClient]:
    """An owner of another organisation on the same server."""
    accounts = parts.services.accounts
    _, secret = accounts.create_key(accounts.create_organization("Elsewhere"), Role.OWNER, "s")
    async with client_of(parts, secret) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_base: Path) -> Iterator[Live]:
    """A server on a socket, with quick heartbeats."""
    home = tmp_path_factory.mktemp("live") / "home"
    with live(settings_for(home, tiny_base, heartbeat_s=0.2, max_upload_bytes=2_000_000)) as started:
        yield started
