"""Our own command line through the guide's whole flow, against a real server on a tiny base."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import OWNER_KEY, Server, put_base, reviews
from tests.sdk import flow
from tests.sdk.conftest import write_rows
from tests.sdk.environments import client_environment
from tests.sdk.flow import CommandLine

PROGRAM = [sys.executable, "-m", "tunesmith"]


@pytest.fixture(scope="module")
def server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("cli-home")
    put_base(home, "ada", tiny_base)
    with Server(home) as server:
        yield server


@pytest.fixture(scope="module")
def cli(server: Server, tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    folder = tmp_path_factory.mktemp("data")
    for name, count, seed in (("train", 40, 1), ("valid", 12, 2), ("long", 400, 3)):
        write_rows(folder / f"{name}.jsonl", reviews(count, seed))
    return CommandLine(PROGRAM, client_environment(server.base_url, OWNER_KEY), folder)


@pytest.fixture(scope="module")
def recorded(cli: CommandLine) -> list[dict[str, Any]]:
    """What a job created and followed with --json prints, line by line."""
    flags = ["-t", "train.jsonl", "-m", "ada", "--n_epochs", "1", "--batch_size", "8", "--json"]
    return [json.loads(line) for line in cli.run("fine_tunes.create", *flags).splitlines()]


def command(cli: CommandLine, *words: str) -> subprocess.CompletedProcess[str]:
    """Any command of ours, not only those under `api`."""
    return subprocess.run(
        [*cli.program, *words], env=dict(cli.environment), cwd=cli.folder, capture_output=True, text=True, timeout=60
    )


def test_whole_flow(cli: CommandLine) -> None:
    flow.check_whole_flow(cli, steps=10, training_rows=40)


def test_follow_after_ctrl_c(cli: CommandLine) -> None:
    flow.check_interrupted_follow(cli)


def test_cancel(cli: CommandLine) -> None:
    flow.check_cancel(cli)


def test_files(cli: CommandLine) -> None:
    flow.check_files(cli)


def test_members_are_made_refused_and_revoked(cli: CommandLine, server: Server, recorded: list[dict[str, Any]]) -> None:
    made = json.loads(command(cli, "keys", "create", "--name", "a colleague", "--json").stdout)
    member = CommandLine(PROGRAM, client_environment(server.base_url, made["secret"]), cli.folder)
    flow.check_deletion(cli, member, recorded[-1]["fine_tuned_model"])
    listed = command(cli, "keys", "list").stdout
    assert made["id"] in listed
    assert made["secret"] not in listed
    assert command(cli, "keys", "revoke", "-i", made["id"]).returncode == 0
    refused = member.finished("models.list")
    assert refused.returncode == 1
    assert "HTTP status code: 401" in refused.stderr


def test_models_says_which_names_share_a_checkpoint(cli: CommandLine) -> None:
    told = command(cli, "models").stdout
    assert re.search(r"^curie +in the box: the curie checkpoint; the same weights as .*davinci$", told, re.MULTILINE)
    listed = json.loads(command(cli, "models", "--json").stdout)
    assert [model["id"] for model in listed][:4] == ["ada", "babbage", "curie", "davinci"]


def test_machines_get_the_job_its_events_and_the_job_as_it_ended(recorded: list[dict[str, Any]]) -> None:
    created, *events, ended = recorded
    assert (created["id"], created["status"]) == (ended["id"], "pending")
    assert ended["status"] == "succeeded"
    assert [event["message"] for event in events] == [event["message"] for event in ended["events"]]


def test_results_and_errors_for_machines(cli: CommandLine, recorded: list[dict[str, Any]]) -> None:
    rows = json.loads(cli.run("fine_tunes.results", "-i", recorded[-1]["id"], "--json"))
    assert [row["step"] for row in rows] == list(range(1, 6))
    assert all(row["training_loss"] > 0 for row in rows)
    failed = cli.finished("models.get", "-i", "no-such-model", "--json")
    assert failed.returncode == 1
    assert json.loads(failed.stderr)["error"]["code"] == "model_not_found"


def test_wrong_local_files_are_wrong_usage(cli: CommandLine) -> None:
    missing = cli.finished("files.create", "-f", "not-there.jsonl", "-p", "fine-tune")
    assert missing.returncode == 2
    assert "not-there.jsonl cannot be read" in missing.stderr


def test_a_file_uploaded_before_can_be_used_again(cli: CommandLine) -> None:
    write_rows(cli.folder / "once.jsonl", reviews(8, 7))
    file = json.loads(cli.run("files.create", "-f", "once.jsonl", "-p", "fine-tune"))
    done = subprocess.run(
        [*PROGRAM, "api", "fine_tunes.create", "-t", "once.jsonl", "-m", "ada", "--no_follow"],
        env=dict(cli.environment),
        cwd=cli.folder,
        input=f"file-wrong\n{file['id']}\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "File id 'file-wrong' is not among the IDs" in done.stdout
    assert f"Reusing already uploaded file: {file['id']}" in done.stdout
    job = json.loads(done.stdout[done.stdout.index("{") :])
    assert job["training_files"][0]["id"] == file["id"]
    cli.finished("fine_tunes.cancel", "-i", job["id"])


def test_weights_go_out_and_come_in(cli: CommandLine) -> None:
    flags = ["-t", "train.jsonl", "-m", "ada", "--n_epochs", "1", "--batch_size", "20", "--json"]
    name = json.loads(cli.run("fine_tunes.create", *flags).splitlines()[-1])["fine_tuned_model"]
    wrote = command(cli, "models", "export", name, "-o", "model.zip")
    assert wrote.returncode == 0, wrote.stderr
    assert re.fullmatch(r"Wrote model\.zip \([\d,]+ bytes\)\n", wrote.stdout)
    again = command(cli, "models", "export", name, "-o", "model.zip")
    assert again.returncode == 2
    assert "model.zip is there already; name another with -o." in again.stderr

    wrote = command(cli, "models", "export", name, "--format", "gguf", "--precision", "bf16", "-o", "model.gguf")
    assert wrote.returncode == 0, wrote.stderr
    assert re.match(r"Wrote model\.gguf \([\d,]+ bytes\)\nRead back, the file's log-probabilities differ", wrote.stdout)
    assert (cli.folder / "model.gguf").read_bytes().startswith(b"GGUF")

    shutil.unpack_archive(cli.folder / "model.zip", cli.folder / "model")
    for path in ("model.zip", "model"):
        came = command(cli, "models", "import", path, "--base", "ada", "--suffix", path, "--json")
        assert came.returncode == 0, came.stderr
        model = json.loads(came.stdout)["id"]
        asked = ["completions.create", "-p", "How was it? ->", "-M", "4", "-t", "0", "-m"]
        assert cli.run(*asked, model) == cli.run(*asked, name)
    refused = command(cli, "models", "import", "train.jsonl", "--base", "ada")
    assert refused.returncode == 1
    assert "not a zip that can be read here" in refused.stderr
    assert not list(cli.folder.glob("*.part"))
