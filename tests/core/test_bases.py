"""The base catalogue and the box."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tunesmith.core import box
from tunesmith.core.bases import DEFAULT_LEARNING_RATE, Bases
from tunesmith.core.catalogue import hub_folder
from tunesmith.errors import NotFound


def test_unpacking_gives_an_ordinary_folder_within_half_a_quantum(tiny_base: Path, tmp_path: Path) -> None:
    box.pack(tiny_base, tmp_path / "tiny")
    folder = box.unpack(tmp_path / "tiny", tmp_path / "home")

    original, unpacked = load_file(tiny_base / "model.safetensors"), load_file(folder / "model.safetensors")
    assert original.keys() == unpacked.keys()
    for name, tensor in original.items():
        assert unpacked[name].dtype == np.float32
        quantum = np.abs(tensor).max(axis=-1, keepdims=True) / 127 if tensor.ndim == 2 else 0
        assert np.all(np.abs(unpacked[name] - tensor) <= quantum * 0.5001)
    assert (folder / "tokenizer.json").read_bytes() == (tiny_base / "tokenizer.json").read_bytes()


def test_packing_is_deterministic_and_small(tiny_base: Path, tmp_path: Path) -> None:
    box.pack(tiny_base, tmp_path / "a")
    box.pack(tiny_base, tmp_path / "b")
    assert (tmp_path / "a" / box.PACKED).read_bytes() == (tmp_path / "b" / box.PACKED).read_bytes()
    assert (tmp_path / "a" / box.PACKED).stat().st_size < 0.32 * (tiny_base / "model.safetensors").stat().st_size


def test_many_may_unpack_at_once(tiny_base: Path, tmp_path: Path) -> None:
    box.pack(tiny_base, tmp_path / "tiny")
    folders: list[Path] = []
    threads = [
        threading.Thread(target=lambda: folders.append(box.unpack(tmp_path / "tiny", tmp_path / "home")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 4 and len(set(folders)) == 1
    assert [path.name for path in (tmp_path / "home" / "bases").iterdir()] == [folders[0].name]


def test_the_four_names_resolve_and_say_what_they_share(tmp_path: Path) -> None:
    bases = Bases(tmp_path)
    assert [base.name for base in bases.list()] == ["ada", "babbage", "curie", "davinci"]
    assert all(base.context_tokens == 2048 for base in bases.list())
    assert bases.get("curie").note.endswith("; the same weights as davinci")
    with pytest.raises(KeyError):
        bases.get("gpt-5")


def test_the_catalogue_adds_and_replaces(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "bases.toml").write_text(
        f'[curie]\nfolder = "{tiny_base}"\nlearning_rate = 0.01\n[qwen-mini]\nfolder = "{tiny_base}"\n'
    )
    bases = Bases(tmp_path)
    assert [base.name for base in bases.list()] == ["ada", "babbage", "curie", "davinci", "qwen-mini"]
    assert bases.folder("curie") == tiny_base
    assert bases.get("curie").learning_rate == 0.01
    assert bases.get("qwen-mini").learning_rate == DEFAULT_LEARNING_RATE < bases.get("ada").learning_rate


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ("[x]\nfolder = '/nowhere'", r"\[x\]: folder /nowhere is not there"),
        ("[x]\nfolder = '{base}'\ncontext_tokens = 4096", "context_tokens is 4096, and the model reads 2048"),
        ("[x]\nhub = 'org/name'\nrevision = 'main'", "40 hexadecimal digits"),
    ],
)
def test_a_wrong_catalogue_stops_with_a_sentence(entry: str, complaint: str, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "bases.toml").write_text(entry.format(base=tiny_base))
    with pytest.raises(ValueError, match=complaint):
        Bases(tmp_path)


def test_a_shorter_context_and_a_price(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "bases.toml").write_text(
        f"[x]\nfolder = '{tiny_base}'\ncontext_tokens = 512\nprice_per_1k_training_tokens = 0.5\n"
    )
    base = Bases(tmp_path).get("x")
    assert (base.context_tokens, base.price_per_1k_training_tokens) == (512, 0.5)


def test_the_models_own_context_bounds_it(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    shutil.copytree(tiny_base, folder)
    (folder / "config.json").write_text('{"model_type": "gpt2", "n_positions": 1024}')
    (tmp_path / "bases.toml").write_text(f"[x]\nfolder = '{folder}'")
    assert Bases(tmp_path).get("x").context_tokens == 1024


def test_a_hub_model_that_is_not_here_leaves_the_others(tiny_base: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    (tmp_path / "bases.toml").write_text(
        f"[curie]\nhub = 'org/name'\nrevision = '{commit}'\n[x]\nfolder = '{tiny_base}'"
    )
    bases = Bases(tmp_path)
    assert [base.name for base in bases.list()] == ["ada", "babbage", "davinci", "x"]
    assert bases.get("davinci").note == "in the box: the curie checkpoint"
    for ask in (bases.get, bases.folder):
        with pytest.raises(NotFound, match=f"tunesmith models pull org/name --revision {commit} --as curie"):
            ask("curie")
    with pytest.raises(NotFound, match="not among those of this server"):
        bases.folder("gone")
    (hub_folder(tmp_path, "org/name", commit)).mkdir(parents=True)
    with pytest.raises(NotFound, match=r"has no config\.json"):  # somebody emptied it
        bases.get("curie")
    assert [base.name for base in Bases(tmp_path).list()] == ["ada", "babbage", "davinci", "x"]


def test_pickled_weights_are_refused(tiny_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((tiny_base / name).read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "bases.toml").write_text(f"[x]\nfolder = '{folder}'")
    with pytest.raises(ValueError, match="pickled weights are never read"):
        Bases(tmp_path)
