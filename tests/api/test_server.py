"""The server as a process: its first start, its end, and the starts it refuses."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.wire.harness import ROWS, settings_for
from tunesmith.server import listen

MODULE = "tests.api.serve_once"


@dataclass
class Running:
    process: subprocess.Popen[str]
    base_url: str
    new_key: str | None

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)


def environment(home: Path, base: Path, **values: str) -> dict[str, str]:
    settings_for(home, base)
    own = {"TUNESMITH_HOME": str(home), "TUNESMITH_PORT": "0", "TUNESMITH_ENGINE": "scripted"}
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TUNESMITH_")}
    return inherited | own | {f"TUNESMITH_{name.upper()}": value for name, value in values.items()}


@contextmanager
def serving(home: Path, base: Path, **values: str) -> Iterator[Running]:
    process = subprocess.Popen(
        [sys.executable, "-m", MODULE], stdout=subprocess.PIPE, text=True, env=environment(home, base, **values)
    )
    try:
        assert process.stdout is not None
        told = json.loads(process.stdout.readline())
        yield Running(process, told["base_url"], told["key"])
    finally:
        process.kill()
        process.communicate()


def refusal(home: Path, base: Path, **values: str) -> str:
    """What a server that does not start says."""
    ended = subprocess.run(
        [sys.executable, "-m", MODULE],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(home, base, **values),
    )
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "Traceback" not in ended.stderr
    return ended.stderr


def client_of(server: Running, key: str | None) -> httpx.Client:
    return httpx.Client(base_url=server.base_url, headers={"Authorization": f"Bearer {key}"}, timeout=30)


def test_first_start_and_second(tmp_path: Path, tiny_base: Path) -> None:
    home = tmp_path / "home"
    with serving(home, tiny_base) as server:
        assert server.base_url.startswith("http://127.0.0.1:")
        assert server.base_url.endswith("/v1")
        assert server.new_key is not None
        assert (home / "owner.key").read_text() == server.new_key + "\n"
        assert stat.S_IMODE((home / "owner.key").stat().st_mode) == 0o600
        with client_of(server, server.new_key) as client:
            assert client.get("/models").status_code == 200
            assert client.get("/organization").json()["role"] == "owner"
        assert httpx.get(server.base_url.removesuffix("/v1") + "/healthz").status_code == 200
        assert server.end() == 0
    with serving(home, tiny_base) as again:
        assert again.new_key is None
        with client_of(again, server.new_key) as client:
            assert client.get("/models").status_code == 200
        assert again.end(signal.SIGINT) == 0


def test_the_home_folder_is_private(tmp_path: Path, tiny_base: Path) -> None:
    home = tmp_path / "made" / "by" / "us"
    values = environment(tmp_path / "home", tiny_base) | {"TUNESMITH_HOME": str(home), "TUNESMITH_ENGINE": "none"}
    subprocess.run([sys.executable, "-m", MODULE], capture_output=True, env=values, timeout=60)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_what_is_written_in_a_home_that_was_there_is_private(tmp_path: Path, tiny_base: Path) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o755)
    with serving(home, tiny_base) as server, client_of(server, server.new_key) as client:
        client.post("/files", data={"purpose": "fine-tune"}, files={"file": ("t.jsonl", ROWS)}).raise_for_status()
        written = [path for path in home.rglob("*") if path.name != "bases.toml"]
        assert any(path.parent.name == "files" for path in written)
        assert [path for path in written if stat.S_IMODE(path.stat().st_mode) & 0o077] == []


def test_blobs_in_a_folder_of_their_own(tmp_path: Path, tiny_base: Path) -> None:
    with (
        serving(tmp_path / "home", tiny_base, blobs_url=str(tmp_path / "blobs")) as server,
        client_of(server, server.new_key) as client,
    ):
        file = client.post("/files", data={"purpose": "fine-tune"}, files={"file": ("t.jsonl", ROWS)}).json()
        assert (tmp_path / "blobs" / file["id"]).read_bytes() == ROWS


def test_an_owner_key_that_could_not_be_written_is_made_at_the_next_start(tmp_path: Path, tiny_base: Path) -> None:
    home = tmp_path / "home"
    (home / "owner.key").mkdir(parents=True)
    assert "owner.key" in refusal(home, tiny_base)
    (home / "owner.key").rmdir()
    with serving(home, tiny_base) as server, client_of(server, server.new_key) as client:
        assert (home / "owner.key").read_text() == f"{server.new_key}\n"
        assert client.get("/models").status_code == 200


def test_a_chosen_owner_key(tmp_path: Path, tiny_base: Path) -> None:
    key = "sk-" + "chosen" * 6
    with serving(tmp_path / "home", tiny_base, owner_key=key, host="0.0.0.0") as server:
        assert server.new_key == key
        assert "127.0.0.1" in server.base_url
        with client_of(server, key) as client:
            assert client.get("/models").status_code == 200


def test_an_open_network_needs_a_chosen_key(tmp_path: Path, tiny_base: Path) -> None:
    keys: list[dict[str, str]] = [{}, {"owner_key": "sk-easily-guessed"}]
    for key in keys:
        told = refusal(tmp_path / "home", tiny_base, host="0.0.0.0", **key)
        assert "TUNESMITH_OWNER_KEY" in told
        assert "guessed" not in told
        assert not (tmp_path / "home" / "tunesmith.db").exists()


def test_one_server_for_one_home(tmp_path: Path, tiny_base: Path) -> None:
    home = tmp_path / "home"
    with serving(home, tiny_base) as server:
        told = refusal(home, tiny_base)
        assert f"process {server.process.pid}" in told
        assert "TUNESMITH_HOME" in told
        server.process.kill()
        server.process.wait()
    with serving(home, tiny_base) as successor:  # the lock of a killed server is no obstacle
        assert successor.new_key is None


def test_answers_do_not_wait_for_acknowledgements() -> None:
    """Nagle's algorithm off on what is accepted, which asyncio does for sockets that say they are TCP."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP


def test_a_port_that_is_taken(tmp_path: Path, tiny_base: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = refusal(tmp_path / "home", tiny_base, port=str(taken.getsockname()[1]))
    assert "TUNESMITH_PORT" in told


@pytest.mark.parametrize(
    ("values", "catalogue", "told"),
    [
        ({"engine": "steam"}, None, "no engine 'steam'"),
        ({"owner_key": "two words"}, None, "API key"),
        ({"database_url": "mysql://x"}, None, "mysql"),
        ({"database_url": "nonsense"}, None, "TUNESMITH_DATABASE_URL"),
        ({"database_url": "sqlite:////nowhere/x.db"}, None, "TUNESMITH_DATABASE_URL"),
        ({"blobs_url": "nope://x"}, None, "TUNESMITH_BLOBS_URL"),
        ({"blobs_url": "/proc/x"}, None, "TUNESMITH_BLOBS_URL"),
        ({}, "[ada]\nfolder = 'nowhere'\n", "[ada]"),
        ({}, "no TOML", "bases.toml"),
    ],
)
def test_settings_that_are_refused(
    tmp_path: Path, tiny_base: Path, values: dict[str, str], catalogue: str | None, told: str
) -> None:
    home = tmp_path / "home"
    env = environment(home, tiny_base, **values)
    if catalogue is not None:
        (home / "bases.toml").write_text(catalogue)
    ended = subprocess.run([sys.executable, "-m", MODULE], capture_output=True, text=True, env=env, timeout=60)
    assert ended.returncode == 1
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


def test_ending_with_a_stream_open(tmp_path: Path, tiny_base: Path) -> None:
    """A job is being followed and its trainer at work: neither holds the end up, and the job goes on afterwards."""
    home = tmp_path / "home"
    with serving(home, tiny_base, trainer_threads="1") as server, client_of(server, server.new_key) as client:
        file = client.post("/files", data={"purpose": "fine-tune"}, files={"file": ("t.jsonl", ROWS * 100)}).json()
        asked = {"training_file": file["id"], "model": "ada", "n_epochs": 50, "batch_size": 1}
        job_id = client.post("/fine-tunes", json=asked).json()["id"]
        with client.stream("GET", f"/fine-tunes/{job_id}/events?stream=true") as response:
            lines = response.iter_lines()
            while "Fine-tune started" not in next(lines):
                pass
            began = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            assert "shutting down" in "".join(lines)
        assert server.process.wait(30) == 0
        assert time.monotonic() - began < 20
    with serving(home, tiny_base, trainer_threads="1") as again, client_of(again, server.new_key) as client:
        assert client.get(f"/fine-tunes/{job_id}").json()["status"] == "running"
        assert client.post(f"/fine-tunes/{job_id}/cancel").json()["status"] == "cancelled"
