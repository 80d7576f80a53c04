"""Weights of a mapped file: views where they lie side by side, pages that come and go, values that stay."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tunesmith.decoder.mapped import release, stacked

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks /proc what is in memory")


def _mapped(folder: Path) -> dict[str, Tensor]:
    values = {name: torch.randn(512, 1_024) for name in ("a.gate", "b.up", "c.down")}
    save_file(values, folder / "weights.safetensors")
    with safe_open(folder / "weights.safetensors", framework="pt") as file:
        found = {name: file.get_tensor(name) for name in values}
    assert all(torch.equal(found[name], values[name]) for name in values)
    return found


def _resident_kib(path: Path) -> int:
    """Of the file's map."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            return next(int(rest.split()[1]) for rest in lines if rest.startswith("Rss:"))
    raise AssertionError(f"{path} is not mapped")


def test_neighbours_in_a_file_are_stacked_without_a_copy_and_outlive_their_parts(tmp_path: Path) -> None:
    weights = _mapped(tmp_path)
    expected = torch.cat([weights["a.gate"], weights["b.up"]])
    joined = stacked([weights["a.gate"], weights["b.up"]])
    assert joined.data_ptr() == weights["a.gate"].data_ptr()
    weights.clear()
    assert torch.equal(joined, expected)


def test_others_are_copied(tmp_path: Path) -> None:
    weights = _mapped(tmp_path)
    for names in (["b.up", "a.gate"], ["a.gate", "c.down"]):
        joined = stacked([weights[name] for name in names])
        assert torch.equal(joined, torch.cat([weights[name] for name in names]))
        assert joined.data_ptr() not in [weight.data_ptr() for weight in weights.values()]


@needs_linux
def test_what_is_released_leaves_memory_and_can_be_read_again(tmp_path: Path) -> None:
    weights = _mapped(tmp_path)
    before = weights["b.up"].clone()
    resident = _resident_kib(tmp_path / "weights.safetensors")
    release([weights["b.up"]])
    assert _resident_kib(tmp_path / "weights.safetensors") < resident - 1_900
    assert torch.equal(weights["b.up"], before)


@needs_linux
def test_what_was_written_to_is_kept(tmp_path: Path) -> None:
    weights = _mapped(tmp_path)
    weights["b.up"][3, 4] = 5.0
    plain = torch.randn(512, 1_024)
    copy = plain.clone()
    release([weights["b.up"], plain])
    assert weights["b.up"][3, 4] == 5.0
    assert torch.equal(plain, copy)
