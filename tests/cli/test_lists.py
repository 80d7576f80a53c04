"""Every list as a table, as CSV and as JSON, by one mechanism."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pytest

from tests.cli.conftest import Live

LISTS = [
    ["jobs", "list"],
    ["models", "list"],
    ["models"],
    ["keys", "list"],
    ["api", "files.list"],
    ["api", "models.list"],
    ["api", "engines.list"],
    ["api", "fine_tunes.list"],
    ["api", "fine_tuning.job.list"],
    ["api", "fine_tunes.events", "-i", "JOB"],
    ["api", "fine_tunes.checkpoints", "-i", "JOB"],
]


@pytest.mark.parametrize("words", LISTS, ids=" ".join)
def test_the_three_forms_hold_the_same(live: Live, tuned: dict[str, Any], words: list[str]) -> None:
    words = [tuned["id"] if word == "JOB" else word for word in words]
    found = json.loads(live.quick(*words, "-o", "json").stdout)
    assert found == live.json(*words)
    objects = found["data"] if isinstance(found, dict) else found
    rows = list(csv.reader(io.StringIO(live.quick(*words, "-o", "csv").stdout)))
    assert len(rows) == 1 + len(objects)
    for row, one in zip(rows[1:], objects, strict=True):
        assert row[0] == one.get("id", row[0])
    table = live.quick(*words, "-o", "table").stdout.splitlines()
    assert table[0].split("  ")[0].strip() == rows[0][0].replace("_", " ")
    assert len(table) == len(rows)


def test_the_published_lists_come_as_json_unless_asked_otherwise(live: Live, tuned: dict[str, Any]) -> None:
    listed = json.loads(live.quick("api", "fine_tunes.list").stdout)
    assert listed["object"] == "list"
    assert tuned["id"] in [job["id"] for job in listed["data"]]
    (job,) = [one for one in _objects(live.quick("api", "fine_tuning.job.list").stdout) if one["id"] == tuned["id"]]
    assert (job["object"], job["result_files"]) == ("fine_tuning.job", [tuned["result_files"][0]["id"]])
    assert live.json("api", "fine_tuning.job.get", "-i", tuned["id"]) == job
    results = ["api", "fine_tuning.job.results", "-i", tuned["id"]]
    assert live.quick(*results).stdout == live.quick("api", "fine_tunes.results", "-i", tuned["id"]).stdout


def test_times_are_utc_for_machines(live: Live, tuned: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(live.quick("jobs", "list", "-o", "csv").stdout)))
    assert rows[0]["created"].endswith("+00:00")


def test_contradicting_forms_are_wrong_usage(live: Live) -> None:
    done = live.quick("jobs", "list", "-o", "csv", "--json")
    assert done.returncode == 2
    assert "--json and -o csv contradict each other" in json.loads(done.stderr)["error"]["message"]


def test_ids_stay_whole_on_a_narrow_terminal(live: Live, tuned: dict[str, Any]) -> None:
    with live.at_terminal("jobs", "list", columns=50) as terminal:
        assert terminal.end() == 0
    assert f"id                {tuned['id']}\n" in terminal.text


def _objects(text: str) -> list[dict[str, Any]]:
    """JSON objects that follow one another."""
    decoder, found = json.JSONDecoder(), []
    while text := text.lstrip():
        one, end = decoder.raw_decode(text)
        found.append(one)
        text = text[end:]
    return found
