"""Fixtures that several packages of tests use."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

from tests.tiles import tiles
from tests.tiny import make_tiny_base

__all__ = ["tiles"]

# Property tests draw the same examples in every run, so that a red suite is red again for the next reader. To look for
# new ones: `pytest --hypothesis-profile=default`.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session", autouse=True)
def interruptible() -> None:
    """Ctrl-C reaches what tests start. A suite that a script runs in the background inherits that it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint folder of a tiny random Llama with the box tokenizer."""
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def tiled_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with widths in whole blocks: where the processor multiplies tiles of bf16, steps are compiled ones."""
    return make_tiny_base(tmp_path_factory.mktemp("bases") / "tiled", width=64, head_width=32)


@pytest.fixture
def anyio_backend() -> str:
    """Asynchronous tests (`@pytest.mark.anyio`) run on asyncio."""
    return "asyncio"
