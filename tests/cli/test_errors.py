"""Whatever a user can cause ends with one sentence, the way out and an exit code: never with a traceback."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Live
from tests.cli.terminal import PROGRAM
from tunesmith.cli.flags.api import REFUSED

NOBODY = {"OPENAI_BASE_URL": "http://127.0.0.1:9/v1", "OPENAI_API_BASE": "http://127.0.0.1:9/v1"}


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["-k", "sk-wrong", "jobs", "list"], 1, "Incorrect API key provided"),
        (["jobs", "cancel", "ft-nope"], 1, "No such fine-tune: ft-nope"),
        (["jobs", "create", "-t", "nope.jsonl"], 2, "nope.jsonl is no file here, and no id of an uploaded file"),
        (["jobs", "create", "-t", "train.jsonl", "-m", "nope"], 1, "The model `nope` does not exist"),
        (["api", "fine_tunes.create", "-t", "nope.jsonl"], 1, "No such File object: nope.jsonl"),
        (["api", "fine_tunes.results", "-i", "ft-nope"], 1, "No such fine-tune: ft-nope"),
        (["api", "fine_tunes.events", "-i", "ft-x", "-s"], 2, "fine_tunes.follow -i ft-x"),
        (["api", "completions.create", "-p", "x"], 2, "Name the model with -m/--model"),
        (
            ["api", "chat_completions.create", "-g", "user", "x", "-m", "ada", "-n", "2", "--stream"],
            2,
            "Leave one away",
        ),
        (["complete", "-m", "nope", "x"], 1, "The model `nope` does not exist"),
        (["-b", "http://[", "jobs", "list"], 2, "'http://[' or a proxy is no URL"),
        (["-b", "localhost:8000", "jobs", "list"], 2, "does not start with http:// or https://"),
        (["-p", "nope", "-v", "jobs", "list"], 2, "The proxy 'nope' does not start with"),
        (["-k", "\x01", "jobs", "list"], 2, "The API key holds characters that no key has"),
    ],
    ids=lambda value: " ".join(value).replace("\x01", "?") if isinstance(value, list) else "",
)
def test_one_sentence_and_a_code(live: Live, words: list[str], code: int, told: str) -> None:
    done = live.quick(*words)
    assert (done.returncode, done.stdout) == (code, "")
    assert told in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "words",
    [["jobs", "list"], ["jobs", "watch"], ["jobs", "watch", "ft-x"], ["api", "fine_tunes.follow", "-i", "ft-x"]],
    ids=" ".join,
)
def test_a_server_that_is_down_is_not_waited_for(live: Live, words: list[str]) -> None:
    done = live.quick(*words, **NOBODY)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Start a server with `tunesmith serve`, or name another with -b/--api-base." in done.stderr


def test_a_server_of_another_kind(live: Live) -> None:
    page = b"HTTP/1.1 200 OK\r\ncontent-type: text/html\r\nconnection: close\r\ncontent-length: 6\r\n\r\n<html>"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        base_url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        asking = subprocess.Popen(
            [*PROGRAM, "-b", base_url, "jobs", "list"], env=live.environment, stderr=subprocess.PIPE, text=True
        )
        connection, _ = listener.accept()
        with connection:
            connection.recv(65_536)
            connection.sendall(page)
        _, told = asking.communicate(timeout=30)
    assert asking.returncode == 1
    assert told == "Error: HTTP 200, with no error of this API in it: '<html>' (HTTP status code: 200)\n"


def test_machines_get_errors_as_json(live: Live) -> None:
    error = json.loads(live.quick("jobs", "show", "ft-nope", "--json").stderr)["error"]
    assert error == {"message": "No such fine-tune: ft-nope", "param": "id", "code": None, "status": 404}


@pytest.mark.parametrize("verb", REFUSED)
def test_a_published_verb_that_is_not_here_says_why(live: Live, verb: str) -> None:
    done = live.quick("api", verb, "-p", "a prompt", "--size", "1024x1024", "-i", "ft-x")
    assert done.returncode == 2
    assert done.stderr == f"Error: {verb} is not here: {REFUSED[verb]}.\n"


buffered_or_not = pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])


@buffered_or_not
def test_output_that_nobody_reads_is_no_error(live: Live, unbuffered: str) -> None:
    environment = live.environment | {"PYTHONUNBUFFERED": unbuffered}
    whole = live.run("models", "list", "-o", "csv").stdout
    reader = f"{sys.executable} -m tunesmith api models.list | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", reader], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("{\n0\n", "")
    closed = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m tunesmith models list >&-"], env=environment, capture_output=True
    )
    assert (closed.returncode, closed.stderr) == (0, b"")
    assert whole


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@buffered_or_not
def test_a_full_disk_behind_the_output(live: Live, unbuffered: str) -> None:
    environment = {"PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("w") as full:
        done = live.run(
            "models", "list", stdout=full, stderr=subprocess.PIPE, capture_output=False, environment=environment
        )
    assert done.returncode == 1
    assert done.stderr == "Error: The system refuses to go on: No space left on device.\n"


def test_file_names_that_are_no_text(live: Live) -> None:
    done = live.run("api", "files.create", "-f", os.fsdecode(b"\xff.jsonl"), "-p", "fine-tune")
    assert done.returncode == 2
    assert done.stderr == "Error: \\udcff.jsonl cannot be read: No such file or directory.\n"


def test_a_question_about_a_file_is_answered_by_a_pipe_or_not_at_all(live: Live) -> None:
    shutil.copy(live.folder / "train.jsonl", live.folder / "again.jsonl")
    flags = ["-t", "again.jsonl", "-m", "ada", "--no_follow"]
    ids = []
    for told in ("", "Nobody answers: uploading it again. --no_check_if_files_exist does so without asking."):
        done = live.run("api", "fine_tunes.create", *flags)
        assert done.returncode == 0, done.stderr
        assert told in done.stdout
        job = json.loads(done.stdout[done.stdout.index("{") :])
        ids.append(job["training_files"][0]["id"])
        live.quick("jobs", "cancel", job["id"])
    assert ids[0] != ids[1]
    with live.at_terminal("api", "fine_tunes.create", *flags) as terminal:
        terminal.wait_for("Enter file ID to reuse an already uploaded file, or an empty string")
        terminal.press(f"{ids[0]}\r")
        assert terminal.end() == 0
    assert f"Reusing already uploaded file: {ids[0]}" in terminal.text
    live.quick("jobs", "cancel", json.loads(terminal.text[terminal.text.index("{") :])["id"])


@pytest.mark.parametrize("words", [[], ["jobs"], ["api"], ["tools"], ["keys"]], ids=" ".join)
def test_half_a_command_shows_what_can_follow(live: Live, words: list[str]) -> None:
    done = live.quick(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: tunesmith")


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["prepare", "-q", "train.jsonl"],
        ["doctor", "train.jsonl"],
        ["plan", "-t", "train.jsonl", "-m", "ada"],
    ],
    ids=lambda words: words[0],
)
def test_data_and_help_do_without_torch(live: Live, words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "tunesmith", *words],
        env=live.environment,
        cwd=live.folder,
        capture_output=True,
        text=True,
        timeout=60,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "tunesmith.cli.parser" in imported
    assert done.stdout
    assert not {"torch", "transformers"} & imported
