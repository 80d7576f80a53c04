"""Fixtures of the command line's tests."""

from __future__ import annotations

import io
import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from tests.cli.terminal import PROGRAM, at_terminal
from tests.e2e.harness import OWNER_KEY, Server, put_base, reviews
from tests.sdk.conftest import write_rows
from tests.sdk.environments import client_environment
from tests.sdk.flow import CommandLine
from tunesmith.cli.main import main
from tunesmith.tokenizer import Tokenizer

_read = Tokenizer.from_folder
_known: dict[str, Tokenizer] = {}


@pytest.fixture
def quick_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer is read once for all tests in place of once for each."""
    monkeypatch.setattr(Tokenizer, "from_folder", staticmethod(lambda folder: _cached(folder.name, folder)))


@pytest.fixture(scope="session")
def prepare_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with the base models of the box unpacked in it once."""
    return tmp_path_factory.mktemp("prepare-home")


def _cached(name: str, folder: Path) -> Tokenizer:
    if name not in _known:
        _known[name] = _read(folder)
    return _known[name]


@dataclass(frozen=True)
class Live:
    """A server on a tiny base, a folder with train.jsonl, valid.jsonl and long.jsonl, and commands run there."""

    server: Server
    folder: Path

    @property
    def environment(self) -> dict[str, str]:
        return client_environment(self.server.base_url, OWNER_KEY) | {"TUNESMITH_HOME": str(self.server.home)}

    @property
    def legacy(self) -> CommandLine:
        """Our verbs of the published command line."""
        return CommandLine(PROGRAM, self.environment, self.folder)

    def run(self, *words: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """A command without a terminal."""
        settings: dict[str, Any] = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 120}
        if "input" in options:
            del settings["stdin"]
        environment = self.environment | options.pop("environment", {})
        return subprocess.run([*PROGRAM, *words], env=environment, cwd=self.folder, **settings | options)

    def quick(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """The same within this process, without waiting for imports."""
        out, err = io.StringIO(), io.StringIO()
        environment = self.environment | variables
        folder = Path.cwd()
        os.chdir(self.folder)
        try:
            with patch.dict(os.environ, environment, clear=True), redirect_stdout(out), redirect_stderr(err):
                code = main(words)
        finally:
            os.chdir(folder)
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())

    def json(self, *words: str) -> Any:
        """What a command shows with --json."""
        done = self.quick(*words, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def at_terminal(self, *words: str, columns: int = 80, rows: int = 24, **variables: str) -> Any:
        """A command at a terminal; see `terminal.at_terminal`."""
        return at_terminal(words, self.environment | variables, self.folder, columns=columns, rows=rows)

    def start_long_job(self) -> str:
        """The id of a job that goes on until it is cancelled."""
        job = self.json(
            "jobs",
            "create",
            "-t",
            "long.jsonl",
            "-v",
            "valid.jsonl",
            "-m",
            "ada",
            "--n_epochs",
            "50",
            "--batch_size",
            "4",
        )
        return str(job["id"])


@pytest.fixture(scope="session")
def live(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """One server for all tests that leave it as it is."""
    home = tmp_path_factory.mktemp("live-home")
    put_base(home, "ada", tiny_base)
    with Server(home) as server:
        yield Live(server, data_folder(tmp_path_factory.mktemp("live-data")))


@pytest.fixture(scope="session")
def tuned(live: Live) -> dict[str, Any]:
    """A job of that server that has succeeded."""
    flags = ["-t", "train.jsonl", "-v", "valid.jsonl", "-m", "ada", "--n_epochs", "2", "--batch_size", "8"]
    lines = live.run("jobs", "create", *flags, "--wait", "--json").stdout.splitlines()
    job: dict[str, Any] = json.loads(lines[-1])
    assert job["status"] == "succeeded"
    return job


def data_folder(folder: Path) -> Path:
    """Training data of three lengths."""
    for name, count, seed in (("train", 40, 1), ("valid", 12, 2), ("long", 400, 3)):
        write_rows(folder / f"{name}.jsonl", reviews(count, seed))
    return folder
