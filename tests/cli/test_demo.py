"""The demo's parts that need no server, and its data."""

from __future__ import annotations

import fcntl
import math
from pathlib import Path

import pytest

from tunesmith.cli.demo import CLASSES, DATA, MARKER, Example, _prepare_home, accuracy, next_steps, read_examples
from tunesmith.cli.output import UsageError

SIZE_LIMIT_BYTES = 300_000


def test_the_data_is_small_whole_and_credited() -> None:
    assert sum(path.stat().st_size for path in DATA.iterdir()) <= SIZE_LIMIT_BYTES
    for name, count in (("train", 1600), ("valid", 400)):
        examples = read_examples(DATA / f"{name}.jsonl")
        assert len(examples) == count
        assert {example.completion for example in examples} == set(CLASSES)
        assert all(example.prompt == f"{example.tweet} ->" for example in examples)
    assert "creativecommons.org/licenses/by/3.0" in (DATA / "README.md").read_text()


def test_no_validation_row_is_trained_on() -> None:
    trained = {example.tweet for example in read_examples(DATA / "train.jsonl")}
    assert not trained & {example.tweet for example in read_examples(DATA / "valid.jsonl")}


def test_accuracy_counts_the_likeliest_class() -> None:
    likely, unlikely = math.log(0.6), math.log(0.1)
    scores = [{" positive": likely, " negative": unlikely}, {" positive": unlikely, " negative": likely}]
    assert accuracy([" positive", " positive"], scores) == 0.5


def test_the_tweet_is_the_prompt_without_its_separator() -> None:
    assert Example("so -> so ->", " positive").tweet == "so -> so"


def test_a_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="no demo made"):
        _prepare_home(tmp_path, keep=False)
    assert (tmp_path / "thesis.tex").exists()


def test_the_home_of_an_earlier_demo_is_emptied_or_kept(tmp_path: Path) -> None:
    home = _prepare_home(tmp_path / "demo", keep=False)
    (home / "tunesmith.db").touch()
    _prepare_home(home, keep=True)
    assert (home / "tunesmith.db").exists()
    _prepare_home(home, keep=False)
    assert [path.name for path in home.iterdir()] == [MARKER]


def test_the_home_of_a_running_server_is_left_alone(tmp_path: Path) -> None:
    home = _prepare_home(tmp_path / "demo", keep=False)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UsageError, match="A server is using"):
            _prepare_home(home, keep=False)
    _prepare_home(home, keep=False)
    assert not (home / "lock").exists()


def test_the_next_steps_quote_a_home_with_a_space() -> None:
    assert "--home '/tmp/a b'" in next_steps("ada:ft-x", Path("/tmp/a b"))
