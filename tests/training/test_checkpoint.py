from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tunesmith.training import checkpoint
from tunesmith.training.checkpoint import Position
from tunesmith.training.epochs import Standing

STATE = {"factors": torch.arange(5.0), "step": torch.tensor(3.0)}


def test_what_is_saved_is_read(tmp_path: Path) -> None:
    position = Position(step=3, elapsed_tokens=70, results_bytes=12, progress_bytes=34, progress_seq=1)

    position = replace(position, standing=Standing(2, 0.5, 1))
    (tmp_path / "r").write_bytes(bytes(12))
    (tmp_path / "p").write_bytes(bytes(40))

    checkpoint.save(tmp_path, position, STATE)

    found = checkpoint.latest(tmp_path, results=tmp_path / "r", progress=tmp_path / "p")
    assert found is not None
    assert found[0] == position
    assert found[1].keys() == STATE.keys()
    assert all(torch.equal(found[1][name], value) for name, value in STATE.items())


def test_the_newest_two_are_kept_in_order_of_steps(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        checkpoint.save(tmp_path, Position(step), STATE)

    assert {path.name for path in tmp_path.iterdir()} == {"step-10", "step-100"}
    found = checkpoint.latest(tmp_path, results=tmp_path / "r", progress=tmp_path / "p")
    assert found is not None
    assert found[0].step == 100


@pytest.mark.parametrize("grown", ["results", "progress"])
def test_one_whose_results_or_progress_lost_bytes_is_passed_over(
    tmp_path: Path, grown: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = {name: tmp_path / name for name in ("results", "progress")}
    for step in (1, 2):
        for path in files.values():
            path.write_bytes(bytes(10 * step))
        checkpoint.save(tmp_path / "checkpoints", Position(step, 0, 10 * step, 10 * step), STATE)
    files[grown].write_bytes(bytes(19))

    found = checkpoint.latest(tmp_path / "checkpoints", **files)

    assert found is not None
    assert found[0].step == 1
    assert f"{grown} has 19 bytes and had 20" in caplog.text
    files[grown].unlink()
    assert checkpoint.latest(tmp_path / "checkpoints", **files) is None


@pytest.mark.parametrize("name", ["state.safetensors", "position.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "gone", "zeros"])
def test_a_damaged_one_is_passed_over(tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(tmp_path, Position(1), STATE)
    checkpoint.save(tmp_path, Position(2), STATE)
    path = tmp_path / "step-2" / name
    content = path.read_bytes()
    match damage:
        case "cut":
            path.write_bytes(content[: len(content) // 2])
        case "gone":
            path.unlink()
        case "zeros":
            path.write_bytes(bytes(len(content)))

    with caplog.at_level(logging.WARNING):
        found = checkpoint.latest(tmp_path, results=tmp_path / "r", progress=tmp_path / "p")

    assert found is not None
    assert found[0].step == 1
    assert "step-2 is passed over" in caplog.text


def test_one_never_finished_does_not_count_and_is_replaced(tmp_path: Path) -> None:
    for step in (3, 4):  # two lives of a run, which need not save at the same steps
        (tmp_path / f"step-{step}.tmp").mkdir()
        (tmp_path / f"step-{step}.tmp" / "state.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path, results=tmp_path / "r", progress=tmp_path / "p") is None

    checkpoint.save(tmp_path, Position(4), STATE)

    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


def test_a_folder_without_any_has_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path / "checkpoints", results=tmp_path, progress=tmp_path) is None
