"""One server on a tiny base for the tests that leave it well."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Server, put_base
from tunesmith.client import Client


@pytest.fixture(scope="session")
def server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    put_base(home, "ada", tiny_base)
    with Server(home, {"TUNESMITH_TRAINER_NICENESS": "0"}) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client
