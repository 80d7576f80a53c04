"""The same files, rows and flags as the original command, on each recorded input; or better, for a reason."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.golden import Case, cases, original
from tests.sdk.environments import python_with
from tunesmith.cli.main import main
from tunesmith.data.formats import read_examples, split_lines

Ours = Callable[..., tuple[int, str, dict[str, str]]]
CASES = cases()
REASONS = Path(__file__).parents[2] / "docs" / "design" / "decisions" / "prepare.md"
BETTER = {
    "csv_na_cells": "A cell that reads `None`, `NA` or `null` is text",
    "json_list": "A `.json` file is always converted",
    "jsonl_blank_lines": "A file is recommended as it is only if it trains as it is",
    "long_open_ended": "Lengths are counted in tokens of the base",
    "long_by_characters_only": "Lengths are counted in tokens of the base",
    "long_after_duplicates": "Long rows are the ones that are removed",
    "one_class": "One class is not measured",
    "csv_utf16": "Encodings other than UTF-8 are read",
    "jsonl_latin1": "Encodings other than UTF-8 are read",
    "txt_mark": "Encodings other than UTF-8 are read",
    "jsonl_indented": "JSON is read as JSON under any of both endings",
    "nothing_left": "A file of which nothing is left is an error",
    "csv_cr_blank_line": "No cell is lost after a blank line that ends with a carriage return alone",
    "xlsx_spaces": "A cell of a workbook that holds nothing but spaces is empty",
}
"""Case -> the first words of the reason, as the page on decisions has it."""


@pytest.fixture
def ours(
    tmp_path: Path,
    prepare_home: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    quick_tokenizer: None,
) -> Ours:
    """Runs our command on a case; the exit code, what was said, and the files."""

    def run(case: Case, *flags: str) -> tuple[int, str, dict[str, str]]:
        folder = tmp_path / "data"
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("TUNESMITH_HOME", str(prepare_home))
        case.lay_out(folder)
        code = main(["tools", "fine_tunes.prepare_data", "-f", case.file, "-q", *flags])
        told = capsys.readouterr()
        return code, told.out + told.err, case.found(folder)

    return run


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in BETTER], ids=lambda case: case.name)
def test_the_same_files_and_flags(case: Case, ours: Ours) -> None:
    code, said, written = ours(case, "--split", "random")
    assert (code == 0) == (case.exit == 0), said
    assert written == case.written
    assert flags(said) == flags(case.stdout)
    assert_trains(written)


@pytest.mark.parametrize("case", [case for case in CASES if case.name in BETTER], ids=lambda case: case.name)
def test_better_for_a_reason_that_is_listed(case: Case, ours: Ours) -> None:
    code, said, written = ours(case, "--split", "random")
    same = written == case.written and flags(said) == flags(case.stdout)
    assert not same or case.exit != 0, "nothing differs any more"
    assert BETTER[case.name] in REASONS.read_text()
    assert f"`{case.name}`" in REASONS.read_text()
    assert code == (case.name == "nothing_left")
    assert_trains(written)


@pytest.mark.parametrize("case", [case for case in CASES if len(case.written) == 2], ids=lambda case: case.name)
def test_the_default_split_is_of_the_same_rows(case: Case, ours: Ours) -> None:
    _, said, written = ours(case)
    assert written.keys() == case.written.keys()
    assert lines(written) == lines(case.written)
    assert flags(said) == flags(case.stdout) or case.name in BETTER
    assert_trains(written)


@pytest.mark.sdk
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_original_still_says_what_was_recorded(case: Case) -> None:
    again = original(case, python_with("openai==0.28.1", "pandas", "openpyxl"))
    assert (again.exit, again.written, flags(again.stdout)) == (case.exit, case.written, flags(case.stdout))


def assert_trains(files: dict[str, str]) -> None:
    """What was written is accepted as training data."""
    for text in files.values():
        assert list(read_examples(split_lines([text.encode()])))


def lines(files: dict[str, str]) -> list[str]:
    return sorted(line for text in files.values() for line in text.splitlines())


def flags(said: str) -> list[str]:
    """The words of the recommended command, less what ours has more."""
    _, found, after = said.partition("api fine_tunes.create")
    words = shlex.split(after.split("\n\n")[0]) if found else []
    if "--classification_positive_class" in words and "--classification_n_classes" in words:
        place = words.index("--classification_n_classes")
        assert words[place + 1] == "2"
        del words[place : place + 2]
    return words
