from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runs.platform import Clock, Platform
from tunesmith.core.accounts import Accounts
from tunesmith.core.bases import Bases
from tunesmith.core.blobs import Blobs
from tunesmith.core.events import Events
from tunesmith.core.files import Files
from tunesmith.core.jobs import Jobs
from tunesmith.core.models import Models
from tunesmith.core.store import Store


@pytest.fixture
def platform(tmp_path: Path, tiny_base: Path) -> Iterator[Platform]:
    home = tmp_path / "home"
    home.mkdir()
    (home / "bases.toml").write_text(f"[ada]\nfolder = {json.dumps(str(tiny_base))}\n")
    clock = Clock()
    store = Store(f"sqlite:///{home / 'tunesmith.db'}", clock=clock)
    store.migrate()
    accounts = Accounts(store)
    secret = accounts.bootstrap("personal", None)
    assert secret is not None
    bases, events = Bases(home), Events(store)
    files = Files(store, Blobs((home / "files").as_uri()), 1_000_000)
    models = Models(store, bases, home)
    jobs = Jobs(store, files, models, bases, events)
    yield Platform(home, clock, store, accounts.authenticate(secret), files, models, bases, jobs, events)
    store.close()
