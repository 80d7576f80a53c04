"""The composition root: settings -> store, engine, executor, dispatcher, app; one process, from its start to its end.

Event loop: HTTP and the engine's client. Dispatcher thread: the loop over jobs, and the trainers it starts, which end
with that thread. Trackers thread: the same for the processes that tell trackers of jobs. Everything that blocks goes
through worker threads.
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import logging
import os
import secrets
import signal
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool

from tunesmith.api.app import Services, create_app
from tunesmith.core.accounts import Accounts
from tunesmith.core.bases import Bases
from tunesmith.core.blobs import Blobs
from tunesmith.core.events import Events
from tunesmith.core.files import Files
from tunesmith.core.jobs import Jobs
from tunesmith.core.models import Models
from tunesmith.core.store import Store
from tunesmith.core.trackings import Trackings
from tunesmith.engine.base import Engine
from tunesmith.engine.process import EngineProcess
from tunesmith.errors import EngineUnavailable, TunesmithError
from tunesmith.rundir import RunDir, RunSpec
from tunesmith.runs import parity
from tunesmith.runs.dispatcher import Dispatcher, Parity
from tunesmith.runs.local import LocalExecutor
from tunesmith.runs.tracking import Trackers
from tunesmith.serving.completer import Completer
from tunesmith.serving.weights import Weights
from tunesmith.settings import Settings
from tunesmith.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

Announce = Callable[[str, str | None], None]
"""Hears the base URL (ending in `/v1`) once requests are answered, and the owner's key if it is new."""

STREAMS_END_S = 10
"""How long answers under way may take to end when the server stops."""
BACKLOG = 2048
KEEP_ALIVE_S = 75
"""Longer than the published clients keep an idle connection, so that none is closed as they take it up again."""
DISPATCHER_SILENT_S = 60.0
"""A dispatcher that has not ticked for so long is not ready; one tick may wait `WARM_WITHIN_S` for the engine."""
PARITY_WITHIN_S = 300.0
"""An engine that has not scored the parity rows by then is stuck; it is asked again later."""
WARM_WITHIN_S = 10.0
"""So long a model's announcement waits for the model to be loaded, where every place is taken."""
SEED_BITS = 63
OPEN_NETWORK_KEY_CHARACTERS = 20
"""Fewer could be guessed by whoever can send requests; nothing slows guesses down."""


class CannotStart(TunesmithError):
    """The server was asked for something it refuses or is unable to do; the message says how to go on."""


def run(settings: Settings, *, announce: Announce, engine_process: EngineProcess | None = None) -> None:
    """Serves until SIGTERM or SIGINT, then drains and returns. To be called from the main thread.

    `engine_process` is the engine's, if it was begun already.

    Raises CannotStart, or another error of the tree, if it cannot begin.
    """
    _refuse_open_network(settings)
    os.umask(0o077)  # what this process and its children write is the user's alone, also in a home that was there
    _make_home(settings.home)
    with _only_server_of(settings.home), listen(settings.host, settings.port) as listener:
        asyncio.run(_serve(settings, listener, announce, engine_process))


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that one server is made of."""

    store: Store
    engine: Engine
    dispatcher: Dispatcher
    trackers: Trackers
    services: Services
    app: Starlette
    new_owner_key: str | None
    """Only at the start that made it."""


def build(
    settings: Settings,
    *,
    is_stopping: Callable[[], bool],
    loop: asyncio.AbstractEventLoop,
    engine_process: EngineProcess | None = None,
) -> Parts:
    """All parts, connected, none of them running yet, and the home folder. The engine is spoken to on `loop`."""
    home = settings.home
    _make_home(home)
    store = _open_store(settings.database)
    try:
        bases = Bases(home)
    except ValueError as error:
        raise CannotStart(str(error)) from error
    accounts = Accounts(store)
    new_owner_key = accounts.bootstrap(
        settings.organization, settings.owner_key, keep=lambda secret: _write_secret(home / "owner.key", secret)
    )

    files = Files(store, _open_blobs(settings.blobs), settings.max_upload_bytes)
    models = Models(store, bases, home)
    events = Events(store)
    jobs = Jobs(store, files, models, bases, events, settings.max_concurrent_runs)
    logger.info("swept files=%d adapters=%d", files.sweep(), models.sweep())
    engine = _make_engine(settings, bases, engine_process)
    completer = Completer(
        engine,
        max_resident_adapters=settings.max_resident_adapters,
        max_resident_full_models=settings.max_resident_full_models,
        max_sequences=settings.max_sequences,
        new_seed=lambda: secrets.randbits(SEED_BITS),
    )
    dispatcher = Dispatcher(
        jobs=jobs,
        files=files,
        bases=bases,
        models=models,
        executor=LocalExecutor(threads=settings.trainer_threads, niceness=settings.trainer_niceness),
        parity=_parity(settings, engine, loop),
        home=home,
        holder=f"{socket.gethostname()}:{home}",
        max_concurrent_runs=settings.max_concurrent_runs,
        jobs_per_run=settings.jobs_per_run,
        trainer_threads=settings.trainer_threads,
        trainer_device=settings.trainer_device,
        checkpoint_interval_s=settings.checkpoint_interval_s,
        lease_s=settings.lease_s,
        warm=_warm(completer, loop),
        ask=ThreadPoolExecutor(1, "gate").submit,
    )
    trackers = Trackers(jobs, events, Trackings(store, events), home / "tracking")
    spool = home / "uploads"
    spool.mkdir(exist_ok=True)
    services = Services(
        accounts=accounts,
        files=files,
        models=models,
        jobs=jobs,
        events=events,
        completer=completer,
        weights=Weights(models, engine, spool=spool, limit_bytes=settings.max_upload_bytes),
        clock=store.clock,
        new_id=store.new_id,
        spool=spool,
        max_upload_bytes=settings.max_upload_bytes,
        heartbeat_s=settings.heartbeat_s,
        checks={
            "database": lambda: run_in_threadpool(_database_fault, store),
            "dispatcher": lambda: run_in_threadpool(_dispatcher_fault, dispatcher),
            "engine": lambda: _engine_fault(engine, bases),
        },
        is_stopping=is_stopping,
    )
    return Parts(store, engine, dispatcher, trackers, services, create_app(services), new_owner_key)


async def _serve(
    settings: Settings, listener: socket.socket, announce: Announce, engine_process: EngineProcess | None
) -> None:
    """From the start to the end of everything that lives on the event loop."""
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    parts = build(settings, is_stopping=stopping.is_set, loop=loop, engine_process=engine_process)
    base_url = _base_url(settings.host, listener.getsockname()[1])
    http = _Http(http_config(parts.app), on_started=lambda: announce(base_url, parts.new_owner_key))
    try:
        # Loaded ahead, so that the first user does not wait for it; if it fails, requests will try again and say why.
        warming = asyncio.ensure_future(parts.services.checks["engine"]())
        async with (
            _working(parts.dispatcher.run, "dispatcher") as stop_dispatching,
            _working(parts.trackers.run, "trackers") as stop_tracking,
        ):
            answering = asyncio.create_task(http.serve(sockets=[listener]))
            asked = asyncio.create_task(stopping.wait())
            await asyncio.wait({answering, asked}, return_when=asyncio.FIRST_COMPLETED)
            # Trainers checkpoint and stop while answers under way are finished.
            logger.info("stopping")
            stopping.set()
            stop_dispatching()
            stop_tracking()
            http.should_exit = True
            await answering
        warming.cancel()
    finally:
        await parts.engine.close()
        parts.store.close()


@asynccontextmanager
async def _working(run: Callable[[threading.Event], None], name: str) -> AsyncGenerator[Callable[[], None], None]:
    """A loop at work in a thread of its own; gives what asks it to stop. Ends when it has drained."""
    stop = threading.Event()
    thread = threading.Thread(target=run, args=(stop,), name=name)
    thread.start()
    try:
        yield stop.set
    finally:
        stop.set()
        # The event loop goes on turning meanwhile: the dispatcher may be waiting for the engine, which answers there.
        await asyncio.to_thread(thread.join)


class _Http(uvicorn.Server):
    """uvicorn without its signal handlers, since more than HTTP has to stop, and telling when it has started."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()


def http_config(app: Starlette) -> uvicorn.Config:
    """How the app is served; where, the listening socket says."""
    return uvicorn.Config(
        app,
        http="h11",
        ws="none",
        loop="asyncio",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=STREAMS_END_S,
    )


def _make_engine(settings: Settings, bases: Bases, begun: EngineProcess | None) -> Engine:
    match settings.engine:
        case "embedded":
            from tunesmith.engine.remote import RemoteEngine

            return RemoteEngine(
                threads=settings.engine_threads,
                precision=settings.engine_precision,
                device=settings.engine_device,
                begun=begun,
            )
        case "scripted":
            from tunesmith.engine.scripted import ScriptedEngine

            tokenizer = Tokenizer.from_folder(_first_base(bases))
            return ScriptedEngine(tokenizer.vocabulary_size, end_of_text_id=tokenizer.end_of_text_id)
        case other:
            raise CannotStart(f"There is no engine {other!r}. Set TUNESMITH_ENGINE to embedded or scripted.")


def _parity(settings: Settings, engine: Engine, loop: asyncio.AbstractEventLoop) -> Parity:
    """The gate, in a thread of its own, which asks the engine on the event loop."""
    if settings.engine == "scripted":
        return lambda run_dir, spec: None  # it reads no weights, so its numbers say nothing about an adapter

    bounds = parity.BOUNDS if settings.engine_device == "cpu" else parity.ON_DEVICE
    bound = bounds[settings.engine_precision]

    def check(run_dir: RunDir, spec: RunSpec) -> str | None:
        asked = asyncio.run_coroutine_threadsafe(parity.check_run(engine, run_dir, spec, bound), loop)
        try:
            return asked.result(PARITY_WITHIN_S)
        except TimeoutError:
            asked.cancel()
            raise

    return check


def _warm(completer: Completer, loop: asyncio.AbstractEventLoop) -> Callable[[Path, Path], None]:
    """Loads what the dispatcher thread is about to announce; on the event loop, as all that is loaded."""

    def warm(base_dir: Path, adapter_dir: Path) -> None:
        asked = asyncio.run_coroutine_threadsafe(completer.warm(base_dir, adapter_dir), loop)
        try:
            asked.result(WARM_WITHIN_S)
        except (TimeoutError, ValueError, TunesmithError) as error:
            asked.cancel()  # its first call will load it, or say why not
            logger.warning("model not loaded before it was announced folder=%s reason=%r", adapter_dir.name, error)

    return warm


def _open_store(url: str) -> Store:
    try:
        store = Store(url)
        store.migrate()
    except (RuntimeError, ValueError) as error:
        raise CannotStart(str(error)) from error
    except SQLAlchemyError as error:
        raise CannotStart(f"The database cannot be used: {error}. Correct TUNESMITH_DATABASE_URL.") from error
    return store


def _open_blobs(url: str) -> Blobs:
    try:
        return Blobs(url)
    except (ValueError, OSError) as error:
        raise CannotStart(f"The store of files cannot be used: {error}. Correct TUNESMITH_BLOBS_URL.") from error


def _database_fault(store: Store) -> str | None:
    try:
        with store.reading() as connection:
            connection.execute(select(1))
    except SQLAlchemyError as error:
        return str(error)
    return None


def _dispatcher_fault(dispatcher: Dispatcher) -> str | None:
    if dispatcher.silent_s > DISPATCHER_SILENT_S:
        return f"no round over the jobs for {dispatcher.silent_s:.0f} s"
    return None


async def _engine_fault(engine: Engine, bases: Bases) -> str | None:
    """Whether it has the first base, which it loads if not: an engine is up when it can answer."""
    try:
        await engine.load(await run_in_threadpool(_first_base, bases), None)
    except (EngineUnavailable, CannotStart, ValueError) as error:
        return str(error)
    return None


def _first_base(bases: Bases) -> Path:
    usable = [base for base in bases.list() if base.refusal is None]
    if not usable:
        raise CannotStart(
            "None of the bases in bases.toml can be used. Pull what is not here with: tunesmith models pull; for the "
            "others, tunesmith models check tells why."
        )
    return bases.folder(usable[0].name)


def _refuse_open_network(settings: Settings) -> None:
    if _is_loopback(settings.host):
        return
    if settings.owner_key is None or len(settings.owner_key) < OPEN_NETWORK_KEY_CHARACTERS:
        raise CannotStart(
            f"Listening on {settings.host} lets others reach this server, which takes a key you chose: set "
            f"TUNESMITH_OWNER_KEY to a random secret of {OPEN_NETWORK_KEY_CHARACTERS} characters or more, or listen on "
            "127.0.0.1.",
            param="owner_key",
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _make_home(home: Path) -> None:
    try:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise CannotStart(f"The home folder {home} cannot be made: {error}. Set TUNESMITH_HOME to another.") from error


@contextmanager
def _only_server_of(home: Path) -> Iterator[None]:
    """Holds `<home>/lock`: two servers on one home would drive the same jobs."""
    with (home / "lock").open("a+") as lock:
        lock.seek(0)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CannotStart(
                f"Another server already uses {home} (process {lock.read().strip()}). Stop that one, or give this "
                "one a home of its own with TUNESMITH_HOME."
            ) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, so that its port is known before the server runs. Raises CannotStart."""
    # The protocol is named: asyncio switches Nagle's algorithm off only where it sees TCP, and socket.create_server
    # leaves that out. With it on, each answer on a kept connection waits 40 ms for the client's acknowledgement.
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
            listener.listen(BACKLOG)
        except OSError:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise CannotStart(
            f"Cannot listen on {host} port {port}: {error}. Choose another with TUNESMITH_PORT (0 takes a free one)."
        ) from error


def _base_url(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):  # noqa: S104 - any address is this machine's, so name one that works from here
        host = "127.0.0.1"
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"


def _write_secret(path: Path, secret: str) -> None:
    try:
        path.touch(mode=0o600)
        path.chmod(0o600)  # it may have been there with another mode
        path.write_text(secret + "\n")
    except OSError as error:
        raise CannotStart(
            f"The owner's key cannot be written: {error}. Make room for {path}, then start again."
        ) from error
