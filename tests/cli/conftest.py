"""Fixtures of the command line's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.tokenizer import Tokenizer

_read = Tokenizer.from_folder
_known: dict[str, Tokenizer] = {}


@pytest.fixture
def quick_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tokenizer is read once for all tests in place of once for each."""
    monkeypatch.setattr(Tokenizer, "from_folder", staticmethod(lambda folder: _cached(folder.name, folder)))


@pytest.fixture(scope="session")
def prepare_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home folder with the base models of the box unpacked in it once."""
    return tmp_path_factory.mktemp("prepare-home")


def _cached(name: str, folder: Path) -> Tokenizer:
    if name not in _known:
        _known[name] = _read(folder)
    return _known[name]
