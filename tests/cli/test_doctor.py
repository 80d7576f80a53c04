"""`tunesmith doctor` as a person sees it, and as a script does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.cli.main import main

Rows = list[dict[str, str]]


@pytest.fixture
def data(tmp_path: Path, prepare_home: Path, monkeypatch: pytest.MonkeyPatch, quick_tokenizer: None) -> Path:
    monkeypatch.setenv("TUNESMITH_HOME", str(prepare_home))
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"{n} parcels have arrived ->", "completion": " positive" if n % 2 else " negative"}
        for n in range(240)
    ]
    write(tmp_path / "clean.jsonl", rows)
    return tmp_path


def write(path: Path, rows: Rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> Rows:
    return [json.loads(line) for line in path.read_text().splitlines()]


def asked(capsys: pytest.CaptureFixture[str], *arguments: str, code: int) -> dict[str, Any]:
    assert main(["doctor", *arguments, "--json"]) == code
    told: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert told["ok"] == (code == 0)
    return told


def test_clean_data_lets_scripts_go_on(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = asked(capsys, "clean.jsonl", code=0)
    assert [finding["id"] for finding in told["findings"]] == ["task"]
    assert {key: told[key] for key in ("rows", "task", "separator", "stop", "model", "files", "class_spellings")} == {
        "rows": 240,
        "task": "classification",
        "separator": " ->",
        "stop": None,
        "model": "ada",
        "files": {"training": "clean.jsonl"},
        "class_spellings": {},
    }
    assert main(["doctor", "clean.jsonl"]) == 0
    assert "Nothing stands against training" in capsys.readouterr().out


def test_findings_stop_scripts_and_name_rows_and_fixes(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read(data / "clean.jsonl")
    secret = "sk-proj-a8Fj3kLm29dKwq77ZpRt"
    write(data / "odd.jsonl", [*rows, rows[3], {"prompt": f"Is it {secret} ->", "completion": " positive"}])
    told = asked(capsys, "odd.jsonl", code=1)
    assert [(f["file"], f["id"], f["severity"], f["count"], f["rows"]["shown"]) for f in told["findings"]] == [
        ("training", "secrets", "required", 1, [242]),
        ("training", "duplicated_rows", "suggested", 1, [241]),
        ("training", "task", "note", 0, []),
    ]
    assert told["findings"][1]["fix"] == {"action": "Remove these rows", "prepare": {"drop_duplicates": True}}
    assert main(["doctor", "odd.jsonl"]) == 1
    said = capsys.readouterr().out
    assert "required secrets, 1 row: 242\n" in said
    assert "`tunesmith prepare odd.jsonl` does it" in said
    assert secret not in said + json.dumps(told)


def test_two_files_are_compared(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read(data / "clean.jsonl")
    other = {"prompt": "5 PARCELS have, arrived! ->", "completion": " positive"}
    write(data / "valid.jsonl", [{"prompt": "Never seen ->", "completion": " negative"}, rows[7], other])
    told = asked(capsys, "clean.jsonl", "-v", "valid.jsonl", code=1)
    found = {finding["id"]: finding for finding in told["findings"] if finding["file"] == "validation"}
    assert {id_: finding["rows"]["shown"] for id_, finding in found.items()} == {
        "overlap_exact": [2],
        "overlap_spelling": [3],
    }
    assert main(["doctor", "clean.jsonl", "-v", "valid.jsonl"]) == 1
    assert "suggested overlap_exact in valid.jsonl, 1 row: 2\n" in capsys.readouterr().out


def test_what_prepare_reads_the_doctor_reads(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "".join(f"The parcel number {n} came ->,{' good' if n % 2 else ' bad'}\n" for n in range(240))
    (data / "raw.csv").write_text("Text,label\n" + lines)
    told = asked(capsys, "raw.csv", "--prompt-column", "Text", "--completion-column", "label", code=1)
    required = [finding["id"] for finding in told["findings"] if finding["severity"] == "required"]
    assert required == ["format", "prompt_column", "completion_column"]
    assert told["rows"] == 240


def test_a_file_that_changes_its_mind_is_read_again(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A byte that is not UTF-8, after the part that was looked at first."""
    lines = (data / "clean.jsonl").read_bytes() * 40
    (data / "late.jsonl").write_bytes(lines + b'{"prompt": "caf\xe9 ->", "completion": " positive"}\n')
    told = asked(capsys, "late.jsonl", "-v", "clean.jsonl", code=1)
    found = {finding["id"]: finding["count"] for finding in told["findings"]}
    assert (told["rows"], found["overlap_exact"], "encoding" in found) == (9_601, 240, True)


@pytest.mark.parametrize("odd", ["training", "validation"])
def test_broken_rows_are_a_fatal_finding(data: Path, capsys: pytest.CaptureFixture[str], odd: str) -> None:
    (data / "broken.jsonl").write_text((data / "clean.jsonl").read_text() + '{"prompt": \n')
    names = ["broken.jsonl", "-v", "clean.jsonl"] if odd == "training" else ["clean.jsonl", "-v", "broken.jsonl"]
    told = asked(capsys, *names, code=1)
    assert [(f["file"], f["id"], f["severity"]) for f in told["findings"] if f["severity"] != "note"] == [
        (odd, "unreadable", "fatal")
    ]
    assert "Line 241" in told["findings"][0]["explanation"]


def test_what_is_no_file_is_an_error(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "nowhere.jsonl"]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert main(["doctor", "clean.jsonl", "-m", "gpt-9"]) == 2
