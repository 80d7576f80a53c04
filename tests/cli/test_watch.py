"""Watching real jobs: at terminals of several sizes, in logs, through restarts of the server, up to Ctrl-C."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Live, data_folder
from tests.cli.terminal import COLOUR
from tests.e2e.harness import Server, put_base

CTRL_C = "\x03"


@pytest.mark.parametrize(("columns", "rows"), [(120, 40), (80, 24), (40, 20), (20, 6)])
def test_the_screen_fits_the_terminal(live: Live, tuned: dict[str, Any], columns: int, rows: int) -> None:
    with live.at_terminal("jobs", "watch", tuned["id"], columns=columns, rows=rows) as terminal:
        assert terminal.end() == 0
    screen = terminal.last_frame.partition("To ask it:")[0]
    assert "succeeded · ada" in screen
    assert ("100%  step 10/10" if columns > 20 else "100%\n") in screen
    assert max(map(len, screen.splitlines())) <= columns
    assert screen.rstrip().count("\n") < rows
    charted = "⠤⠤ training" in screen
    assert charted == (rows > 6)


def test_the_chart_tells_both_losses_and_the_figures(live: Live, tuned: dict[str, Any]) -> None:
    with live.at_terminal("jobs", "watch", tuned["id"], columns=100) as terminal:
        assert terminal.end() == 0
    assert re.search(r"training loss \d\.\d\d   • validation loss \d\.\d\d \(whole file \d\.\d\d\)", terminal.text)
    assert re.search(r"[\d,]+ tokens · token accuracy \d+% · costs \$0\.00", terminal.text)
    assert f"tunesmith complete -m {tuned['fine_tuned_model']}" in terminal.text
    assert COLOUR.search(terminal.written)


def test_no_colour_where_none_is_wanted(live: Live, tuned: dict[str, Any]) -> None:
    with live.at_terminal("jobs", "watch", tuned["id"], NO_COLOR="1") as terminal:
        assert terminal.end() == 0
    assert "•" in terminal.text
    assert COLOUR.search(terminal.written) is None


def test_signs_that_the_encoding_has(live: Live, tuned: dict[str, Any]) -> None:
    with live.at_terminal("jobs", "watch", tuned["id"], PYTHONIOENCODING="ascii") as terminal:
        assert terminal.end() == 0
    assert terminal.text.isascii()
    assert "** training loss" in terminal.text


def test_lines_in_a_log_and_events_for_machines(live: Live, tuned: dict[str, Any]) -> None:
    plain = live.quick("jobs", "watch", tuned["id"])
    assert plain.returncode == 0
    lines = [line.partition("] ")[2] for line in plain.stdout.splitlines() if line.startswith("[")]
    assert [line for line in lines if not line.startswith("Step ")] == [one["message"] for one in tuned["events"]]
    last = next(line for line in reversed(lines) if line.startswith("Step "))
    assert re.match(r"Step 10/10: training loss=\d\.\d\d, validation loss=\d\.\d\d", last)

    *events, job = map(json.loads, live.quick("jobs", "watch", tuned["id"], "--json").stdout.splitlines())
    assert job["status"] == "succeeded"
    steps = [event["data"]["step"] for event in events if event["type"] == "metrics"]
    assert steps == list(range(1, 11))


def test_ctrl_c_ends_the_watching_and_not_the_job(live: Live) -> None:
    flags = ["-t", "long.jsonl", "-m", "ada", "--n_epochs", "50", "--batch_size", "4"]
    with live.at_terminal("jobs", "create", *flags, "--wait") as terminal:
        terminal.wait_for("left, ends")
        terminal.press(CTRL_C)
        assert terminal.end() == 130
    found = re.search(r"Created fine-tune: (ft-\w+)", terminal.text)
    assert found is not None
    job_id = found[1]
    assert "Traceback" not in terminal.text
    assert f"tunesmith jobs watch {job_id}" in terminal.text
    assert re.search(r"running · epoch \d+ of 50 · ada", terminal.text)
    with live.at_terminal("jobs", "watch") as terminal:  # without an id: the one that is running
        terminal.wait_for(job_id)
        terminal.press(CTRL_C)
        assert terminal.end() == 0
    assert f"tunesmith jobs watch {job_id}" in terminal.text
    assert live.json("jobs", "show", job_id)["status"] == "running"

    with live.at_terminal("jobs", "watch", job_id) as terminal:
        terminal.wait_for("left, ends")
        assert live.run("jobs", "pause", job_id).returncode == 0
        terminal.wait_for("paused · ada")
        assert live.run("jobs", "resume", job_id).returncode == 0
        terminal.wait_for("Fine-tune resumed")
        assert live.run("jobs", "cancel", job_id).returncode == 0
        assert terminal.end() == 1
    assert "The job has ended as cancelled." in terminal.text


def test_a_restart_of_the_server_costs_no_event(tiny_base: Path, tmp_path: Path) -> None:
    put_base(tmp_path / "home", "ada", tiny_base)
    (tmp_path / "data").mkdir()
    with Server(tmp_path / "home") as server:
        live = Live(server, data_folder(tmp_path / "data"))
        job_id = live.start_long_job()
        with (
            live.at_terminal("jobs", "watch", job_id, columns=120, rows=40) as screen,
            live.at_terminal("jobs", "watch", job_id, "--json") as records,
            live.legacy.start("fine_tunes.follow", "-i", job_id) as followed,
        ):
            screen.wait_for("left, ends")
            assert server.terminate() == 0
            screen.wait_for("Connection lost, trying again: The server is shutting down.")
            server.settings["TUNESMITH_PORT"] = server.base_url.split(":")[2].removesuffix("/v1")
            server.start()
            screen.wait_for("Connected again, going on after event ")
            screen.wait_for("Training was interrupted and goes on")
            assert live.run("jobs", "cancel", job_id).returncode == 0
            assert screen.end() == records.end() == 1
            told, asides = followed.communicate(timeout=60)
        with server.client() as client:
            whole = client.get("fine-tunes", job_id, "events", metrics="true")["data"]
    assert "running · epoch" in screen.text
    lines = [json.loads(line) for line in records.text.splitlines() if line.startswith("{")]
    assert lines[:-1] == whole
    assert lines[-1]["status"] == "cancelled"
    messages = [line.partition("] ")[2] for line in told.splitlines() if line.startswith("[")]
    assert messages == [event["message"] for event in whole if event["type"] == "message"]
    assert "Trying again" in asides
    assert followed.returncode == 1


def test_a_job_that_is_unknown_is_told_at_once(live: Live) -> None:
    for words in (["jobs", "watch"], ["jobs", "show"], ["api", "fine_tunes.follow", "-i"]):
        done = live.quick(*words, "ft-nope")
        assert (done.returncode, done.stdout) == (1, "")
        assert "No such fine-tune: ft-nope" in done.stderr
