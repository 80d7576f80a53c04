from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, select, text, update
from sqlalchemy.exc import IntegrityError

from tests.core.conftest import World
from tunesmith.core.schema import events, files, metadata, organizations
from tunesmith.core.store import Store, random_id


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = Store(database_url)
    store.migrate()
    yield store
    store.close()


def add_organization(store: Store, name: str) -> None:
    with store.transaction() as connection:
        connection.execute(insert(organizations).values(id=name, title=name, slug=name, created_unix=0, last_turn=0))


def names(store: Store) -> list[str]:
    with store.reading() as connection:
        return list(connection.scalars(select(organizations.c.id).order_by(organizations.c.position)))


def test_migrations_from_empty_give_the_schema(store: Store) -> None:
    with store.reading() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_migrating_again_keeps_the_rows(store: Store) -> None:
    add_organization(store, "a")
    store.migrate()
    assert names(store) == ["a"]


def test_processes_that_start_at_once_migrate_once(database_url: str) -> None:
    code = "import sys; from tunesmith.core.store import Store; Store(sys.argv[1]).migrate()"
    processes = [subprocess.Popen([sys.executable, "-c", code, database_url]) for _ in range(3)]
    assert [process.wait(30) for process in processes] == [0, 0, 0]


def test_a_newer_database_is_refused_in_words(store: Store) -> None:
    with store.transaction() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RuntimeError, match="newer version of tunesmith"):
        store.migrate()


def test_other_databases_are_refused() -> None:
    for url in ("mysql://localhost/x", "sqlite://", "sqlite:///:memory:"):  # each thread would see another database
        with pytest.raises(ValueError, match=url.partition(":")[0]):
            Store(url)


def test_a_transaction_that_raises_leaves_nothing(store: Store) -> None:
    with pytest.raises(KeyError), store.transaction() as connection:
        connection.execute(insert(organizations).values(id="a", title="a", slug="a", created_unix=0, last_turn=0))
        raise KeyError
    assert names(store) == []


def test_sqlite_is_durable_and_strict(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path / 'a.db'}")
    with store.reading() as connection:
        found = {
            pragma: connection.exec_driver_sql(f"PRAGMA {pragma}").scalar()
            for pragma in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    store.close()
    assert found == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000}


def test_rows_refer_to_rows_that_exist(store: Store) -> None:
    with pytest.raises(IntegrityError), store.transaction() as connection:
        connection.execute(
            insert(events).values(job_id="ft-nobody", id=1, created_unix=0, level="info", message="hello")
        )


def test_writers_take_turns(store: Store) -> None:
    """Read, decide, write: no increment of any thread is lost."""
    add_organization(store, "a")

    def work() -> None:
        for _ in range(20):
            with store.transaction() as connection:
                last = connection.scalars(select(organizations.c.last_turn)).one()
                connection.execute(update(organizations).values(last_turn=last + 1))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with store.reading() as connection:
        assert connection.scalar(select(organizations.c.last_turn)) == 80


def test_readers_wait_for_no_writer_and_see_one_state(store: Store) -> None:
    add_organization(store, "a")
    with store.transaction() as writing:
        writing.execute(update(organizations).values(title="new"))
        with store.reading() as reading:
            assert reading.scalar(select(organizations.c.title)) == "a"
    with store.reading() as reading:
        assert reading.scalar(select(organizations.c.title)) == "new"
        add_organization(store, "b")
        assert reading.scalars(select(organizations.c.id)).all() == ["a"]


def test_a_process_killed_within_a_transaction_leaves_nothing(store: Store, database_url: str) -> None:
    code = """
import sys
from sqlalchemy import insert
from tunesmith.core.schema import organizations
from tunesmith.core.store import Store
with Store(sys.argv[1]).transaction() as connection:
    connection.execute(insert(organizations).values(id="a", title="a", slug="a", created_unix=0, last_turn=0))
    print("written", flush=True)
    sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, database_url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "written\n"
        os.kill(process.pid, signal.SIGKILL)
    add_organization(store, "b")  # its turn came, too
    assert names(store) == ["b"]


def test_random_ids_have_24_alphanumerics_and_differ() -> None:
    ids = {random_id("file-") for _ in range(100)}
    assert len(ids) == 100
    assert all(one.removeprefix("file-").isalnum() and len(one) == 29 for one in ids)


def test_the_database_file_is_readable_by_sqlite_itself(world: World) -> None:
    """What is in the store can be looked at with any SQLite tool while it is in use."""
    if not world.database_url.startswith("sqlite"):
        pytest.skip("SQLite only")
    file = world.upload(b'{"prompt":"a","completion":" b"}\n')
    plain = sqlite3.connect(world.database_url.removeprefix("sqlite:///"))
    assert plain.execute(f"SELECT id, status FROM {files.name}").fetchall() == [(file.id, "processed")]
    plain.close()
