from __future__ import annotations

import io
import zipfile
from pathlib import Path

import pytest

from tunesmith.core.packages import ADAPTER_FILES, pack, unpack
from tunesmith.errors import InvalidRequest

ADAPTER = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights" * 100}
CHECKPOINT = {"config.json": b"{}", "model.safetensors": b"all", "tokenizer.json": b"{}"}


def package(files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> io.BytesIO:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as opened:
        for name, content in files.items():
            opened.writestr(name, content)
    return out


def unpacked(files: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    unpack(package(files, zipfile.ZIP_DEFLATED), folder, limit_bytes=10_000)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("files", [ADAPTER, CHECKPOINT])
def test_what_is_packed_is_unpacked_and_equal_files_give_equal_bytes(tmp_path: Path, files: dict[str, bytes]) -> None:
    packages = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_bytes(content)
        packages.append(io.BytesIO())
        pack(tmp_path / name, packages[-1])
    assert packages[0].getvalue() == packages[1].getvalue()
    unpack(packages[0], tmp_path / "out", limit_bytes=10_000)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == files


def test_a_model_in_one_folder_is_found_and_what_is_no_part_of_it_is_passed_over(tmp_path: Path) -> None:
    extras = {"m/README.md": b"x", "m/optimizer.pt": b"x", "m/checkpoint-3/config.json": b"x", "m/run.py": b"x"}
    files = {f"m/{name}": content for name, content in ADAPTER.items()} | extras
    assert unpacked(files, tmp_path / "out") == ADAPTER


def test_names_that_lead_out_of_the_folder_lead_nowhere(tmp_path: Path) -> None:
    files = {f"../../{name}": content for name, content in ADAPTER.items()}
    assert unpacked(files, tmp_path / "a" / "b" / "out") == ADAPTER
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(ADAPTER_FILES)


def test_an_adapter_beside_a_checkpoint_is_taken_alone(tmp_path: Path) -> None:
    assert unpacked(ADAPTER | CHECKPOINT, tmp_path / "out") == ADAPTER | {"tokenizer.json": b"{}"}


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"adapter_config.json": b"{}", "adapter_model.bin": b"x"}, r"holds adapter_model\.bin; pickled weights"),
        ({"pytorch_model.bin": b"x", "config.json": b"{}"}, "pickled weights are never read"),
        ({"adapter_config.json": b"{}"}, r"holds no model: .* It has: adapter_config\.json\."),
        ({}, "It has: nothing"),
        ({"a/model.safetensors": b"x", "b/config.json": b"{}"}, "holds no model"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, files: dict[str, bytes], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as caught:
        unpacked(files, tmp_path / "out")
    assert caught.value.param == "file"
    assert not (tmp_path / "out").exists()


def test_a_bomb_is_stopped_at_the_limit(tmp_path: Path) -> None:
    bomb = package(ADAPTER | {"adapter_model.safetensors": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    assert len(bomb.getvalue()) < 100_000
    with pytest.raises(InvalidRequest, match="larger than the 2000000 bytes"):
        unpack(bomb, tmp_path / "out", limit_bytes=2_000_000)
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= 2_000_000


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 but no more", b'{"prompt": "x"}'])
def test_what_is_no_zip_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InvalidRequest, match="not a zip that can be read here"):
        unpack(io.BytesIO(content), tmp_path / "out", limit_bytes=1_000)


def test_a_damaged_entry_is_refused(tmp_path: Path) -> None:
    whole = package(ADAPTER).getvalue()
    place = whole.index(b"weightsweights")
    with pytest.raises(InvalidRequest, match="not a zip that can be read here: Bad CRC-32"):
        unpack(io.BytesIO(whole[:place] + b"W" + whole[place + 1 :]), tmp_path / "out", limit_bytes=10_000)
