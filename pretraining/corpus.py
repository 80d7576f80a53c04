"""Reads corpus shards: `.txt.xz` or `.txt`, documents separated by a line that holds only U+001E."""

from __future__ import annotations

import lzma
from collections.abc import Iterator
from pathlib import Path

DOCUMENT_SEPARATOR = "\n\x1e\n"


def read_documents(path: Path) -> list[str]:
    """All documents of one shard, in file order."""
    opener = lzma.open if path.suffix == ".xz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        return file.read().split(DOCUMENT_SEPARATOR)


def iterate_documents(paths: list[Path]) -> Iterator[str]:
    """Documents of several shards, one shard in memory at a time."""
    for path in paths:
        yield from read_documents(path)
