"""Bad input as users send it: one table of cases, and what each leaves behind. A test and a benchmark share it."""

from __future__ import annotations

import json
import os
import random
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx

from tests.e2e.harness import OWNER_KEY, SERVER, Server
from tunesmith.core.accounts import Accounts, Role
from tunesmith.core.store import Store

MIB = 1 << 20
LARGE_BYTES = 100 * MIB
MAX_GROWTH_BYTES = 64 * MIB
"""What a case may add to the server's memory for a moment: up to 16 MiB of a JSON body are held until it is refused."""
WITHIN_S = 15.0
BOUNDARY = "----------------------------6a1d2b7c"
JSON = {"Content-Type": "application/json"}

Ask = Callable[["World"], httpx.Response]


@dataclass(frozen=True)
class Case:
    """One mistake and the answer it must get."""

    name: str
    ask: Ask
    status: int
    param: str | None
    told: tuple[str, ...]
    """Parts of the message: the field or place, and the way out."""
    full_disk: str | None = None
    """Folder of the home that is a disk without room meanwhile."""

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Finding:
    """How the server took a case."""

    case: Case
    response: httpx.Response
    residue: list[str]
    """What store and home hold more or less than before."""
    took_s: float
    growth_bytes: int
    """How far the server's memory rose above where it was."""

    @property
    def error(self) -> dict[str, Any]:
        """The error of the answer; empty if the answer has none of the one shape."""
        try:
            body = self.response.json()
        except ValueError:
            return {}
        error = body.get("error") if isinstance(body, dict) and body.keys() == {"error"} else None
        return error if isinstance(error, dict) and error.keys() == {"message", "type", "param", "code"} else {}

    def faults(self) -> list[str]:
        """What is wrong with the answer, in words."""
        case, error = self.case, self.error
        message = error.get("message", "")
        kind = "invalid_request_error" if case.status < 500 else "server_error"
        checks = {
            f"status {self.response.status_code}, not {case.status}": self.response.status_code == case.status,
            f"no error of the one shape: {self.response.text[:200]!r}": bool(error),
            f"param {error.get('param')!r}, not {case.param!r}": error.get("param") == case.param,
            f"type {error.get('type')!r}, not {kind!r}": error.get("type") == kind,
            f"took {self.took_s:.1f} s": self.took_s <= WITHIN_S,
            f"the server grew by {self.growth_bytes / MIB:.0f} MiB": self.growth_bytes <= MAX_GROWTH_BYTES,
            f"left behind: {self.residue}": not self.residue,
        } | {f"the message lacks {part!r}: {message!r}": part in message for part in case.told}
        return [fault for fault, holds in checks.items() if not holds]


class World:
    """A server with two organisations, and the good files that bad requests are made with. To be closed (`with`)."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.http = _http(server, OWNER_KEY)
        self.files = {
            "training": self._keep(rows(6)),
            "validation": self._keep(rows(4)),
            "one class more": self._keep(rows(4) + _row("The end ->", " neutral")),
            "too long": self._keep(rows(2) + _row("word " * 3_000 + "->", " positive")),
        }
        with self._elsewhere() as http:
            self.files["of others"] = self._keep(rows(6), http)
        self.http.post("/completions", json={"model": "ada", "prompt": "x", "max_tokens": 1}).raise_for_status()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def find(self, case: Case) -> Finding:
        """Asks. Raises MountRefused where the case needs a small disk and none may be mounted."""
        full = nullcontext() if case.full_disk is None else _small_disk(self._server.home / case.full_disk)
        with full:
            server = self._server.one(SERVER)
            before, resident_bytes = self._state(), _memory_bytes(server.pid, "VmRSS")
            _forget_peak(server.pid)
            begun = time.monotonic()
            response = case.ask(self)
            took_s = time.monotonic() - begun
            growth_bytes = _memory_bytes(server.pid, "VmHWM") - resident_bytes
            residue = sorted(before ^ self._state())
        return Finding(case, response, residue, took_s, growth_bytes)

    def _state(self) -> set[str]:
        """The number of rows in each table, and every file under the home."""
        home = self._server.home
        with closing(sqlite3.connect(f"file:{home / 'tunesmith.db'}?mode=ro", uri=True)) as database:
            tables = [name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            counts = {name: database.execute(f"SELECT count(*) FROM {name}").fetchone()[0] for name in tables}
        return {f"{name}: {count} rows" for name, count in counts.items()} | {
            str(path.relative_to(home)) for path in home.rglob("*")
        }

    def _keep(self, content: bytes, http: httpx.Client | None = None) -> str:
        form = {"data": {"purpose": "fine-tune"}, "files": {"file": ("good.jsonl", content)}}
        response = (http or self.http).post("/files", **form)  # type: ignore[arg-type]
        assert response.status_code == 200, response.text
        file_id: str = response.json()["id"]
        return file_id

    @contextmanager
    def _elsewhere(self) -> Iterator[httpx.Client]:
        """An owner of another organisation; such are made on the machine, not over HTTP."""
        with closing(Store(f"sqlite:///{self._server.home / 'tunesmith.db'}")) as store:
            accounts = Accounts(store)
            _, secret = accounts.create_key(accounts.create_organization("Elsewhere"), Role.OWNER, "e")
        with _http(self._server, secret) as http:
            yield http


class MountRefused(Exception):
    """This machine lets us mount no file system."""


def fine_tune(**fields: Any) -> Ask:
    """Creates a job; a value that names one of the world's files stands for its id."""

    def ask(world: World) -> httpx.Response:
        asked = {"training_file": "training", "model": "ada"} | fields
        body = {
            name: world.files.get(value, value) if name.endswith("_file") else value for name, value in asked.items()
        }
        return world.http.post("/fine-tunes", json=body)

    return ask


def complete(**fields: Any) -> Ask:
    """Asks for a completion."""
    return lambda world: world.http.post("/completions", json={"model": "ada", "prompt": "Hello"} | fields)


def upload(*content: bytes, times: int = 1) -> Ask:
    """Streams a training file: `content`, the last piece of it `times` times."""

    def form() -> Iterator[bytes]:
        yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'.encode()
        yield f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="train.jsonl"\r\n\r\n'.encode()
        yield from content[:-1]
        for _ in range(times):
            yield content[-1]
        yield f"\r\n--{BOUNDARY}--\r\n".encode()

    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return lambda world: world.http.post("/files", content=form(), headers=headers)


def body(path: str, content: bytes, times: int = 1) -> Ask:
    """Posts bytes that are said to be JSON."""
    return lambda world: world.http.post(path, content=(content for _ in range(times)), headers=JSON)


def _row(prompt: str, completion: str) -> bytes:
    return json.dumps({"prompt": prompt, "completion": completion}).encode() + b"\n"


def rows(count: int) -> bytes:
    """A good training file of two classes."""
    verdicts = (" positive", " negative")
    return b"".join(_row(f"Review {number} ->", verdicts[number % 2]) for number in range(count))


GARBAGE = random.Random(0).randbytes(MIB)
METRICS = {"validation_file": "validation", "compute_classification_metrics": True}
CASES = (
    Case("empty file", upload(b""), 400, "file", ("file", "empty")),
    Case("not JSONL", upload(rows(2), b"prompt,completion\n"), 400, "file", ("Line 3", "JSON")),
    Case(
        "a row without completion",
        upload(rows(2), b'{"prompt": "Why? ->"}\n'),
        400,
        "file",
        ("Line 3", "completion"),
    ),
    Case(
        "an example over 2048 tokens",
        fine_tune(training_file="too long"),
        400,
        "training_file",
        ("training_file", "row 3", "2048", "Shorten or remove"),
    ),
    Case("unknown model", fine_tune(model="adda"), 404, "model", ("adda", "GET /v1/models")),
    Case("unknown model to complete with", complete(model="adda"), 404, "model", ("adda", "GET /v1/models")),
    Case("suffix of 41 characters", fine_tune(suffix="x" * 41), 400, "suffix", ("suffix", "1 to 40", "Shorten")),
    Case(
        "training file of another organisation",
        fine_tune(training_file="of others"),
        400,
        "training_file",
        ("training_file", "Upload"),
    ),
    Case(
        "metrics without validation file",
        fine_tune(compute_classification_metrics=True, classification_n_classes=2),
        400,
        "validation_file",
        ("validation_file", "compute_classification_metrics"),
    ),
    Case(
        "number of classes without metrics",
        fine_tune(classification_n_classes=2),
        400,
        "classification_n_classes",
        ("classification_n_classes", "compute_classification_metrics"),
    ),
    Case(
        "three classes asked for, two in the data",
        fine_tune(**METRICS, classification_n_classes=3),
        400,
        "classification_n_classes",
        ("3 classes", "2 different completions", "correct classification_n_classes"),
    ),
    Case(
        "positive class that is no completion",
        fine_tune(**METRICS, classification_positive_class="positive"),
        400,
        "classification_positive_class",
        ("classification_positive_class", "Did you mean ' positive'?"),
    ),
    Case(
        "positive class of three classes",
        fine_tune(**METRICS, classification_n_classes=3, classification_positive_class=" positive"),
        400,
        "classification_positive_class",
        ("classification_positive_class", "classification_n_classes"),
    ),
    Case(
        "betas without positive class",
        fine_tune(**METRICS, classification_n_classes=2, classification_betas=[0.5]),
        400,
        "classification_betas",
        ("classification_betas", "classification_positive_class"),
    ),
    Case(
        "class that only validation shows",
        fine_tune(**METRICS | {"validation_file": "one class more"}, classification_n_classes=2),
        400,
        "validation_file",
        ("validation_file", "' neutral' in row 5", "Remove the row"),
    ),
    Case(
        "prompt + max_tokens over the context",
        complete(prompt="word " * 100, max_tokens=2_000),
        400,
        None,
        ("maximum context length is 2049 tokens", "2000", "reduce"),
    ),
    Case("best_of < n", complete(n=3, best_of=2), 400, "best_of", ("best_of", "n")),
    Case("logprobs 6", complete(logprobs=6), 400, "logprobs", ("logprobs", "6", "5")),
    Case("a job that isn't JSON", body("/fine-tunes", b"training_file=x"), 400, None, ("JSON",)),
    Case("a completion that isn't JSON", body("/completions", b"{'model': 'ada'}"), 400, None, ("JSON",)),
    Case("100 MB of garbage as a file", upload(GARBAGE, times=LARGE_BYTES // MIB), 400, "file", ("Line 1",)),
    Case(
        "100 MB in one line of a file",
        upload(b'{"prompt": "', b"a" * MIB, times=LARGE_BYTES // MIB),
        400,
        "file",
        ("Line 1",),
    ),
    Case("100 MB of garbage as a job", body("/fine-tunes", GARBAGE, LARGE_BYTES // MIB), 400, None, ("larger than",)),
    Case("disk full while a file arrives", upload(rows(10_000)), 507, None, ("no room", "free space"), "uploads"),
    Case("disk full while a file is kept", upload(rows(10_000)), 507, None, ("no room", "free space"), "files"),
)


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """A file system of 64 KiB on `folder`, empty; what lies below is there again afterwards."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    try:
        done = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        raise MountRefused
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _http(server: Server, key: str) -> httpx.Client:
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=server.base_url, headers=headers, timeout=60.0, trust_env=False)


def _memory_bytes(pid: int, field: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the most since `_forget_peak`) of a process; proc(5)."""
    status = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


def _forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")
