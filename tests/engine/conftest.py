from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.engine.models import make_adapter
from tunesmith.engine.embedded import EmbeddedEngine


@pytest.fixture(scope="session")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twenty random adapters of different ranks."""
    folder = tmp_path_factory.mktemp("adapters")
    return [make_adapter(tiny_base, folder / str(i), seed=i, rank=2 + i % 3) for i in range(20)]


@pytest.fixture
async def engine() -> AsyncIterator[EmbeddedEngine]:
    engine = EmbeddedEngine(threads=1)
    yield engine
    await engine.close()
