"""A real server in processes of its own, on a home folder of its own: started, watched, killed and started again.

Benchmarks use it too.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tests.waiting import until
from tunesmith.client import Client

OWNER_KEY = "sk-" + "e2e" * 8
SERVER, TRAINER, ENGINE = "tunesmith serve", "tunesmith.training", "tunesmith.engine"
READY_WITHIN_S = 120.0
CANCELLED_WITHIN_S = 5.0
"""From the answer to the end of the trainer: under 2 s where nothing else runs, and tests run beside each other."""


@dataclass(frozen=True)
class Process:
    """One process of a server, found by its environment: also one that has lost its parent."""

    pid: int
    command: str

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)


@dataclass
class Server:
    """`tunesmith serve` on `home`. Leaving the context kills everything that belongs to this home."""

    home: Path
    settings: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    base_url: str = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.kill_tree()

    @property
    def log(self) -> Path:
        return self.home / "server.log"

    def start(self) -> None:
        """Starts it and waits until it is ready to answer."""
        self.home.mkdir(parents=True, exist_ok=True)
        begun_at = self.log.stat().st_size if self.log.exists() else 0
        environment = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
        environment |= {
            "TUNESMITH_HOME": str(self.home),
            "TUNESMITH_PORT": "0",
            "TUNESMITH_OWNER_KEY": OWNER_KEY,
            "TUNESMITH_TRAINER_THREADS": "1",
            "TUNESMITH_ENGINE_THREADS": "1",
            **self.settings,
        }
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tunesmith", "serve"],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        until(lambda: self._answers(begun_at), within_s=READY_WITHIN_S, every_s=0.05)

    def _answers(self, begun_at: int) -> bool:
        assert self.process is not None
        text = self.log.read_bytes()[begun_at:].decode(errors="replace")
        if self.process.poll() is not None:
            raise AssertionError(f"serve exited with {self.process.returncode}:\n{text}")
        found = re.search(r"http://127\.0\.0\.1:(\d+)", text)
        if found is None or found[1] == "0":
            return False
        self.base_url = found[0] + "/v1"
        try:
            return httpx.get(found[0] + "/readyz", trust_env=False, timeout=5.0).status_code == 200
        except httpx.TransportError:
            return False

    @contextmanager
    def client(self, key: str = OWNER_KEY) -> Iterator[Client]:
        with Client(self.base_url, key) as client:
            yield client

    def processes(self, part: str = "") -> list[Process]:
        """Living processes of this home whose command line holds `part`, whoever their parent is."""
        mark = f"TUNESMITH_HOME={self.home}".encode()
        found = []
        for folder in Path("/proc").iterdir():
            if not folder.name.isdigit():
                continue
            try:
                environment = (folder / "environ").read_bytes()
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue
            alive = _status(int(folder.name)) not in {None, "Z"}
            if mark in environment.split(b"\0") and part in command and alive:
                found.append(Process(int(folder.name), command))
        return found

    def one(self, part: str) -> Process:
        """The one process of its kind, as soon as it is there."""
        return until(lambda: self.processes(part))[0]

    def kill_server(self) -> None:
        """kill -9 of the parent alone: its children must end by themselves."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def kill_tree(self) -> None:
        """kill -9 of everything that belongs to this home."""
        while found := self.processes():
            for process in found:
                process.kill()
            time.sleep(0.01)
        if self.process is not None:
            self.process.wait()

    def terminate(self, within_s: float = 60.0) -> int:
        """SIGTERM, as a service manager sends it; the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(within_s)

    def gone(self, within_s: float = 5.0) -> bool:
        """Whether no process of this home is left after at most `within_s`."""
        try:
            return until(lambda: not self.processes(), within_s=within_s)
        except TimeoutError:
            return False

    def run_dirs(self) -> list[Path]:
        return sorted((self.home / "runs").glob("*"), key=lambda path: path.stat().st_mtime)


def put_base(home: Path, name: str, folder: Path) -> None:
    """Makes a checkpoint folder the base `name` of a home, before its server starts."""
    home.mkdir(parents=True, exist_ok=True)
    with (home / "bases.toml").open("a") as catalogue:
        catalogue.write(f"[{name}]\nfolder = {json.dumps(str(folder))}\n\n")


def reviews(count: int, seed: int) -> list[dict[str, str]]:
    """Short film reviews with their verdict, as the classification guide would have them prepared."""
    chance = random.Random(seed)
    subjects = ["The plot", "This film", "The acting", "Her new book", "The ending", "The music", "Every scene"]
    words = {
        " positive": ["delightful", "moving", "a triumph", "worth every minute", "brilliant", "warm and funny"],
        " negative": ["dull", "a waste of time", "far too long", "painful to watch", "empty", "poorly made"],
    }
    rows = []
    for _ in range(count):
        verdict = chance.choice(sorted(words))
        prompt = f"{chance.choice(subjects)} was {chance.choice(words[verdict])}.\n\n###\n\n"
        rows.append({"prompt": prompt, "completion": verdict})
    return rows


def upload(client: Client, rows: Iterable[dict[str, str]], filename: str = "reviews.jsonl") -> str:
    """Uploads rows as a training file; the file's id."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file_id: str = client.upload(filename, BytesIO(content), "fine-tune")["id"]
    return file_id


def wait_for(client: Client, job_id: str, *statuses: str, within_s: float = 300.0) -> dict[str, Any]:
    """The job once it has one of these statuses (by default: once it has ended)."""
    wanted = statuses or ("succeeded", "failed", "cancelled")

    def asked() -> dict[str, Any] | None:
        job: dict[str, Any] = client.get("fine-tunes", job_id)
        return job if job["status"] in wanted else None

    job = until(asked, within_s=within_s, every_s=0.1)
    assert job is not None
    return job


def messages(job: dict[str, Any]) -> list[str]:
    return [event["message"] for event in job["events"]]


def _status(pid: int) -> str | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return None
