"""`tunesmith doctor --fix`: shown before it is done, done whole or not at all, undone without loss; and it trains."""

from __future__ import annotations

import csv
import json
import os
import pty
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core.conftest import World, open_world
from tunesmith.cli.main import main
from tunesmith.core.jobs import FineTuneRequest

SECRET = "sk-proj-a8Fj3kLm29dKwq77ZpRt"
CLEAN = [{"prompt": f"{n} parcels came ->", "completion": " yes" if n % 2 else " no"} for n in range(240)]
ODD = [
    *CLEAN,
    {"prompt": f"Is it {SECRET}? ->", "completion": "yes"},
    CLEAN[3],
    {"prompt": "bare", "completion": " no"},
]


@pytest.fixture
def data(tmp_path: Path, prepare_home: Path, monkeypatch: pytest.MonkeyPatch, quick_tokenizer: None) -> Path:
    monkeypatch.setenv("TUNESMITH_HOME", str(prepare_home))
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.chdir(folder)
    write(folder / "odd.jsonl", ODD)
    return folder


def write(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], object]]:
    """Standard input becomes a terminal at which somebody types this."""
    parent, child = pty.openpty()
    with open(parent, "wb", buffering=0) as keyboard, open(child) as stdin:  # noqa: PTH123  descriptors
        monkeypatch.setattr(sys, "stdin", stdin)
        yield lambda typed: keyboard.write(typed.encode())


@pytest.mark.parametrize(("typed", "written"), [("y\n", True), ("\n", False), ("n\n", False)])
def test_a_diff_is_shown_and_the_answer_decides(
    data: Path, types: Callable[[str], object], capsys: pytest.CaptureFixture[str], typed: str, written: bool
) -> None:
    types(typed)
    assert main(["doctor", "odd.jsonl", "--fix"]) == (0 if written else 1)
    said = capsys.readouterr().out
    assert "--- odd.jsonl\n+++ odd_fixed.jsonl\n@@ -241 +241 @@\n" in said
    assert '-{"prompt":"Is it sk****? ->","completion":"yes"}\n' in said
    assert '+{"prompt":"Is it [secret]? ->","completion":" yes"}\n' in said
    assert '@@ -242 +241,0 @@\n-{"prompt":"3 parcels came ->","completion":" yes"}\n' in said
    assert "odd.jsonl: 2 rows change, 1 go, 242 stay." in said
    assert SECRET not in said
    assert names(data) == ["odd.jsonl", *["odd_fixed.jsonl"] * written]
    assert read(data / "odd.jsonl") == ODD
    if written:
        mended = [
            *CLEAN,
            {"prompt": "Is it [secret]? ->", "completion": " yes"},
            {"prompt": "bare ->", "completion": " no"},
        ]
        assert read(data / "odd_fixed.jsonl") == mended
        assert main(["doctor", "odd_fixed.jsonl"]) == 0


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_without_a_terminal_it_is_shown_and_not_done(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert main(["doctor", "odd.jsonl", "--fix", *flags]) == 1
    told = capsys.readouterr()
    assert "Add --yes" in told.err
    assert "@@ -241 +241 @@" in told.out
    assert names(data) == ["odd.jsonl"]


def test_in_place_keeps_what_was_and_undo_puts_it_back(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = data / "odd.jsonl"
    before = path.read_bytes()
    path.chmod(0o640)
    assert main(["doctor", "odd.jsonl", "--fix", "--in-place", "--yes"]) == 0
    assert names(data) == ["odd.jsonl", "odd.jsonl.orig"]
    assert (data / "odd.jsonl.orig").read_bytes() == before
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert len(read(path)) == 242
    write(path, [*read(path), {"prompt": "bare", "completion": " no"}])
    edited = path.read_bytes()
    assert main(["doctor", "odd.jsonl", "--fix", "--in-place", "--yes"]) == 0
    assert names(data) == ["odd.jsonl", "odd.jsonl.orig", "odd.jsonl.orig.1"]
    assert main(["doctor", "odd.jsonl", "--undo"]) == 0
    assert path.read_bytes() == edited
    assert main(["doctor", "odd.jsonl", "--undo", "--json"]) == 0
    assert path.read_bytes() == before
    assert names(data) == ["odd.jsonl", "odd.jsonl.fixed", "odd.jsonl.fixed.1"]
    capsys.readouterr()
    assert main(["doctor", "odd.jsonl", "--undo"]) == 1
    assert "nothing to undo" in capsys.readouterr().err


def test_good_data_is_left_alone(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(data / "clean.jsonl", CLEAN)
    assert main(["doctor", "clean.jsonl", "--fix", "--in-place", "--yes"]) == 0
    assert "nothing that could be mended" in capsys.readouterr().out
    assert "clean.jsonl.orig" not in names(data)


def test_both_files_of_a_job_are_mended_alike(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(data / "valid.jsonl", [CLEAN[5], {"prompt": "A new one", "completion": "no"}])
    assert main(["doctor", "odd.jsonl", "-v", "valid.jsonl", "--fix", "--yes", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["fix"]
    assert told["written"] == ["odd_fixed.jsonl", "valid_fixed.jsonl"]
    assert told["validation"] == {"rows": 1, "changed": 1, "removed": 1}
    assert read(data / "valid_fixed.jsonl") == [{"prompt": "A new one ->", "completion": " no"}]
    assert main(["doctor", "odd_fixed.jsonl", "-v", "valid_fixed.jsonl"]) == 0


def test_any_format_comes_out_as_jsonl_beside(data: Path) -> None:
    with (data / "raw.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("Text", "label"), *((row["prompt"], row["completion"]) for row in ODD)])
    columns = ["--prompt-column", "Text", "--completion-column", "label"]
    assert main(["doctor", "raw.csv", *columns, "--fix", "--yes"]) == 0
    assert len(read(data / "raw_fixed.jsonl")) == 242
    assert main(["doctor", "raw.csv", *columns, "--fix", "--yes", "--in-place"]) == 2


def test_a_file_that_reads_well_and_would_be_refused_is_written_anew(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / "blank.jsonl").write_text("\n".join(json.dumps(row) + "\n" for row in CLEAN))
    assert main(["doctor", "blank.jsonl", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["findings"]
    assert (found[0]["id"], found[0]["severity"]) == ("format", "required")
    assert "Line 2 of the file is blank" in found[0]["explanation"]
    assert main(["doctor", "blank.jsonl", "--fix", "--yes"]) == 0
    assert read(data / "blank_fixed.jsonl") == CLEAN


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "a", "completion": ""}\n', "no row with a completion"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "Line 2"),
        ('{"prompt": "' + "word " * 5_000 + '", "completion": "b"}\n', "no row would be left"),
    ],
)
def test_where_nothing_can_be_made_of_it_the_reason_is_said(
    data: Path, capsys: pytest.CaptureFixture[str], content: str, said: str
) -> None:
    (data / "bad.jsonl").write_text(content * 3)
    assert main(["doctor", "bad.jsonl", "--fix", "--yes"]) == 1
    assert said in capsys.readouterr().err
    assert names(data) == ["bad.jsonl", "odd.jsonl"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--yes"], "go with --fix"),
        (["--fix", "--undo"], "contradict"),
        (["--fix", "--only", "class_imbalance"], "only a person"),
    ],
)
def test_flags_that_make_no_sense_are_refused(
    data: Path, capsys: pytest.CaptureFixture[str], flags: list[str], said: str
) -> None:
    assert main(["doctor", "odd.jsonl", *flags]) == 2
    assert said in capsys.readouterr().err


def test_a_link_is_not_replaced(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "link.jsonl").symlink_to("odd.jsonl")
    assert main(["doctor", "link.jsonl", "--fix", "--in-place", "--yes"]) == 1
    assert "is a link" in capsys.readouterr().err
    assert names(data) == ["link.jsonl", "odd.jsonl"]
    assert read(data / "odd.jsonl") == ODD


def test_a_failure_at_the_second_file_leaves_the_first_as_it_was(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(data / "valid.jsonl", ODD[-1:])
    before = {name: (data / name).read_bytes() for name in names(data)}
    real, calls = Path.replace, []

    def failing(self: Path, target: Path) -> Any:
        calls.append(self)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", failing)
    assert main(["doctor", "odd.jsonl", "-v", "valid.jsonl", "--fix", "--in-place", "--yes"]) == 1
    assert {name: (data / name).read_bytes() for name in names(data)} == before


def test_kill_at_any_moment_leaves_the_file_whole(data: Path, prepare_home: Path) -> None:
    """Killed within the writing of it, between two lines of `put_in_place`."""
    code = (
        "import os, sys; from tunesmith.data import inplace; from tunesmith.cli.main import main\n"
        "inplace.Staged.link = lambda self, name: os.kill(os.getpid(), 9)\n"
        "main(['doctor', 'odd.jsonl', '--fix', '--in-place', '--yes'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=data, capture_output=True, timeout=60)
    assert done.returncode == -9
    assert read(data / "odd.jsonl") == ODD
    assert set(names(data)) <= {"odd.jsonl", "odd.jsonl.orig"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A platform that says whether it takes the data."""
    home = tmp_path_factory.mktemp("world")
    world = open_world(home, f"sqlite:///{home / 'tunesmith.db'}")
    yield world
    world.store.close()


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["", " yes", "no", "a ->", "a -> ", "\0", "\x07", "\r\n", '"', "\\", "\u2028", SECRET, "word " * 1_500, "\ufeff"]
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(texts, texts), max_size=12), kind=st.sampled_from(["jsonl", "json", "csv", "txt"]))
def test_whatever_goes_in_what_comes_out_is_taken_or_the_reason_is_said(
    data: Path, world: World, capsys: pytest.CaptureFixture[str], rows: list[tuple[str, str]], kind: str
) -> None:
    for path in data.iterdir():
        path.unlink()
    path = data / f"rows.{kind}"
    match kind:
        case "csv":
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("prompt", "completion"), *rows])
        case "txt":
            path.write_text("\n".join(text for _, text in rows), encoding="utf-8")
        case _:
            records = [{"prompt": prompt, "completion": text} for prompt, text in rows]
            path.write_text(json.dumps(records) if kind == "json" else "\n".join(map(json.dumps, records)))
    code = main(["doctor", path.name, "--fix", "--yes"])
    told = capsys.readouterr()
    written = data / "rows_fixed.jsonl"
    if written.exists():
        result: Path = written
    elif "nothing that could be mended" in told.out:
        result = path
    else:
        assert code == 1
        assert told.err.startswith("Error: ")
        assert names(data) == [path.name]
        return
    upload = world.files.create(world.owner, filename="f", purpose="fine-tune", chunks=[result.read_bytes()])
    job = world.jobs.create(world.owner, FineTuneRequest(training_file=upload.id, model="ada"))
    assert job.training_examples == len(read(result))
