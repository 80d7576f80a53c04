"""A whole platform in a folder: real store, real blobs, a base that has a tokenizer and no weights."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from sqlalchemy import create_engine, make_url, text

from tests.tiny import TOKENIZER
from tunesmith.core.accounts import Accounts, Caller, Role
from tunesmith.core.bases import Bases
from tunesmith.core.blobs import Blobs
from tunesmith.core.events import Events
from tunesmith.core.files import File, Files
from tunesmith.core.jobs import FineTuneRequest, Job, Jobs
from tunesmith.core.models import Models
from tunesmith.core.store import Store

POSTGRES = os.environ.get("TUNESMITH_TEST_POSTGRES_URL")
START_UNIX = 1_645_000_000


class ManualClock:
    """Time that passes when a test says so."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class World:
    home: Path
    database_url: str
    clock: ManualClock
    store: Store
    blobs: Blobs
    accounts: Accounts
    files: Files
    bases: Bases
    models: Models
    events: Events
    jobs: Jobs
    owner: Caller
    member: Caller
    stranger: Caller
    """Owner of another organisation."""

    def upload(
        self, content: bytes | Iterable[bytes], caller: Caller | None = None, purpose: str = "fine-tune"
    ) -> File:
        chunks = [content] if isinstance(content, bytes) else content
        return self.files.create(caller or self.owner, filename="train.jsonl", purpose=purpose, chunks=chunks)

    def job(self, caller: Caller | None = None, model: str = "ada", **fields: object) -> Job:
        """A pending job on a small file of its own."""
        caller = caller or self.owner
        if "training_file" not in fields:
            fields["training_file"] = self.upload(rows(("a ->", " b"), ("c ->", " d")), caller).id
        return self.jobs.create(caller, FineTuneRequest(model=model, **fields))  # type: ignore[arg-type]

    def messages(self, job_id: str) -> list[str]:
        return [event.message for event in self.events.list(job_id)]

    def leftovers(self) -> set[str]:
        """Names of everything under `files` and `adapters`."""
        return {
            path.relative_to(self.home).as_posix()
            for folder in ("files", "adapters")
            for path in (self.home / folder).rglob("*")
        }


def rows(*pairs: tuple[str, str]) -> bytes:
    return b"".join(json.dumps({"prompt": p, "completion": c}).encode() + b"\n" for p, c in pairs)


def trained(folder: Path) -> tuple[Path, Path]:
    """What a trainer leaves: an adapter folder and a results file."""
    adapter = folder / "adapter"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text('{"r": 8}')
    (adapter / "adapter_model.safetensors").write_bytes(b"weights" * 1000)
    results = folder / "results.csv"
    results.write_text("step,training_loss\n1,0.5\n")
    return adapter, results


def put_base(home: Path, name: str = "ada") -> None:
    folder = home / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 2048}))
    safetensors.numpy.save_file({"none": np.zeros(1, np.float32)}, folder / "model.safetensors")
    shutil.copy(TOKENIZER, folder / "tokenizer.json")
    (home / "bases.toml").write_text(f'[{name}]\nfolder = "{folder}"\n')


def open_world(home: Path, database_url: str) -> World:
    clock = ManualClock(START_UNIX)
    store = Store(database_url, clock=clock)
    store.migrate()
    accounts = Accounts(store)
    owner_key = accounts.bootstrap("Your Org", None)
    assert owner_key is not None
    owner = accounts.authenticate(owner_key)
    member = accounts.authenticate(accounts.create_key(owner.organization_id, Role.MEMBER, "member")[1])
    other = accounts.create_organization("Other")
    stranger = accounts.authenticate(accounts.create_key(other, Role.OWNER, "stranger")[1])
    blobs = Blobs((home / "files").as_uri())
    files = Files(store, blobs, max_upload_bytes=10_000_000)
    put_base(home)
    bases = Bases(home)
    models = Models(store, bases, home)
    events = Events(store)
    jobs = Jobs(store, files, models, bases, events)
    return World(
        home, database_url, clock, store, blobs, accounts, files, bases, models, events, jobs, owner, member, stranger
    )


@pytest.fixture(params=["sqlite", *(["postgresql"] if POSTGRES else [])])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of its own; PostgreSQL where TUNESMITH_TEST_POSTGRES_URL names a server."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'tunesmith.db'}"
        return
    assert POSTGRES is not None
    name = f"tunesmith_{uuid.uuid4().hex}"
    url = make_url(POSTGRES)
    server = create_engine(url.set(drivername="postgresql+psycopg"), isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
        yield url.set(database=name).render_as_string(hide_password=False)
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    server.dispose()


@pytest.fixture
def world(database_url: str, tmp_path: Path) -> Iterator[World]:
    world = open_world(tmp_path / "home", database_url)
    yield world
    world.store.close()
