"""The database: one engine, one kind of transaction, time and ids. Knows SQLite and PostgreSQL, no table and no noun.

Writers take turns on both databases: SQLite has one writer at a time, and on PostgreSQL a lock taken at the start of
each writing transaction gives the same. So a transaction may read, decide and write without another slipping in
between, and the nouns state their rules once. Writing transactions are therefore kept short: no file is read, no text
encoded and nothing waited for inside one.
"""

from __future__ import annotations

import random
import sqlite3
import string
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import ConnectionPoolEntry

from tunesmith.errors import StorageFull

Clock = Callable[[], float]
"""Seconds since 1970, UTC."""
NewId = Callable[[str], str]
"""From a prefix such as `file-` to an id never given before."""

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_MS = 30_000
"""How long a writer waits for its turn before it fails."""
KEPT_CONNECTIONS = 16
"""Of SQLite: requests that come at once each take one, and to open another takes longer than what they ask."""
WRITER_LOCK = 0x74756E65
"""Key of the PostgreSQL advisory lock that writers hold: "tune"."""
POSTGRES_DISK_FULL = "53100"

_ALPHANUMERICS = string.ascii_letters + string.digits
_CHANCE = random.SystemRandom()


def random_id(prefix: str) -> str:
    """The prefix and 24 random alphanumerics."""
    return prefix + "".join(_CHANCE.choices(_ALPHANUMERICS, k=24))


class Store:
    """The one way to the database. Safe to share between threads."""

    def __init__(self, url: str, *, clock: Clock = time.time, new_id: NewId = random_id) -> None:
        """`url` is SQLAlchemy's: `sqlite:////folder/tunesmith.db` (made if absent) or `postgresql://...`.

        Connects on first use. Raises ValueError for another kind of database.
        """
        self.clock = clock
        self.new_id = new_id
        self._engine = _engine(make_url(url))
        self._writing = self._engine.execution_options(writing=True)

    def migrate(self) -> None:
        """Bring the tables to this version. Safe when several processes start at once.

        Raises RuntimeError if the database was written by a newer version, which this one would misread.
        """
        with self.reading() as connection:
            if _is_current(connection):
                return
        # Alembic takes a quarter of a second of each start, and is needed by the first one of a version.
        import alembic.command
        import alembic.config
        import alembic.util

        config = alembic.config.Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        with self.transaction() as connection:
            config.attributes["connection"] = connection
            try:
                alembic.command.upgrade(config, "head")
            except alembic.util.CommandError as error:
                raise RuntimeError(
                    f"The database {self._engine.url!r} was written by a newer version of tunesmith. "
                    "Install that version, or point TUNESMITH_DATABASE_URL at another database."
                ) from error

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Read and write; committed when the block ends, rolled back when it raises.

        Raises StorageFull if the disk has no room: then nothing was written.
        """
        try:
            with self._writing.begin() as connection:
                yield connection
        except OperationalError as error:
            if _is_disk_full(error):
                raise StorageFull("The disk of the server is full; nothing was kept. Free some space first.") from error
            raise

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """One consistent view, read only; waits for no writer."""
        with self._engine.begin() as connection:
            yield connection

    def close(self) -> None:
        """Give all connections back."""
        self._engine.dispose()


def _is_current(connection: Connection) -> bool:
    """Whether the tables are those of the newest revision."""
    if not inspect(connection).has_table("alembic_version"):
        return False
    newest = max(path.stem for path in (MIGRATIONS / "versions").glob("*.py")).partition("_")[0]
    return list(connection.scalars(text("SELECT version_num FROM alembic_version"))) == [newest]


def _engine(url: URL) -> Engine:
    match url.get_backend_name():
        case "sqlite" if url.database not in (None, "", ":memory:"):
            engine = create_engine(url, pool_size=KEPT_CONNECTIONS, pool_use_lifo=True)
            event.listen(engine, "connect", _prepare_sqlite)
            event.listen(engine, "begin", _begin_sqlite)
        case "postgresql":
            # Plain postgresql:// means another driver in older releases of SQLAlchemy.
            engine = create_engine(url.set(drivername="postgresql+psycopg"), pool_pre_ping=True)
            event.listen(engine, "begin", _begin_postgresql)
        case other:
            raise ValueError(f"The database URL names {other!r}; give sqlite:/// with a file, or a postgresql:// URL.")
    return engine


def _prepare_sqlite(connection: sqlite3.Connection, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions begin where _begin_sqlite says, not where the driver guesses
    for pragma in (
        f"busy_timeout = {BUSY_TIMEOUT_MS}",
        "journal_mode = WAL",
        "synchronous = FULL",  # a commit survives a power cut
        "foreign_keys = ON",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    # IMMEDIATE takes the writer's turn at once: a transaction that read first could not take it later (SQLITE_BUSY).
    writing = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _begin_postgresql(connection: Connection) -> None:
    if connection.get_execution_options().get("writing", False):
        connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")
    else:
        connection.exec_driver_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")


def _is_disk_full(error: OperationalError) -> bool:
    if isinstance(error.orig, sqlite3.OperationalError):
        return error.orig.sqlite_errorcode == sqlite3.SQLITE_FULL
    return getattr(error.orig, "sqlstate", None) == POSTGRES_DISK_FULL
