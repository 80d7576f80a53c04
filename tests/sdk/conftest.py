"""One server on a tiny base, its data files, and the published clients."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import OWNER_KEY, Server, put_base, reviews, upload, wait_for
from tests.sdk.environments import client_environment, node_modules, python_with
from tunesmith.client import Client

N_TRAINING, N_VALIDATION = 40, 12


@pytest.fixture(scope="session")
def server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("sdk-home")
    put_base(home, "ada", tiny_base)
    with Server(home) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.jsonl, valid.jsonl and long.jsonl, which keeps a trainer busy until it is cancelled."""
    folder = tmp_path_factory.mktemp("data")
    for name, count, seed in (("train", N_TRAINING, 1), ("valid", N_VALIDATION, 2), ("long", 400, 3)):
        write_rows(folder / f"{name}.jsonl", reviews(count, seed))
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def environment(server: Server) -> dict[str, str]:
    return client_environment(server.base_url, OWNER_KEY)


@pytest.fixture(scope="session")
def member_key(server: Server) -> str:
    with server.client() as client:
        key: str = client.post("organization", "keys", body={"name": "a colleague", "role": "member"})["secret"]
    return key


@pytest.fixture(scope="session")
def python_028() -> Path:
    return python_with("openai==0.28.1")


@pytest.fixture(scope="session")
def python_newest() -> Path:
    return python_with("openai")


@pytest.fixture(scope="session")
def node_folder() -> Path:
    return node_modules()


@pytest.fixture(scope="session")
def tuned(server: Server) -> str:
    """A fine-tuned model for the tests that only call one."""
    return tune(server)


@pytest.fixture
def doomed(server: Server) -> str:
    """A fine-tuned model to delete."""
    return tune(server)


def tune(server: Server) -> str:
    with server.client() as client:
        job = client.post("fine-tunes", body={"training_file": upload(client, reviews(8, 5)), "model": "ada"})
        ended = wait_for(client, job["id"])
    assert ended["status"] == "succeeded", ended["events"]
    return str(ended["fine_tuned_model"])
