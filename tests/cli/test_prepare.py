"""`tunesmith prepare` as a person at a terminal sees it, as a script does, and what it leaves where it fails."""

from __future__ import annotations

import json
import os
import pty
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tunesmith.cli import pace
from tunesmith.cli.main import main
from tunesmith.cli.pace import Speed, speed

ROWS = "".join(f"Prompt {n},{'GOOD' if n % 3 else 'BAD'}\n" for n in range(12))


@pytest.fixture
def data(tmp_path: Path, prepare_home: Path, monkeypatch: pytest.MonkeyPatch, quick_tokenizer: None) -> Path:
    monkeypatch.setenv("TUNESMITH_HOME", str(prepare_home))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("prompt,completion\n" + ROWS)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def types(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], object]]:
    """Standard input becomes a terminal at which somebody types this."""
    parent, child = pty.openpty()
    with open(parent, "wb", buffering=0) as keyboard, open(child) as stdin:  # noqa: PTH123  descriptors
        monkeypatch.setattr(sys, "stdin", stdin)
        yield lambda typed: keyboard.write(typed.encode())


@pytest.mark.parametrize(
    ("typed", "files"),
    [
        ("\n\n\n\ny\n", ["data_prepared_train.jsonl", "data_prepared_valid.jsonl"]),
        ("n\nn\nn\nN\nwhatever\n", ["data_prepared.jsonl"]),
        ("\n\n\n\nn\n", []),
    ],
)
def test_answers_decide(
    data: Path, types: Callable[[str], object], capsys: pytest.CaptureFixture[str], typed: str, files: list[str]
) -> None:
    types(typed)
    assert main(["prepare", "data.csv"]) == 0
    told = capsys.readouterr().out
    assert names(data) == sorted(["data.csv", *files])
    assert told.count("[Y/n]: ") == 5
    assert ("Aborting" in told) == (not files)
    if files == ["data_prepared.jsonl"]:
        first = json.loads((data / files[0]).read_text().splitlines()[0])
        assert first == {"prompt": "Prompt 0", "completion": "BAD"}


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_without_a_terminal_nothing_is_asked(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with Path(os.devnull).open() as nobody:
        monkeypatch.setattr(sys, "stdin", nobody)
        assert main(["prepare", "data.csv", *flags]) == 2
    assert "-q" in capsys.readouterr().err
    assert names(data) == ["data.csv"]


def test_machines_get_one_object(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "data.csv", "-q", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [finding["id"] for finding in told["findings"]] == [
        "format", "num_examples", "task", "lower_case_completion", "prompt_suffix", "prompt_prefix", "completion_space",
    ]  # fmt: skip
    assert told["files"] == [
        {"name": "data_prepared_train.jsonl", "rows": 9},
        {"name": "data_prepared_valid.jsonl", "rows": 3},
    ]
    assert '--classification_n_classes 2 --classification_positive_class " good"' in told["command"]
    assert (told["tokens_exact"], told["model"], told["prompt_suffix"]) == (True, "ada", " ->")
    assert told["tokens"] > 12


def test_classes_that_begin_alike_are_not_measured_and_can_be_renamed(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The job would fail: metrics go by the first token."""
    rows = "".join(f"Text {n},{('card_linking', 'card_arrival', 'other')[n % 3]}\n" for n in range(60))
    (data / "card.csv").write_text("prompt,completion\n" + rows)
    assert main(["prepare", "card.csv", "-q"]) == 0
    told = capsys.readouterr().out
    assert "--compute_classification_metrics" not in told
    assert "2 classes begin with the same token of `ada` as another, `card_" in told
    files = ["card_prepared_train.jsonl", "-v", "card_prepared_valid.jsonl"]
    assert f"tunesmith doctor {' '.join(files)} --fix --only class_first_tokens" in told.replace('"', "")
    assert main(["doctor", *files, "--fix", "--only", "class_first_tokens", "--yes"]) in (0, 1)
    capsys.readouterr()
    assert main(["doctor", "card_prepared_train_fixed.jsonl", "-v", "card_prepared_valid_fixed.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 48


def test_what_makes_a_row_too_long_leaves_it_out(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prompt": f"{n} ->", "completion": f" text {n}"} for n in range(5)]
    rows.append({"prompt": "x ->", "completion": " the" * 2_046})  # 2,048 tokens, before an ending is added
    (data / "just.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["prepare", "just.jsonl", "-q"]) == 0
    assert "1 rows were left out: by what was added" in capsys.readouterr().out
    assert len((data / "just_prepared.jsonl").read_text().splitlines()) == 5


def test_tokens_are_those_that_training_counts(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "one.jsonl").write_text('{"prompt": "", "completion": " a b c"}\n')
    assert main(["prepare", "one.jsonl", "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 4  # an empty prompt is one token


def test_columns_of_raw_files_are_named_with_flags(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "raw.tsv").write_text("text\tlabel\n" + ROWS.replace(",", "\t"))
    assert main(["prepare", "raw.tsv", "-q"]) == 1
    assert "--prompt-column" in capsys.readouterr().err
    assert main(["prepare", "raw.tsv", "-q", "--prompt-column", "text", "--completion-column", "label"]) == 0
    assert "raw_prepared_train.jsonl" in names(data)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "prompt,completion\na,b,c\n", "Line 2"),
        ("b.jsonl", '{"prompt":"a","completion":"b"}\n{', "Line 2"),
        ("c.csv", "prompt,completion\nsame,a\nsame,b\n", "All prompts are the same"),
        ("d.csv", "prompt,completion\na,\n", "no row with a completion"),
        ("e.csv", "prompt,completion\n", "no row with a completion"),
        ("f.xlsx", "x", "no XLSX workbook"),
    ],
)
def test_a_failure_leaves_nothing(
    data: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, said: str
) -> None:
    (data / name).write_text(content)
    assert main(["prepare", name, "-q"]) == 1
    assert said in capsys.readouterr().err
    assert names(data) == sorted(["data.csv", name])


def test_links_and_paths_upwards_write_beside_the_name_that_was_given(data: Path) -> None:
    (data / "deep").mkdir()
    (data / "deep" / "link.csv").symlink_to("../data.csv")
    before = (data / "data.csv").read_bytes()
    assert main(["prepare", "deep/../deep/link.csv", "-q", "--split", "none"]) == 0
    assert names(data / "deep") == ["link.csv", "link_prepared.jsonl"]
    assert (data / "data.csv").read_bytes() == before


def test_unknown_base_is_wrong_usage(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "data.csv", "-q", "-m", "gpt-9"]) == 2
    assert "Bases are ada" in capsys.readouterr().err


def test_time_is_what_earlier_runs_took(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    assert not speed(tmp_path, tmp_path / "base").measured
    for number, (base, status, tokens) in enumerate(
        [
            ("base", "succeeded", 1_000),
            ("base", "succeeded", 3_000),
            ("base", "failed", 9_000),
            ("other", "succeeded", 50),
        ]
    ):
        run = tmp_path / "runs" / f"run-{number}"
        run.mkdir(parents=True)
        (run / "spec.json").write_text(json.dumps({"base_dir": str(tmp_path / base)}))
        (run / "outcome.json").write_text(json.dumps({"status": status, "trained_tokens": tokens}))
        os.utime(run / "spec.json", (1_000, 1_000))
        os.utime(run / "outcome.json", (1_010, 1_010))
    assert speed(tmp_path, tmp_path / "base") == Speed(200, measured=True)


def test_before_the_first_run_time_is_guessed_from_the_processor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four times the layers, so a fourth as fast."""
    rate = pace._products_per_s()
    assert rate > 0
    monkeypatch.setattr(pace, "_products_per_s", lambda: rate)  # another look at a busy machine may find another
    for name, count in (("small", 2), ("large", 8)):
        (tmp_path / name).mkdir()
        weights = {f"{n}.weight": np.zeros((64, 64), dtype=np.float32) for n in range(count)}
        save_file(weights | {"norm": np.zeros(9_999, dtype=np.float32)}, tmp_path / name / "model.safetensors")
    small, large = (speed(tmp_path, tmp_path / name) for name in ("small", "large"))
    assert not small.measured
    assert small.tokens_per_s == pytest.approx(4 * large.tokens_per_s)
    assert "a guess of" in small.because("`small`")
    assert "until a fine-tune of `small` has run" in small.because("`small`")
